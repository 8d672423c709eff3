"""Commands that the machines disturb, each on a tiny checkpoint, and what an undisturbed run of each leaves.

Owns the sources and what is compared: every file and empty directory below the directory of the run, and standard
output. Each run has a directory of its own, in which `out`, `work` and `hf` (the Hub's cache) come to be.
"""

import atexit
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from support.calibration_models import make_model, some_text
from support.hub_stand_in import HubStandIn
from support.program import llama, tree, write_json

from torture import mounts
from torture.launcher import Ended, Launcher, launched
from torture.scratch import scratch_directory
from torture.tracing import Blow, Watch

REPOSITORY = "org/model"
_COPIED_BYTES = 20_000


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command. `SOURCE` in `args` stands for the checkpoint's path or repository, `TEXT` for a file of words.

    `source` names how the checkpoint is made, or where it is published. `before` runs first, undisturbed. `every`: how
    often it is drawn. `writes`: it changes files. `judges`: exit code 1 without an error is an answer of it.
    `to_a_store`: it also writes to `store`, through fsspec, where nothing is whole before its config.json is.
    """

    name: str
    args: tuple[str, ...]
    source: str = "safetensors"
    before: tuple[str, ...] = ()
    every: int = 4
    writes: bool = True
    judges: bool = False
    to_a_store: bool = False


_CONVERT = ("convert", "SOURCE", "-o", "out", "--json")
_BRIEF = ("--text", "TEXT", "--tokens", "48")
_TO_A_STORE = ("--retry-for", "1", "--push-to")
_CONVERTED = ("convert", "SOURCE", "-o", "out", "-q", "--outliers", "weights")

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("plain", (*_CONVERT, "--outliers", "none")),
    Scenario("weights", (*_CONVERT, "--outliers", "weights")),
    Scenario("activations", (*_CONVERT, "--outliers", "activations", *_BRIEF), source="runnable"),
    Scenario("bin", (*_CONVERT, "--outliers", "none"), source="bin"),
    Scenario("bin weights", (*_CONVERT, "--outliers", "weights"), source="bin", every=2),
    Scenario(
        "overwrite",
        (*_CONVERT, "--outliers", "none", "--overwrite"),
        before=("convert", "SOURCE", "-o", "out", "-q", "--outliers", "weights", "--threshold", "5"),
    ),
    Scenario("compressed-tensors", (*_CONVERT, "--outliers", "weights", "--layout", "compressed-tensors"), every=2),
    Scenario("hub", (*_CONVERT, "--outliers", "none"), source="hub"),
    Scenario("hub weights", (*_CONVERT, "--outliers", "weights"), source="hub", every=2),
    Scenario("hub keep", (*_CONVERT, "--outliers", "none", "--keep-source"), source="hub", every=2),
    Scenario("hub activations", (*_CONVERT, "--outliers", "activations", *_BRIEF), source="hub runnable", every=2),
    Scenario("from a store", (*_CONVERT, "--outliers", "none"), source="store"),
    Scenario(
        "evaluate",
        ("evaluate", "SOURCE", "--json", "--work-dir", "work", *_BRIEF),
        source="runnable",
        every=2,
    ),
    Scenario(
        "inspect-outliers",
        ("inspect-outliers", "SOURCE", "-o", "found.safetensors", "--json", "--work-dir", "work", *_BRIEF),
        source="runnable",
        every=2,
    ),
    Scenario(
        "dequantize",
        ("dequantize", "out", "-o", "back", "-q"),
        before=_CONVERTED,
        every=2,
    ),
    Scenario("report", ("report", "out", "--json", "-o", "found.html", "-o", "found.svg"), before=_CONVERTED, every=1),
    Scenario(
        "evaluate to a page",
        ("evaluate", "SOURCE", "--json", "-o", "found.html", *_BRIEF),
        source="runnable",
        every=1,
    ),
    Scenario("status", ("status", "out", "--json"), before=_CONVERTED, writes=False, every=1),
    Scenario("estimate", ("estimate-memory", "SOURCE", "--json"), writes=False, every=1),
    Scenario("estimate hub", ("estimate-memory", "SOURCE", "--json"), source="hub", writes=False, every=1),
    Scenario(
        "verify",
        ("verify", "out", "--json"),
        source="runnable",
        before=_CONVERTED,
        writes=False,
        judges=True,
        every=1,
    ),
    Scenario(
        "verify with source",
        ("verify", "out", "--source", "SOURCE", "--json"),
        before=_CONVERTED,
        writes=False,
        judges=True,
        every=1,
    ),
    Scenario(
        "generate",
        ("generate", "out", "Hello", "--max-new-tokens", "4", "-q"),
        source="runnable",
        before=_CONVERTED,
        writes=False,
        every=1,
    ),
    Scenario(
        "stream to a store",
        (*_CONVERT, "--outliers", "weights", *_TO_A_STORE, "local://store", "--no-keep-output"),
        every=2,
        to_a_store=True,
    ),
    Scenario(
        "push to a store",
        ("push", "out", "local://store", "--retry-for", "1", "-q"),
        before=_CONVERTED,
        every=1,
        to_a_store=True,
    ),
    Scenario("two workers", (*_CONVERT, "--outliers", "weights", "--workers", "2"), every=1),
)

WRITING = tuple(each for each in SCENARIOS if each.writes)


@dataclass
class Bench:
    """Where scenarios run: a launcher, a Hub, and sources that are made when they are first wanted."""

    scratch: Path
    launcher: Launcher
    hub: HubStandIn
    _references: dict[str, "Reference"] = field(default_factory=dict)
    _count: int = 0

    def reference(self, scenario: Scenario) -> "Reference":
        if scenario.name not in self._references:
            self._references[scenario.name] = Reference(self, scenario)
        return self._references[scenario.name]

    def new_directory(self) -> Path:
        self._count += 1
        directory = self.scratch / "runs" / str(self._count)
        directory.mkdir(parents=True)
        return directory

    def run(
        self,
        scenario: Scenario,
        cwd: Path,
        watch: Watch | None = None,
        blows: tuple[Blow, ...] = (),
        *,
        first: bool = False,
        stdout: str = "",
        stderr: str = "",
    ) -> Ended:
        """Run the command in a directory; `first`: what comes before it. Streams as in `launcher.Request`."""
        args, env = self.words(scenario, first=first), self.environment(cwd)
        return self.launcher.run(*args, cwd=cwd, env=env, watch=watch, blows=blows, stdout=stdout, stderr=stderr)

    def words(self, scenario: Scenario, *, first: bool = False) -> list[str]:
        """The command's words; what they name is there from now on."""
        source = self._address(scenario.source)
        words = scenario.before if first else scenario.args
        return [{"SOURCE": source, "TEXT": str(self._text)}.get(word, word) for word in words]

    def _address(self, kind: str) -> str:
        if kind.startswith("hub"):
            self.hub.add_repo(REPOSITORY, self._source(kind))
            return REPOSITORY
        path = str(self._source(kind))
        return f"local://{path}" if kind == "store" else path

    def environment(self, cwd: Path) -> dict[str, str]:
        return {"HF_HUB_CACHE": str(cwd / "hf"), "HF_ENDPOINT": self.hub.endpoint}

    def watch(self, scenario: Scenario, cwd: Path, names: frozenset[str], *, changing: bool = False) -> Watch:
        """What the command reads and writes: its directory and, unless `changing`, the source and the Hub."""
        roots = [str(cwd)]
        if not changing:
            roots += [] if scenario.source.startswith("hub") else [str(self._source(scenario.source))]
        return Watch(names, tuple(roots), sockets=not changing and scenario.source.startswith("hub"), changing=changing)

    @cached_property
    def _text(self) -> Path:
        path = self.scratch / "words.txt"
        path.write_text(some_text().text)
        return path

    def _source(self, kind: str) -> Path:
        kind = _PUBLISHED.get(kind, kind)
        directory = self.scratch / "sources" / kind / "model"
        if not directory.exists():
            _MAKERS[kind](directory)
        return directory


