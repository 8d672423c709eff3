"""Runs a model on text with one block in memory at a time. `stream.StreamedModel` is the engine."""
