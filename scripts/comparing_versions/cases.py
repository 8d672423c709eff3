"""The cases: tiny models of many architectures, saved by this transformers, and their conversions by int8cli.

Runs in the environment with the newest transformers. Each case is a directory with `source`, `bitsandbytes`, for some
cases `compressed-tensors`, and `case.json` with the name of the class.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support.calibration_models import make_model
from support.checkpoints import HEADS, LISTED, OTHERS, WITHOUT_COLUMNS, build_tiny
from support.further_checkpoints import FURTHER

from int8cli import ConvertOptions, convert

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# For these, calibration, load_model and compressed-tensors are also tested: one of each kind of block.
RUN = ("llama", "gpt2", "bloom", "bert", "t5", "gemma2", "mamba")


def write_cases(directory: Path, names: set[str]) -> None:
    """Write each case to its own directory, except those that this transformers cannot build or save."""
    for name, tiny in (LISTED | HEADS | OTHERS | FURTHER).items():
        for dtype_name, dtype in DTYPES.items():
            if names and name not in names:
                continue
            case = directory / f"{name}-{dtype_name}"
            runs = name in RUN and dtype_name == "bfloat16"
            if runs:
                make_model(name, case / "source", dtype=dtype)
            else:
                build_tiny(tiny, dtype).save_pretrained(case / "source")
            convert(case / "source", case / "bitsandbytes", WITHOUT_COLUMNS)
            if runs and name != "gpt2":
                options = ConvertOptions(outliers="none", layout="compressed-tensors")
                convert(case / "source", case / "compressed-tensors", options)
            facts = {
                "class": tiny.model,
                "runs": runs,
                "model_type": json.loads((case / "source/config.json").read_text())["model_type"],
            }
            (case / "case.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    write_cases(Path(sys.argv[1]), set(sys.argv[2:]))
