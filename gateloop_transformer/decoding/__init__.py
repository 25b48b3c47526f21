"""What decoding is made of: sampling, a history to go back in, beams, drafted tokens."""
