"""The checkpoints of the benchmark, and the commands that run on them in turn."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarking.peers import PEERS, PROGRAMS, InstallError, installed, versions
from benchmarking.turns import Case, CaseFailedError, Run, size_of, take_turns

IMPORT_TORCH = "import torch"
COPY, COLD_COPY = "cp -r, sync", "cp -r, sync, cold"
# With the full report, but without stored columns, because cp and other converters do nothing similar.
CONVERT, COLD_CONVERT = "int8cli convert --outliers none", "int8cli convert --outliers none, cold"
NO_FIGURES = "int8cli convert --outliers none --no-figures"
STORE_COLUMNS = "int8cli convert --outliers weights"
READ_SOURCE, INSPECT = "cat of the source", "int8cli inspect-outliers --from weights"
READ_OUTPUT, VERIFY = "cat of the output", "int8cli verify"
NEXT_TO_NOTHING = 1e-4  # GB: one block, 128 wide
HUB_OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Section:
    """The runs of each case on sources of `source_bytes`, the reasons for cases left out, and versions of peers."""

    source_bytes: dict[str, int]
    runs: dict[str, list[Run]]
    left_out: dict[str, str]
    versions: dict[str, str]


class Bench:
    """Makes checkpoints in `scratch`, and runs commands on them, each `runs` times."""

    def __init__(self, scratch: Path, runs: int) -> None:
        self._scratch, self._runs = scratch, runs
        self._log = scratch / "log"

    def against_copy(self, gigabytes: float) -> Section:
        """Compare convert with cp, warm and cold, and inspect-outliers and verify with cat of the files they read."""
        source, tiny = self._checkpoint("bloom", gigabytes), self._checkpoint("bloom", NEXT_TO_NOTHING)
        int8, tiny_int8 = self._scratch / "int8", self._scratch / "tiny-int8"
        from_weights = ("inspect-outliers", "--from", "weights", "--quiet")
        cases = [
            self._importing_torch(tiny),
            self._copying(COPY, source),
            self._converting(CONVERT, source, tiny, int8),
            self._converting(NO_FIGURES, source, tiny, self._scratch / "no-figures", options=("--no-figures",)),
            self._converting(STORE_COLUMNS, source, tiny, self._scratch / "columns", outliers="weights"),
            self._reading(READ_SOURCE, source),
            self._int8cli(INSPECT, (*from_weights, str(source)), source, (*from_weights, str(tiny)), tiny),
            self._reading(READ_OUTPUT, int8),
            self._int8cli(
                VERIFY, ("verify", "--quiet", str(int8)), int8, ("verify", "--quiet", str(tiny_int8)), tiny_int8
            ),
            self._copying(COLD_COPY, source, cold=True),
            self._converting(COLD_CONVERT, source, tiny, int8, cold=True),
        ]
        return self._measured(cases, source)

    def against_peers(self, gigabytes: float, environments: Path) -> Section:
        """Compare convert with other converters, used as intended without a GPU."""
        source, tiny = self._checkpoint("llama", gigabytes), self._checkpoint("llama", NEXT_TO_NOTHING)
        output = self._scratch / "peer"
        cases = [
            self._importing_torch(tiny),
            self._copying(COPY, source),
            self._converting(CONVERT, source, tiny, self._scratch / "int8"),
            self._converting(NO_FIGURES, source, tiny, self._scratch / "no-figures", options=("--no-figures",)),
        ]
        left_out, known = {}, {}
        for peer in PEERS:
            try:
                python = installed(peer, environments)
            except InstallError as error:
                left_out[peer.name] = str(error)
                continue
            known[peer.name] = versions(peer, python)
            program = (str(python), str(PROGRAMS / peer.program))
            start = Case("", (*program, str(tiny), str(output)), tiny, self._log, output, environment=HUB_OFFLINE)
            command = (*program, str(source), str(output))
            cases.append(Case(peer.name, command, source, self._log, output, start=start, environment=HUB_OFFLINE))
        measured = self._measured(cases, source)
        return Section(measured.source_bytes, measured.runs, left_out | measured.left_out, known)

    def growth(self, sizes: Sequence[float]) -> Section:
        """Run convert at each size, all sizes in turn."""
        tiny = self._checkpoint("bloom", NEXT_TO_NOTHING)
        sources = {f"{gigabytes:g}": self._checkpoint("bloom", gigabytes) for gigabytes in sizes}
        output = self._scratch / "grown"
        cases = [self._converting(name, source, tiny, output) for name, source in sources.items()]
        runs, left_out = take_turns([self._importing_torch(tiny), *cases], self._runs)
        return Section({name: size_of(source) for name, source in sources.items()}, runs, left_out, {})

    def _measured(self, cases: Sequence[Case], source: Path) -> Section:
        runs, left_out = take_turns(cases, self._runs)
        source_bytes = size_of(source)
        for name in (IMPORT_TORCH, COPY, CONVERT, NO_FIGURES):  # the tables need these
            if name in left_out:
                raise CaseFailedError(f"{name} {left_out[name]}")
        for case in cases:
            taken = runs.get(case.name, [])
            if case.cold and min((run.disk_bytes for run in taken), default=0) < 0.9 * source_bytes:
                left_out.setdefault(case.name, "this machine does not evict files from its page cache")
                runs.pop(case.name, None)
        return Section({"": source_bytes}, runs, left_out, {})

    def _checkpoint(self, model: str, gigabytes: float) -> Path:
        """Write a checkpoint if it does not exist, in a separate process, so that its memory is not measured."""
        directory = self._scratch / f"{model}-{gigabytes:g}"
        if not directory.exists():
            program = str(Path(__file__).with_name("checkpoint.py"))
            subprocess.run([sys.executable, program, model, str(directory), "--gigabytes", str(gigabytes)], check=True)
        return directory

    def _importing_torch(self, reads: Path) -> Case:
        return Case(IMPORT_TORCH, (sys.executable, "-c", "import torch"), reads, self._log)

    def _copying(self, name: str, source: Path, *, cold: bool = False) -> Case:
        copy = self._scratch / "copy"
        return Case(name, ("cp", "-r", str(source), str(copy)), source, self._log, copy, cold=cold)

    def _reading(self, name: str, directory: Path) -> Case:
        script = 'find "$0" -type f -exec cat {} + > /dev/null'
        return Case(name, ("sh", "-c", script, str(directory)), directory, self._log)

    def _converting(
        self,
        name: str,
        source: Path,
        tiny: Path,
        output: Path,
        *,
        outliers: str = "none",
        options: tuple[str, ...] = (),
        cold: bool = False,
    ) -> Case:
        tiny_output = self._scratch / "tiny-int8"
        command = (sys.executable, "-m", "int8cli", "convert", "--quiet", "--outliers", outliers, *options, "--output")
        start = Case("", (*command, str(tiny_output), str(tiny)), tiny, self._log, tiny_output, keeps=True)
        on_source = (*command, str(output), str(source))
        return Case(name, on_source, source, self._log, output, keeps=True, cold=cold, start=start)

    def _int8cli(
        self, name: str, arguments: tuple[str, ...], reads: Path, on_tiny: tuple[str, ...], tiny: Path
    ) -> Case:
        program = (sys.executable, "-m", "int8cli")
        start = Case("", (*program, *on_tiny), tiny, self._log)
        return Case(name, (*program, *arguments), reads, self._log, start=start)
