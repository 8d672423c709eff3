"""Load a model in 8 bit with transformers and bitsandbytes, and save it.

python transformers_bitsandbytes.py SOURCE OUTPUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

source, output = sys.argv[1:]
in_8_bit = BitsAndBytesConfig(load_in_8bit=True)
model = AutoModelForCausalLM.from_pretrained(
    source, quantization_config=in_8_bit, dtype=torch.float16, device_map={"": "cpu"}
)
model.save_pretrained(output)
