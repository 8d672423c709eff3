"""The benchmark: real checkpoints, commands in turn, and a reason for everything that is left out."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import WITHOUT_COLUMNS, read_all

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from benchmarking.cases import COLD_CONVERT, CONVERT, COPY, IMPORT_TORCH, INSPECT, NO_FIGURES, READ_SOURCE, Section
from benchmarking.checkpoint import bloom, llama, write_checkpoint
from benchmarking.peers import InstallError, Peer, installed
from benchmarking.tables import against_copy, growth, peers
from benchmarking.turns import Case, Run, measure, size_of, take_turns

from int8cli import convert

MEGABYTE = 1_000_000


@pytest.mark.parametrize(("model", "layers"), [(bloom, 4), (llama, 7)])
def test_a_checkpoint_is_a_model_that_converts(model, layers: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", model(0.004))
    convert(tmp_path / "source", tmp_path / "int8", WITHOUT_COLUMNS)
    assert sum(name.endswith(".SCB") for name in read_all(tmp_path / "int8")) == layers
    weights = next(w for name, w in read_all(tmp_path / "source").items() if w.dim() == 2 and "embed" not in name)
    assert weights.float().std().item() == pytest.approx(0.02, rel=0.02)


def test_checkpoints_have_the_requested_size_and_blocks_no_wider_than_the_originals() -> None:
    for gigabytes, hidden, blocks in [(4.93, 14336, 1), (8, 12928, 2), (9.87, 14336, 2), (1, 6400, 1)]:
        config = bloom(gigabytes).config
        assert (config["hidden_size"], config["n_layer"]) == (hidden, blocks)
        assert 24 * hidden**2 * blocks == pytest.approx(gigabytes * 1e9, rel=0.03)
    config = llama(2).config
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (4096, 11008, 5)


def case(name: str, script: str, tmp_path: Path, **options) -> Case:
    (tmp_path / "source").mkdir(exist_ok=True)
    return Case(name, ("sh", "-c", script), tmp_path / "source", tmp_path / "log", **options)


def test_cases_take_turns_and_each_starts_without_its_output(tmp_path: Path) -> None:
    journal, output = tmp_path / "journal", tmp_path / "out"
    cases = [
        case(
            name, f"mkdir {output} && echo {name} >> {journal} && echo written > {output}/file", tmp_path, output=output
        )
        for name in "ab"
    ]
    runs, failures = take_turns(cases, 3)
    assert journal.read_text().split() == ["a", "b"] * 3
    assert failures == {}
    assert [run.output_bytes for run in runs["a"]] == [len("written\n")] * 3
    assert not output.exists()


def test_the_start_time_of_a_process_is_shown_separately(tmp_path: Path) -> None:
    start = case("", "sleep 0.3", tmp_path)
    runs, _ = take_turns([case("a", "sleep 0.5", tmp_path, start=start)], 1)
    (run,) = runs["a"]
    assert run.seconds >= 0.5
    assert run.start_s >= 0.3
    assert run.apart_s == run.seconds - run.start_s


def test_peak_memory_and_cpu_time_are_those_of_the_command(tmp_path: Path) -> None:
    script = "held = b'x' * 300_000_000\nfor _ in range(3_000_000): pass"
    command = Case("a", (sys.executable, "-c", script), tmp_path, tmp_path.parent / "log")
    (run,) = take_turns([command], 1)[0]["a"]
    assert run.peak_bytes > 300 * MEGABYTE
    assert run.cpu_s > 0.03


def test_a_failing_case_is_left_out_with_its_last_output(tmp_path: Path) -> None:
    failing = case("bad", f"echo tried >> {tmp_path}/tries; echo no such thing >&2; exit 3", tmp_path)
    runs, failures = take_turns([failing, case("good", "true", tmp_path)], 2)
    assert failures == {"bad": "ended with 3: no such thing"}
    assert list(runs) == ["good"]
    assert len(runs["good"]) == 2
    assert (tmp_path / "tries").read_text() == "tried\n"


def test_a_peer_that_cannot_be_installed_is_left_out_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(InstallError, match="cannot be installed: Error: "):
        installed(Peer("nobody", "nobody.py", ()), tmp_path / "a file")


# Tables


def runs(*seconds: float, start_s: float = 0.0, peak: int = 200) -> list[Run]:
    return [Run(value, value / 2, peak * MEGABYTE, 0, 500 * MEGABYTE, start_s, start_s / 4) for value in seconds]


def row(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_ratios_are_medians_of_the_ratios_of_each_turn() -> None:
    taken = {
        IMPORT_TORCH: runs(1, 1, 1),
        COPY: runs(1, 2, 4),
        CONVERT: runs(4, 5, 6, start_s=2, peak=250),
        NO_FIGURES: runs(3, 4, 5, start_s=2, peak=240),
        READ_SOURCE: runs(1, 1, 1),
        INSPECT: runs(3, 3, 3, start_s=1, peak=210),
    }
    table = against_copy(Section({"": 10**9}, taken, {COLD_CONVERT: "no disk"}, {}))
    assert row(table, f"`{CONVERT}`")[1:] == ["5.00", "3.00", "2.50 × cp", "1.50 × cp", "2.50", "2.00", "50 MB"]
    assert row(table, f"`{NO_FIGURES}`")[1:] == ["4.00", "2.00", "2.00 × cp", "1.00 × cp", "2.00", "1.50", "40 MB"]
    assert row(table, f"`{INSPECT}`")[1:] == ["3.00", "2.00", "3.00 × cat", "2.00 × cat", "1.50", "1.25", "10 MB"]
    assert row(table, f"`{COPY}`")[1:] == ["2.00", "", "", "", "1.00", "", ""]
    assert f"Left out: {COLD_CONVERT}: no disk." in table


def test_peers_are_compared_without_their_start_times() -> None:
    taken = {
        IMPORT_TORCH: runs(1),
        COPY: runs(1),
        CONVERT: runs(3, start_s=2),
        NO_FIGURES: runs(2.5, start_s=2),
        "other": runs(25, start_s=5, peak=900),
    }
    table = peers(Section({"": 10**9}, taken, {}, {"other": "other 1.0"}))
    assert row(table, "other")[1:] == ["25.00", "20.00", "20.0", "40.0", "12.50", "11.25", "900 MB", "0.50 GB"]
    assert row(table, f"`{CONVERT}`")[3:5] == ["1.0", "2.0"]
    assert row(table, f"`{NO_FIGURES}`")[3:5] == ["0.5", "1.0"]
    assert row(table, f"`{COPY}`")[3:5] == ["", ""]
    assert "`--no-figures` leaves that out as the other converters do" in table


def test_growth_has_one_row_per_size() -> None:
    taken = {IMPORT_TORCH: runs(1), "1": runs(3, start_s=2, peak=240), "10": runs(12, start_s=2, peak=241)}
    table = growth(Section({"1": 10**9, "10": 10**10}, taken, {}, {}))
    assert row(table, "1.00 GB")[1:] == ["3.00", "1.00", "1.00", "1.50", "1.00", "40 MB"]
    assert row(table, "10.00 GB")[1:] == ["12.00", "10.00", "1.00", "6.00", "5.50", "41 MB"]


def test_sizes_are_of_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_bytes(bytes(3))
    (tmp_path / "in/b").write_bytes(bytes(4))
    assert size_of(tmp_path) == 7


def test_processes_that_a_command_does_not_wait_for_count_too(tmp_path: Path) -> None:
    burn = "import time; a = bytearray(50 << 20); t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
    case = Case("orphan", (sys.executable, "-c", program), reads=tmp_path, log=tmp_path / "log")
    bystander = subprocess.Popen(["sleep", "100"])
    try:
        run = measure(case)
    finally:
        bystander.kill()
        bystander.wait()
    assert run.cpu_s > 0.3
    assert run.peak_bytes > 50 << 20
