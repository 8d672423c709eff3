"""Continue a sentence with a model and with its int8 conversion, by transformers + bitsandbytes and by int8cli.

python scripts/continue_sentence.py demo/SmolLM2-135M-Instruct demo/SmolLM2-135M-Instruct-int8
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import int8cli


def continue_sentence(model_directory: Path, model: Any, sentence: str, tokens: int) -> str:
    """The sentence and its greedy continuation."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    prompt = tokenizer(sentence, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


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
        model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
        show(directory, "transformers", model, arguments)
        if (directory / "int8").is_dir():
            show(directory, "int8cli, stored columns exact", int8cli.load_model(directory, device="cpu"), arguments)


def show(directory: Path, loader: str, model: Any, arguments: argparse.Namespace) -> None:
    text = continue_sentence(directory, model, arguments.sentence, arguments.tokens)
    size_mb = model.get_memory_footprint() / 1e6
    print(f"\n{directory} ({loader}; {size_mb:.0f} MB in memory):\n  {text}")


if __name__ == "__main__":
    main()
