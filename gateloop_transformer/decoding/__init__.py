"""The parts of decoding: sampling, a history to go back in, beam search and speculative decoding."""
