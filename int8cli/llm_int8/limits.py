"""Bounds that modules without torch need too."""

# The largest exponent of a smoothing, of either sign. 2^14 is the largest power whose reciprocal is normal in float16.
MAX_EXPONENT = 14