class Reference:
    """What an undisturbed run of a scenario leaves, and how many calls it makes."""

    def __init__(self, bench: Bench, scenario: Scenario) -> None:
        self._bench, self._scenario = bench, scenario
        directory = bench.new_directory()
        self.prepare(directory)
        ended = bench.run(scenario, directory)
        if ended.code != 0:
            raise RuntimeError(f"{scenario.name}, undisturbed: exit {ended.code}: {ended.err[-1000:]}")
        self.stdout, self.files = without_times(ended.out), _compared(directory)
        shutil.rmtree(directory)
        self._calls: dict[tuple[frozenset[str], bool], tuple[str, ...]] = {}

    def prepare(self, directory: Path) -> None:
        """Bring a new directory to where the command begins."""
        if self._scenario.before:
            ended = self._bench.run(self._scenario, directory, first=True)
            if ended.code != 0:
                raise RuntimeError(f"before {self._scenario.name}: exit {ended.code}: {ended.err[-1000:]}")

    def calls(self, names: frozenset[str], *, changing: bool = False) -> tuple[str, ...]:
        """The watched calls of an undisturbed run, in order."""
        key = (names, changing)
        if key not in self._calls:
            directory = self._bench.new_directory()
            self.prepare(directory)
            watch = self._bench.watch(self._scenario, directory, names, changing=changing)
            self._calls[key] = self._bench.run(self._scenario, directory, watch).traced.calls
            shutil.rmtree(directory)
        return self._calls[key]

    def difference(self, directory: Path, ended: Ended) -> str:
        """How a finished run differs from the undisturbed one; empty if in nothing."""
        if ended.code != 0:
            return f"exit {ended.code}: {ended.err.strip()[-300:]}"
        if without_times(ended.out) != self.stdout:
            return f"another standard output: {ended.out[:200]!r}"
        return self.file_difference(directory)

    def file_difference(self, directory: Path) -> str:
        return _first_difference(_compared(directory), self.files)

    def not_whole(self, directory: Path) -> str:
        """A file under a final name that is not what an undisturbed run puts there; empty if there is none."""
        before = set(self._scenario.before)
        found = _compared(directory)
        unfinished = found.get(_LAST_IN_A_STORE) != self.files.get(_LAST_IN_A_STORE)
        for name, data in found.items():
            aside = "/." in f"/{name}" or name.endswith("/") or name.startswith(("work/", *_ASIDE))
            may_differ = unfinished if name.startswith("store/") else before
            whole = self.files.get(name, self.files.get(name.replace("out/", "store/", 1)))
            if not aside and not may_differ and whole != data:
                return f"{name} is not whole ({len(data):,} bytes)"
        return ""

    def difference_but_for_leftovers(self, directory: Path) -> str:
        """As `file_difference`, where what could not be removed is no matter."""
        found = {name: data for name, data in _compared(directory).items() if not _is_left(name)}
        return _first_difference(found, {name: data for name, data in self.files.items() if not _is_left(name)})


