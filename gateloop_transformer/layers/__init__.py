"""The layers as torch modules; they know the operators, not the model."""
