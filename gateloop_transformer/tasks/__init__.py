"""Synthetic tasks: generators, training with a curriculum of lengths, scores by length and by span."""
