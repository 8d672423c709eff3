"""Bounds, units and defaults that modules without torch need too."""

from typing import Literal

# The most input columns to store for each linear. They add 1.5 % to the bytes of SmolLM2-135M (576 wide), less to wider
# models. With 4, 8 and 10 columns, and zero-point inputs, the model was 0.0069, 0.0056 and 0.0053 nats from 16 bit;
# without any 0.0208; 0.0235 with the LLM.int8() of bitsandbytes.
DEFAULT_OUTLIER_COLUMNS = 8
# The largest power of two of a smoothing, of either sign. 2^14 is the largest whose reciprocal is normal in float16.
MAX_EXPONENT = 14
# How many steps of an exponent are a factor of 2. Whole powers of two lose no digits, quarters of one are finer.
Steps = Literal[1, 4]
EXACT_STEPS: Steps = 1
FINE_STEPS: Steps = 4
