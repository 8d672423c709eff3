"""Bounds and units that modules without torch need too."""

from typing import Literal

# The largest power of two of a smoothing, of either sign. 2^14 is the largest whose reciprocal is normal in float16.
MAX_EXPONENT = 14
# How many steps of an exponent are a factor of 2. Whole powers of two lose no digits, quarters of one are finer.
Steps = Literal[1, 4]
EXACT_STEPS: Steps = 1
FINE_STEPS: Steps = 4
