"""The program as a user runs it: real processes, and small checkpoints to convert.

`run` and `start` go through `python -m int8cli`. `Nursery` starts the same program by forking an interpreter that has
imported it already, which takes 20 ms instead of two seconds, or of five where a model runs. It is for tests that need
many processes.
"""

import fcntl
import gc
import hashlib
import importlib
import json
import os
import pickle
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0
# What most tests convert with: stored columns have test_sidecars.py and test_outlier_conversion.py.
CONVERT = ("convert", "--outliers", "none")

# In place of a path, for a standard stream: no descriptor, and a pipe that nobody reads.
CLOSED, UNREAD = "closed", "unread"

_LARGE_BYTES = 1 << 16

TERM = "xterm-256color"

# What a command imports that runs a LLaMA, or opens one in int8.
_MODELS = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "accelerate",
    "bitsandbytes",
    "int8cli.commands.evaluate",
    "int8cli.commands.generate",
    "int8cli.commands.inspect_outliers",
    "int8cli.commands.verify",
)


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (negative for a signal), and what it wrote."""

    code: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """The environment of a test with int8cli importable, and with these changes."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def start(*args: str | Path, cwd: Path, env: Mapping[str, str] | None = None, **options) -> subprocess.Popen[str]:
    """Start the program in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "int8cli", *map(str, args)],
        cwd=cwd,
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def outcome_of(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=LIMIT_S)
    return Outcome(process.returncode, out, err)


def run(*args: str | Path, cwd: Path, env: Mapping[str, str] | None = None, **options) -> Outcome:
    """Run the program until it ends."""
    return outcome_of(start(*args, cwd=cwd, env=env, **options))


@dataclass
class Child:
    """A process of the nursery."""

    pid: int
    nursery: "Nursery"
    stdout: Path
    stderr: Path

    def signal(self, number: int) -> None:
        """Send a signal; a SIGSTOP is waited for, since it takes effect thread by thread."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        if number == signal.SIGSTOP:
            wait_until(lambda: all(_state(task) == "T" for task in Path(f"/proc/{self.pid}/task").iterdir()))

    def wait(self) -> Outcome:
        code = self.nursery.wait(self.pid)
        return Outcome(code, self.stdout.read_text(), self.stderr.read_text())


