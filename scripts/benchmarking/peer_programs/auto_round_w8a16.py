"""Quantize a checkpoint's weights to int8 with AutoRound's model-free mode, the only one that needs no calibration.

python auto_round_w8a16.py SOURCE OUTPUT
"""

import sys

from auto_round import AutoRound

if __name__ == "__main__":  # AutoRound starts processes that import this file
    source, output = sys.argv[1:]
    AutoRound(model=source, scheme="W8A16", model_free=True, disable_opt_rtn=True, device_map="cpu").quantize_and_save(
        output
    )
