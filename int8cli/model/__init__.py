"""Runs a model on text with one block in memory, and collects what the inputs of its linears show.

`stream.StreamedModel` is the engine: it knows nothing of outliers. `calibrate` watches it and makes the statistics.
"""
