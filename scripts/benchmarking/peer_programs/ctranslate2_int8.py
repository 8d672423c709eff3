"""Convert a transformers model to CTranslate2's format with int8 weights.

python ctranslate2_int8.py SOURCE OUTPUT
"""

import sys

from ctranslate2.converters import TransformersConverter

source, output = sys.argv[1:]
TransformersConverter(source, low_cpu_mem_usage=True).convert(output, quantization="int8")
