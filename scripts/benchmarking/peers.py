"""The other converters that int8cli is compared with. Each gets its own virtual environment, which is made here.

The environments are reused by later runs. If one cannot be made, its converter is left out, with the reason.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "peer_programs"
# An unconstrained `torch` installs several GB of CUDA libraries. This version is installed first, and then pinned.
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Peer:
    """A converter: the packages it needs besides torch, and the program that runs it with SOURCE and OUTPUT."""

    name: str
    program: str
    packages: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.program.removesuffix(".py")


PEERS = (
    Peer(
        "transformers + bitsandbytes, 8 bit",
        "transformers_bitsandbytes.py",
        ("transformers", "bitsandbytes", "accelerate"),
    ),
    Peer("llm-compressor, model_free_ptq INT8", "llm_compressor_int8.py", ("llmcompressor",)),
    Peer("AutoRound, model-free W8A16", "auto_round_w8a16.py", ("auto-round",)),
    Peer("CTranslate2, int8", "ctranslate2_int8.py", ("ctranslate2", "transformers<5", "sentencepiece")),
    Peer("gguf in Python, Q8_0", "gguf_q8_0.py", ("gguf", "safetensors")),
)


class InstallError(Exception):
    """The environment of a peer cannot be made. The message has pip's last error."""


def installed(peer: Peer, environments: Path) -> Path:
    """The Python of a peer's environment. Makes the environment if it does not exist. Raises InstallError."""
    directory = environments.resolve() / peer.key
    python, ready = directory / "bin" / "python", directory / ".ready"
    if ready.exists():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    print(f"installing {', '.join(peer.packages)}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(directory)])
    constraints = directory / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, TORCH])
    _run([*pip, "--constraint", str(constraints), *peer.packages])
    ready.touch()
    return python


def versions(peer: Peer, python: Path) -> str:
    """The packages installed for a peer, as `name version name version …`."""
    names = [package.partition("<")[0] for package in peer.packages]
    code = "import sys; from importlib.metadata import version; print(*(f'{n} {version(n)}' for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout.strip()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if line.lower().startswith("error")]
        raise InstallError(f"cannot be installed: {(errors or [done.stdout.strip()])[-1][-200:]}")
