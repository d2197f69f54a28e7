"""Weights in 8 or 4 bits with a scale for each group of inputs: the format, and how plain weights become such."""
