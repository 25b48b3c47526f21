"""Checkpoints of the original package as folders that this one loads."""
