"""Which input columns of each linear a conversion stores exactly: from activations, statistics, or the weights."""
