"""Continue a sentence with a model and with its int8 conversion, side by side, through transformers + bitsandbytes.

python scripts/continue_sentence.py demo/SmolLM2-135M-Instruct demo/SmolLM2-135M-Instruct-int8
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging


def continue_sentence(model_directory: Path, sentence: str, tokens: int) -> tuple[str, int]:
    """Greedy continuation, and the bytes that the model's tensors take in memory."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, device_map="cpu")
    prompt = tokenizer(sentence, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True), model.get_memory_footprint()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--sentence", default="The moon rose over the quiet harbour, and")
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="bitsandbytes")
    for directory in arguments.models:
        text, size_bytes = continue_sentence(directory, arguments.sentence, arguments.tokens)
        print(f"\n{directory} ({size_bytes / 1e6:.0f} MB in memory):\n  {text}")


if __name__ == "__main__":
    main()
