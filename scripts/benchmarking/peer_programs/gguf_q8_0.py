"""Write every matrix of a safetensors checkpoint as Q8_0 into one GGUF file, with the package gguf.

Replaces llama.cpp's convert_hf_to_gguf.py, which is not in any package registry. It uses the same gguf.quants.quantize
and GGUFWriter. One tensor is in memory at a time.

    python gguf_q8_0.py SOURCE OUTPUT
"""

import math
import sys
from pathlib import Path

import gguf
import numpy
from safetensors import safe_open

Q8_0 = gguf.GGMLQuantizationType.Q8_0

source, output = map(Path, sys.argv[1:])
output.mkdir()
shards = [safe_open(path, "numpy") for path in sorted(source.glob("*.safetensors"))]
writer = gguf.GGUFWriter(output / "model-q8_0.gguf", "llama")
for shard in shards:
    for name in sorted(shard.keys()):
        shape = shard.get_slice(name).get_shape()
        if len(shape) == 2:
            stored = gguf.quants.quant_shape_to_byte_shape(shape, Q8_0)
            writer.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), math.prod(stored), raw_dtype=Q8_0)
        else:
            writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), 4 * math.prod(shape))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
for shard in shards:
    for name in sorted(shard.keys()):
        weight = shard.get_tensor(name).astype(numpy.float32)
        writer.write_tensor_data(gguf.quants.quantize(weight, Q8_0) if weight.ndim == 2 else weight)
writer.close()
