"""Training language models on text: what comes before a run, its processes, steps and records, and many runs."""
