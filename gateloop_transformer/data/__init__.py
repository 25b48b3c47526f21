"""Text as data: sources, tokenizers, corpora in a cache, batches. Knows nothing of models."""
