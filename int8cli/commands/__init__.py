"""What each command does, as one function: put together from the rooms below, and exported from `int8cli`.

Owns the choices that no part can make alone: workers and threads, where files go, which way to know the outlier
columns. Prints nothing, names no flag, knows no exit code.
"""
