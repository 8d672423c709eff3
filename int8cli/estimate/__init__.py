"""The memory that a model needs, from headers and config alone: weights, KV cache, and the cards it fits on."""
