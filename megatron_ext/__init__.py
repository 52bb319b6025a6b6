"""Splits tensors over devices: parallel layers, and the collectives that they use. Independent of any model."""
