"""Checkpoints as bytes: reading and writing their files, locally and from the Hub. Knows no quantization method."""
