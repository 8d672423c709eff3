"""Open the cases with the transformers of one environment. Runs in that environment, and prints one JSON line per case.

Loading needs only torch, transformers and bitsandbytes; int8cli is not imported for it.

The comparison uses no tables: a model opened from int8 is compared with its source quantized on load, tensor by tensor.
If one has a float and the source quantized on load has int8, config.json must name the module in
`llm_int8_skip_modules`, and the values must be those of the source. If it is the other way round, config.json must not
name the module, and the int8 must be what bitsandbytes makes of the float. A float in another dtype must have the same
values.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

PACKAGES = ("transformers", "bitsandbytes", "accelerate", "compressed-tensors", "torch")
LIMIT_S = 300
_CALIBRATE = ("--from", "activations", "--tokens", "32", "--sequence-length", "16")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--run", action="store_true", help="calibrate and load_model too, which need int8cli")
    options = parser.parse_args()
    print(json.dumps({"packages": {name: _version(name) for name in PACKAGES}}), flush=True)
    for case in sorted(path.parent for path in options.directory.glob("*/case.json")):
        facts = json.loads((case / "case.json").read_text())
        found: dict[str, Any] = {"case": case.name}
        with _silence():
            found |= _load(case, facts["class"])
        if options.run and facts["runs"] and found["opens"] != "unknown":
            found["calibrate"] = _command("inspect-outliers", case / "source", "--work-dir", ".", *_CALIBRATE)
            found["load_model"] = _program(_LOAD_MODEL, case / "bitsandbytes", facts["class"])
        print(json.dumps(found), flush=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# Loading


def _load(case: Path, class_name: str) -> dict[str, Any]:
    """The outcome of a case. `opens` is "yes", "no", or "unknown" if this version does not open the source either."""
    import transformers
    from transformers import BitsAndBytesConfig

    try:
        model_class = getattr(transformers, class_name)
    except (AttributeError, ImportError):  # a class of a package that is not installed cannot be imported
        return {"opens": "unknown", "why": f"no class {class_name}"}
    try:
        source = dict(_opened(model_class, case / "source").state_dict())
        theirs = _opened(model_class, case / "source", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    except Exception as error:
        return {"opens": "unknown", "why": _first_line(error)}
    found: dict[str, Any] = {}
    try:
        model = _opened(model_class, case / "bitsandbytes")
    except Exception as error:
        return {"opens": "no", "why": _first_line(error)}
    skips = json.loads((case / "bitsandbytes/config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    found |= {"opens": "yes"} | _compare(dict(model.state_dict()), dict(theirs.state_dict()), source, skips)
    if (case / "compressed-tensors").is_dir():
        try:
            _opened(model_class, case / "compressed-tensors")
            found["compressed_tensors"] = "yes"
        except Exception as error:
            found["compressed_tensors"] = _first_line(error)
    return found


def _opened(model_class: Any, directory: Path, **options: Any) -> Any:
    """The model. Raises if a tensor is missing or mismatched."""
    model, info = model_class.from_pretrained(
        directory, output_loading_info=True, device_map="cpu", torch_dtype="auto", **options
    )
    lacking = sorted(map(str, info["missing_keys"])) + sorted(map(str, info["mismatched_keys"]))
    if lacking:
        raise ValueError(f"missing {', '.join(lacking[:3])}")
    return model


def _compare(ours: dict[str, Any], theirs: dict[str, Any], source: dict[str, Any], skips: list[str]) -> dict[str, Any]:
    """`equal` is "yes", "other precision" (`others` has the layers), or "no" (`wrong` has the tensors)."""
    import torch

    others, wrong = [], []
    for name in sorted({*ours, *theirs}):
        module = re.sub(r"\.(weight|SCB|weight_format)$", "", name)
        mine, other = ours.get(name), theirs.get(name)
        if mine is not None and other is not None and mine.dtype == other.dtype:
            if not torch.equal(mine, other):
                wrong.append(name)
        elif f"{module}.SCB" in theirs and f"{module}.SCB" not in ours:
            weight = f"{module}.weight"
            if not any(_names(entry, module) for entry in skips) or not _same_values(ours[weight], source[weight]):
                wrong.append(name)
            others.append(module)
        elif f"{module}.SCB" in ours and f"{module}.SCB" not in theirs:
            if any(_names(entry, module) for entry in skips) or not _is_int8_of(
                ours, theirs[f"{module}.weight"], module
            ):
                wrong.append(name)
            others.append(module)
        elif mine is not None and other is not None and _same_values(mine, other):
            others.append(module)
        else:
            wrong.append(name)
    others = sorted({".".join("*" if part.isdigit() else part for part in module.split(".")) for module in others})
    return {"equal": "no" if wrong else "other precision" if others else "yes", "others": others, "wrong": wrong[:4]}


def _is_int8_of(ours: dict[str, Any], weight: Any, module: str) -> bool:
    import torch
    from bitsandbytes.nn import Int8Params

    made = Int8Params(weight.clone(), requires_grad=False).to("cpu")
    return torch.equal(made.data, ours[f"{module}.weight"]) and torch.equal(made.SCB, ours[f"{module}.SCB"])


def _same_values(mine: Any, other: Any) -> bool:
    import torch

    floats = mine.is_floating_point() and other.is_floating_point()
    return floats and mine.shape == other.shape and torch.equal(mine.float(), other.float())


def _names(entry: str, module: str) -> bool:
    """Whether an entry of config.json names a module, by any of the rules."""
    return module.endswith(entry) or f"{entry}." in f"{module}." or re.match(entry, module) is not None


# Running

_LOAD_MODEL = """
import sys, torch, transformers, int8cli
model = int8cli.load_model(sys.argv[1])
ids = torch.arange(5, 12)[None]
decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
with torch.no_grad():
    ours = model(input_ids=ids, **decoder)[0].float()
assert torch.isfinite(ours).all()
"""


def _command(*arguments: Any) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        return _ran([sys.executable, "-m", "int8cli", *map(str, arguments)], scratch)


def _program(code: str, *arguments: Any) -> str:
    return _ran([sys.executable, "-c", code, *map(str, arguments)], None)


def _ran(command: list[str], directory: str | None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=directory)
    if done.returncode == 0:
        return "yes"
    lines = [line for line in done.stderr.strip().splitlines() if line and not line.startswith("hint")]
    return lines[-1][:200] if lines else f"exit {done.returncode}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


@contextlib.contextmanager
def _silence() -> Any:
    logging.disable(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    main()
