"""Running a model over text with one block of it in memory, and what its inputs tell on the way.

`stream.StreamedModel` is the engine: it knows nothing of outliers. `calibrate` watches it and makes the statistics.
"""
