"""What a model takes, told from headers and config alone: weights, KV cache, cards."""
