"""Runs of the program by the hundred: each a fork of an interpreter that has imported it already, traced where wanted.

Owns that interpreter, a process of its own, which is also the tracer of what it forks.
"""

import importlib
import os
import pickle
import pkgutil
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torture import kernel
from torture.tracing import Blow, Traced, Tracer, Watch

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 120.0  # what ends no run that is going on, on a machine that has much else to do
_USED_LATER = (
    *("transformers.models.llama.modeling_llama", "transformers.models.llama.configuration_llama"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "accelerate"),
    *("transformers.tokenization_utils_tokenizers", "huggingface_hub.file_download", "huggingface_hub.hf_api", "httpx"),
    *(
        "huggingface_hub.repocard_data",
        "typer._adapters",
        "pydantic",
        "zoneinfo",
        "encodings.idna",
        "torch._dynamo",
        "torch.distributed",
        "rich.progress",
        "rich.markdown",
    ),
)


@dataclass(frozen=True, slots=True)
class Request:
    """A run of the program: its arguments, where, changes to the environment, and how it is traced, if it is.

    `stdout` and `stderr`: a path, CLOSED, or UNREAD; by default files whose text is in the answer.
    """

    args: tuple[str, ...]
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict)
    watch: Watch | None = None
    blows: Sequence[Blow] = ()
    limit_s: float = _LIMIT_S
    stdout: str = ""
    stderr: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended. `traced.code` is None where it did not."""

    traced: Traced
    out: str
    err: str

    @property
    def code(self) -> int | None:
        return self.traced.code

    def complaint(self, codes: Collection[int] = (0, 1), *, judges: bool = False) -> str:
        """What is wrong with the end itself, whatever the files are; empty if nothing is.

        `judges`: with exit code 1, a judgement on standard output is as good as an error.
        """
        if self.code is None:
            return f"did not end within {_LIMIT_S:.0f} s"
        if "Traceback (most recent call last)" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1][:200]}"
        if self.code not in codes:
            return f"exit {self.code}: {self.err.strip()[-200:]}"
        if self.code == 1 and judges and '"holds": false' in self.out:
            return ""
        if self.code == 1 and self.err.count("error: ") != 1:
            return f"{self.err.count('error: ')} error lines: {self.err.strip()[-300:]}"
        if self.code == 1 and "hint: " not in self.err:
            return f"no hint: {self.err.strip()[-200:]}"
        return ""


class Launcher:
    """Starts the interpreter; `run` does one run after another."""

    def __init__(self, scratch: Path, endpoint: str) -> None:
        self._scratch = scratch
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the launcher
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from torture.launcher import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=scratch,
            env=_environment(scratch, endpoint),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def run(
        self,
        *args: str | Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        watch: Watch | None = None,
        blows: Sequence[Blow] = (),
        stdout: str = "",
        stderr: str = "",
    ) -> Ended:
        request = Request(tuple(map(str, args)), str(cwd), env or {}, watch, tuple(blows), stdout=stdout, stderr=stderr)
        pickle.dump(request, self._requests)
        self._requests.flush()
        ready, _, _ = select.select([self._answers], [], [], 3 * request.limit_s)
        if not ready:
            raise RuntimeError(f"no answer to {request}")
        try:
            # The answer is from a child of this process.
            ended: Ended = pickle.load(self._answers)  # nosec B301
        except EOFError:
            self._errors.seek(0)
            raise RuntimeError(self._errors.read().decode(errors="replace")[-2000:]) from None
        return ended

    def close(self) -> None:
        self._requests.close()
        self._process.wait(_LIMIT_S)
        self._answers.close()
        self._errors.close()


@contextmanager
def launched(scratch: Path, endpoint: str = "") -> Iterator[Launcher]:
    """`endpoint`: that of the Hub, which its client takes down when it is imported."""
    launcher = Launcher(scratch, endpoint)
    try:
        yield launcher
    finally:
        launcher.close()


def _environment(scratch: Path, endpoint: str) -> dict[str, str]:
    """This process's without what tells of a Hub or a cache of the user, and with the project on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    path = (
        os.pathsep.join(str(ROOT / part) for part in ("", "scripts", "tests"))
        + os.pathsep
        + os.environ.get("PYTHONPATH", "")
    )
    own = {"PYTHONPATH": path, "HF_HOME": str(scratch / "hf"), "XDG_CACHE_HOME": str(scratch / "cache")}
    return {
        **kept,
        **own,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "NO_COLOR": "1",
    }


# In the interpreter that forks


def serve() -> None:
    import gc

    import int8cli

    for module in pkgutil.walk_packages(int8cli.__path__, "int8cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in _USED_LATER:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # another version has it elsewhere: it is imported when it is used
    gc.freeze()
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    while True:
        try:
            # The request is from the parent of this process.
            request = pickle.load(requests)  # nosec B301
        except EOFError:
            return
        pickle.dump(_run(request), answers)
        answers.flush()


def _run(request: Request) -> Ended:
    with tempfile.TemporaryDirectory() as scratch:
        stdout, stderr = Path(scratch, "out"), Path(scratch, "err")
        stdout.touch()
        stderr.touch()
        waiting, release = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(release)
            os.read(waiting, 1)
            os.close(waiting)
            _become_the_program(request, request.stdout or str(stdout), request.stderr or str(stderr))
        os.close(waiting)
        watch = request.watch or Watch(frozenset(), ())
        traced = Tracer(pid, watch, request.blows, request.limit_s).follow(lambda: os.close(release))
        out, err = (path.read_text(errors="replace") for path in (stdout, stderr))
        return Ended(traced, out, err)


def _become_the_program(request: Request, stdout: str, stderr: str) -> None:
    from huggingface_hub import constants
    from support.program import become_the_program

    constants.HF_HUB_CACHE = request.env.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    try:
        _quick_retries()
        if request.watch is not None:
            kernel.stop_at_calls(sorted(kernel.CALLS[name] for name in request.watch.names))
    except BaseException:
        Path(stderr).write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(70)
    streams = (os.devnull, stdout, stderr)
    become_the_program(list(request.args), request.cwd, dict(request.env), streams, None)


def _quick_retries() -> None:
    """Pauses between attempts are short, whatever a server asks for, and attempts are few."""
    from int8cli.checkpoint.hub import retries

    asked = retries.asked_pause_s

    def short(policy: retries.RetryPolicy, failures: int) -> float:
        return 0.001

    def after_some(policy: retries.RetryPolicy, failures: int, failing_for_s: float) -> bool:
        return failures >= policy.attempts

    setattr(retries.RetryPolicy, "pause_s", short)  # noqa: B010
    setattr(retries.RetryPolicy, "gives_up", after_some)  # noqa: B010
    retries.asked_pause_s = lambda error: None if (pause_s := asked(error)) is None else min(pause_s, 0.01)
