"""Looking into a trained model: its gates on a text, where it forgets, what it predicts."""
