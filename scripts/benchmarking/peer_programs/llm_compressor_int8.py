"""Quantize a checkpoint to int8 with llm-compressor, without the model's definition.

python llm_compressor_int8.py SOURCE OUTPUT
"""

import sys

from llmcompressor import model_free_ptq

source, output = sys.argv[1:]
model_free_ptq(source, output, scheme="INT8", ignore=["lm_head", "re:.*embed.*"], max_workers=2, device="cpu")
