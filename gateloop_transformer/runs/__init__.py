"""What a run's folder is: its configuration, its weights, its checkpoints and its curves."""
