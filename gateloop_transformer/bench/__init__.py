"""Benchmarks of operators, layers, training steps and decoding, next to peers and the machine's own limits."""