def without_times(out: str) -> str:
    """A JSON document as text, but for how long it took."""
    return re.sub(r'"seconds": [0-9.e-]+', '"seconds": 0', out)


_OF_TIMES = "out/int8/uploads/"
_LAST_IN_A_STORE = "store/config.json"
_ASIDE = ("out/int8/partial/", "out/int8/incoming/", "out/int8/calibration")


def _is_left(name: str) -> bool:
    return name.endswith("/") or name.startswith(("work/", *_ASIDE)) or "/." in name


def _compared(directory: Path) -> dict[str, bytes]:
    """All files of a run, and those blobs of the Hub's cache that are whole; not what a store says of times."""
    found = tree(directory).items()
    return {name: data for name, data in found if not name.startswith(_OF_TIMES) and _is_kept(name)}


def _is_kept(name: str) -> bool:
    return not name.startswith("hf/") or _is_blob(name)


def _is_blob(name: str) -> bool:
    return "/blobs/" in name and not name.endswith((".incomplete", "/"))


def _first_difference(found: Mapping[str, bytes], right: Mapping[str, bytes]) -> str:
    if missing := right.keys() - found.keys():
        return f"{min(missing)} is missing"
    if more := found.keys() - right.keys():
        return f"{min(more)} is left over"
    if other := [name for name in right if found[name] != right[name]]:
        return f"{other[0]} differs"
    return ""


@cache
def shared_bench() -> Bench:
    """One for all machines of this process: to start the launcher takes longer than twenty runs. Closed at exit."""
    stack = ExitStack()
    atexit.register(stack.close)
    with suppress(OSError):  # without the right to do so; then the machine that mounts says that it cannot
        mounts.make_private()
    scratch = stack.enter_context(scratch_directory())
    hub = stack.enter_context(HubStandIn())
    return Bench(scratch, stack.enter_context(launched(scratch, hub.endpoint)), hub)


# Sources


def _safetensors(directory: Path) -> None:
    llama(directory, layers=1, shards=2)
    (directory / "notes").mkdir()
    (directory / "notes/long.txt").write_text("words\n" * (_COPIED_BYTES // 6))


def _runnable(directory: Path) -> None:
    make_model("llama", directory, max_shard_size="30KB")


def _bin(directory: Path) -> None:
    from safetensors.torch import load_file

    llama(directory, layers=1, shards=2)
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for shard in sorted(directory.glob("*.safetensors")):
        torch.save(load_file(shard), directory / _bin_name(shard.name))
        shard.unlink()
    index.unlink()
    renamed = {tensor: _bin_name(file) for tensor, file in weight_map.items()}
    write_json(directory / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": renamed})


def _bin_name(file: str) -> str:
    return file.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")


# What is published on a Hub or in a store: how it is made.
_PUBLISHED = {"hub": "safetensors", "hub runnable": "runnable", "store": "safetensors"}
_MAKERS: dict[str, Callable[[Path], None]] = {
    "safetensors": _safetensors,
    "runnable": _runnable,
    "bin": _bin,
}
