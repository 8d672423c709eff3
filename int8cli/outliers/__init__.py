"""Statistics of activations, and suspects from the weights."""
