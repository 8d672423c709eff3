"""One library function for each command, exported from `int8cli`.

Owns the choices that involve several packages: workers and threads, where files go, which strategy chooses the outlier
columns. Prints nothing, names no flag, knows no exit code.
"""
