"""Training and evaluating language models on bytes of text: configuration, data, loop, checkpoints."""
