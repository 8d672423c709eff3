"""Statistics of activations, and suspects by the weights."""
