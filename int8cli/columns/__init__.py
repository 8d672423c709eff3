"""Which input columns of each linear a conversion stores exactly: by activations, statistics, or the weights."""
