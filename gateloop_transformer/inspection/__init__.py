"""Inspecting a trained model: its gates on a text, where it forgets, and what it predicts."""