class Nursery:
    """Forks the program. Takes one request at a time. `Child.wait` waits for the end of a child.

    With `models`, it has imported what runs a LLaMA and what opens one in int8 as well.
    """

    def __init__(self, scratch: Path, *, models: bool = False) -> None:
        self._scratch = scratch
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(_MODELS if models else ())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=scratch,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def start(
        self,
        *args: str | Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        user: int | None = None,
        stdin: str = os.devnull,
        stdout: str = "",
        stderr: str = "",
    ) -> Child:
        """`stdin`: what is read. `stdout` and `stderr`: where they lead, instead of files for the outcome's text."""
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()  # a child may be killed before it opens them
        words = [str(arg) for arg in args]
        streams = (stdin, stdout or str(out), stderr or str(err))
        pid = self._ask(("start", words, str(cwd), dict(env or {}), streams, user))
        return Child(pid, self, out, err)

    def run(self, *args: str | Path, cwd: Path, **options: Any) -> Outcome:
        return self.start(*args, cwd=cwd, **options).wait()

    def on_terminal(self, *args: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run the program with all its streams on a terminal; returns its code and all that was drawn."""
        with Terminal() as terminal:
            to, env = terminal.path, {"TERM": TERM, **(env or {})}
            code = self.start(*args, cwd=cwd, env=env, stdin=to, stdout=to, stderr=to).wait().code
        return code, terminal.drawn

    def wait(self, pid: int) -> int:
        return self._ask(("wait", pid))

    def close(self) -> None:
        self._requests.close()
        self._process.wait(LIMIT_S)
        self._answers.close()

    def _ask(self, request: tuple[object, ...]) -> int:
        pickle.dump(request, self._requests)
        self._requests.flush()
        ready, _, _ = select.select([self._answers], [], [], LIMIT_S)
        assert ready, f"no answer to {request}"
        answer: int = pickle.load(self._answers)
        return answer


@contextmanager
def nursery_in(scratch: Path, *, models: bool = False) -> Iterator[Nursery]:
    nursery = Nursery(scratch, models=models)
    try:
        yield nursery
    finally:
        nursery.close()


class Terminal:
    """A terminal of 80 columns, whose text is collected until the context is left."""

    def __init__(self) -> None:
        self._ours, self.descriptor = pty.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.path = os.ttyname(self.descriptor)
        self._pieces: list[bytes] = []
        self._reader = threading.Thread(target=self._read)

    @property
    def drawn(self) -> str:
        return b"".join(self._pieces).decode()

    def __enter__(self) -> "Terminal":
        self._reader.start()
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)  # the reader ends after the last writer
        self._reader.join()
        os.close(self._ours)

    def _read(self) -> None:
        with suppress(OSError):  # raised after the last writer has closed it
            while piece := os.read(self._ours, 65536):
                self._pieces.append(piece)


def wait_until(happened: Callable[[], object], what: str = "it", within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, f"{what} never happened"
        time.sleep(0.001)


# Checkpoints


def llama(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 96,
    vocabulary: int = 128,
    shards: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A LLaMA of random weights in `shards` files, with tokenizer and config: what a user downloads."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = llama_tensors(layers, hidden, intermediate, vocabulary, seed, dtype)
    names = sorted(tensors, key=lambda name: (name.startswith("model.layers"), name))
    pieces = [names[index::shards] for index in range(shards)]
    files = [f"model-{index:05}-of-{shards:05}.safetensors" for index in range(1, shards + 1)]
    if shards == 1:
        files = ["model.safetensors"]
    for file, piece in zip(files, pieces, strict=True):
        save_file({name: tensors[name] for name in piece}, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)
    if shards > 1:
        weight_map = {name: file for file, piece in zip(files, pieces, strict=True) for name in piece}
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", llama_config(layers, hidden, intermediate, vocabulary))
    write_json(directory / "tokenizer_config.json", {"version": "1.0"})
    (directory / "LICENSE").write_text("free\n")
    return directory


def llama_tensors(
    layers: int, hidden: int, intermediate: int, vocabulary: int, seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    tensors = {
        "model.embed_tokens.weight": noise(vocabulary, hidden),
        "model.norm.weight": noise(hidden),
        "lm_head.weight": noise(vocabulary, hidden),
    }
    for layer in range(layers):
        root = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{root}.self_attn.{name}.weight"] = noise(hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{root}.mlp.{name}.weight"] = noise(intermediate, hidden)
        tensors[f"{root}.mlp.down_proj.weight"] = noise(hidden, intermediate)
        tensors[f"{root}.input_layernorm.weight"] = noise(hidden)
        tensors[f"{root}.post_attention_layernorm.weight"] = noise(hidden)
    return tensors


def llama_config(layers: int, hidden: int, intermediate: int, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data))


def _state(task: Path) -> str:
    """The state of a thread, a letter of proc(5)."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def tree(directory: Path) -> dict[str, bytes]:
    """Every file in a directory by relative name, including hidden ones; an empty directory is a name with a slash.

    Large files are represented by their digest, so that a difference is one line and not megabytes.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file():
            data = path.read_bytes()
            found[name] = data if len(data) < _LARGE_BYTES else hashlib.sha256(data).hexdigest().encode()
        elif not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found


def _serve() -> None:
    """The process of the nursery: forks on request, and runs the program in the child."""
    from typer.testing import CliRunner

    import int8cli.cli
    import int8cli.cli.progress
    import int8cli.commands.convert
    import int8cli.conversion.shard
    import int8cli.report.plan

    CliRunner().invoke(int8cli.cli.app, ["convert", "./nothing"])  # and with it what is imported on the way
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        if request[0] == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(request[1], 0)[1])
        elif (answer := os.fork()) == 0:
            requests.close()
            answers.close()
            become_the_program(*request[1:])
            return
        pickle.dump(answer, answers)
        answers.flush()


def become_the_program(
    args: list[str], cwd: str, env: dict[str, str], streams: tuple[str, str, str], user: int | None
) -> None:
    """What a fork of a process that has imported the program does in place of starting it. Never returns."""
    os.setsid()
    stdin, stdout, stderr = streams
    opened = os.open(stdin, os.O_RDONLY)
    os.dup2(opened, 0)
    os.close(opened)
    for descriptor, path in ((1, stdout), (2, stderr)):
        _connect(descriptor, path)
    sys.stdout = None if stdout == CLOSED else sys.stdout  # as Python starts in such a process
    sys.stderr = None if stderr == CLOSED else sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.update(env)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.argv = ["int8cli", *args]
    code = 1
    try:
        from int8cli.cli import main

        main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # taking torch down in order would take a second


def _connect(descriptor: int, path: str) -> None:
    """Make a standard descriptor write to a file, or to nothing as CLOSED and UNREAD say."""
    if path == CLOSED:
        os.close(descriptor)
        return
    if path == UNREAD:
        reader, opened = os.pipe()
        os.close(reader)
    else:
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, descriptor)
    os.close(opened)


if __name__ == "__main__":
    _serve()
