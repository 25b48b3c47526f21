"""How fast it is: operators, layers, training steps and decoding beside peers and the machine's own limits."""
