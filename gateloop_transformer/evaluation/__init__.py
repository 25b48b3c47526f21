"""How well a language model does on a text: bits per byte, by position, over documents read whole."""
