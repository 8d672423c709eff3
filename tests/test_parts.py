"""Several processes convert one checkpoint into one directory, each a part of its shards."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.calibration_models import make_model, some_text
from support.program import Child, Nursery, llama, outcome_of, start, tree, wait_until
from support.progress import CoherentProgress

from int8cli import ConvertOptions, InspectOptions, convert, inspect_outliers, plan_conversion, status
from int8cli.checkpoint import writer
from int8cli.checkpoint.own_files import create_file
from int8cli.checkpoint.writer import new_file, write_file
from int8cli.commands import in_parts
from int8cli.conversion.finish import write_conclusion
from int8cli.errors import (
    CannotRunInPartsError,
    DestinationError,
    DiskSpaceError,
    OptionError,
    OutputError,
    OutputInUseError,
    SettingsMismatchError,
    UnfinishedPartsError,
    VersionMismatchError,
)
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.statistics_file import save_statistics
from int8cli.planning.share import Share
from int8cli.records import store
from int8cli.records.part import PartRecord

NONE = ConvertOptions(outliers="none")
SHARDS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of six shards, and what one process makes of it in `one`."""
    root = tmp_path_factory.mktemp("parts")
    llama(root / "model", shards=SHARDS)
    convert(root / "model", root / "one", NONE)
    return root


def part(number: int, parts: int, options: ConvertOptions = NONE) -> ConvertOptions:
    return replace(options, part=(number, parts))


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


# The division


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 8))
def test_every_shard_is_in_one_part(sizes: list[int], parts: int) -> None:
    named = {f"{place:02}": size for place, size in enumerate(sizes)}
    shares = [Share(number, parts).of(named) for number in range(1, parts + 1)]
    assert sorted(name for share in shares for name in share) == sorted(named)
    assert all(list(share) == sorted(share) for share in shares)
    loads = [sum(named[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_any_number_of_parts_is_divided_at_once() -> None:
    sizes = dict.fromkeys("abcde", 5)
    assert [Share(number, 2**62).of(sizes) for number in (1, 5, 6, 2**62)] == [("a",), ("e",), (), ()]


def test_shards_of_one_size_are_dealt_in_turn() -> None:
    assert Share(2, 3).of(dict.fromkeys("abcdefgh", 5)) == ("b", "e", "h")


# The same bytes as of one process


@pytest.mark.parametrize("outliers", ["none", "weights", "statistics"])
def test_parts_write_what_one_process_writes(outliers: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", max_shard_size="12KB")
    options = ConvertOptions(outliers=outliers)
    if outliers == "statistics":
        (tmp_path / "words.txt").write_text(some_text().text)
        inspected = InspectOptions(
            text=tmp_path / "words.txt", tokens=48, sequence_length=16, work_dir=tmp_path / "work"
        )
        statistics = inspect_outliers(model, inspected)
        assert isinstance(statistics, OutlierStatistics)
        save_statistics(statistics, tmp_path / "statistics.safetensors")
        options = ConvertOptions(outliers=tmp_path / "statistics.safetensors")
    convert(model, tmp_path / "one", options)
    shards = len(list(model.glob("*.safetensors")))
    assert shards > 3
    for number in (3, 1, 2):
        progress = CoherentProgress()
        result = convert(model, tmp_path / "parts", part(number, 3, options), progress=progress)
        assert progress.under_way() == []
        assert result.report.shards == (len(progress.outcomes) if result.missing else shards)
    assert result.missing == ()
    assert tree(tmp_path / "parts") == tree(tmp_path / "one")


def test_parts_that_end_at_the_same_time_all_succeed(root: Path, nursery: Nursery, tmp_path: Path) -> None:
    children = [start_part(nursery, root, tmp_path, number, 4) for number in (1, 2, 3, 4, 2, 4)]
    outcomes = [child.wait() for child in children]
    assert [outcome.code for outcome in outcomes] == [0] * 6, [outcome.err for outcome in outcomes]
    assert tree(tmp_path / "out") == tree(root / "one")


def start_part(nursery: Nursery, root: Path, directory: Path, number: int, parts: int) -> Child:
    options = ("--outliers", "none", "-q", "--part", f"{number}/{parts}")
    return nursery.start("convert", root / "model", "-o", "out", *options, cwd=directory)


@pytest.mark.parametrize("seed", range(3))
def test_killed_parts_and_another_number_of_parts(root: Path, nursery: Nursery, tmp_path: Path, seed: int) -> None:
    """Parts of three are killed at any time, and then there are four, with some of them twice."""
    chance = random.Random(seed)
    for child in [start_part(nursery, root, tmp_path, number, 3) for number in (1, 2, 3)]:
        wait_until(lambda: (tmp_path / "out/int8/parts").exists() or (tmp_path / "out/config.json").exists())
        time.sleep(chance.random() * 0.05)
        child.signal(signal.SIGKILL)
        child.wait()
    children = [start_part(nursery, root, tmp_path, number, 4) for number in (1, 3, 2, 3, 4)]
    assert [child.wait().code for child in children] == [0] * 5
    assert tree(tmp_path / "out") == tree(root / "one")


def test_what_a_killed_part_left_is_removed_by_the_next_one(root: Path, tmp_path: Path) -> None:
    """Its unfinished files go; the downloads of the same part are taken over."""
    output = tmp_path / "out"
    convert(root / "model", output, part(1, 2))
    record = PartRecord.here(2, 2, in_parts.__version__)
    dead = "0" * 16
    (output / "int8/parts" / f"{dead}.json").write_text(
        json.dumps({"schema": "int8cli.part/1", **{n: getattr(record, n) for n in record.__slots__}})
    )
    for place in ("partial", "incoming"):
        (output / "int8" / place / dead).mkdir(parents=True)
        (output / "int8" / place / dead / "file").write_text("half")
    convert(root / "model", output, part(1, 2))
    assert not list((output / "int8/partial").iterdir())
    assert (output / "int8/incoming" / dead / "file").exists()
    convert(root / "model", output, part(2, 2))
    assert tree(output) == tree(root / "one")


@pytest.mark.parametrize("name", ["..json", "...json", "link.json", "0.json"])
def test_no_name_of_a_part_leads_elsewhere(name: str, root: Path, tmp_path: Path) -> None:
    """A planted file that claims to be of a dead process here."""
    output = tmp_path / "out"
    convert(root / "model", output, part(1, 2))
    [known] = (output / "int8/parts").glob("*.json")
    (output / "int8/parts" / name).write_bytes(known.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    (output / "int8/partial/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/file").write_text("mine")
    convert(root / "model", output, part(1, 2))
    assert len(list((output / "int8/records").iterdir())) == SHARDS // 2
    assert (output / "int8/partial/link").is_symlink()
    assert (tmp_path / "elsewhere/file").exists()


def test_more_parts_than_shards(root: Path, tmp_path: Path) -> None:
    for number in range(1, SHARDS + 3):
        result = convert(root / "model", tmp_path / "out", part(number, SHARDS + 2))
    assert result.missing == ()
    assert tree(tmp_path / "out") == tree(root / "one")


def test_a_plain_run_goes_on_where_parts_stopped(root: Path, tmp_path: Path) -> None:
    convert(root / "model", tmp_path / "out", part(2, 3))
    convert(root / "model", tmp_path / "out", NONE)
    assert tree(tmp_path / "out") == tree(root / "one")


# Concluding


def test_finish_names_what_is_missing_and_concludes_what_is_not(root: Path, tmp_path: Path) -> None:
    output, finish = tmp_path / "out", replace(NONE, finish=True)
    result = convert(root / "model", output, part(1, 2))
    assert len(result.missing) == SHARDS // 2
    with pytest.raises(UnfinishedPartsError, match=f"^{SHARDS // 2} of {SHARDS} shards are not converted: model-") as e:
        convert(root / "model", output, finish)
    assert "again" in e.value.hint
    assert not (output / "config.json").exists()
    convert(root / "model", output, part(2, 2))
    for name in ("config.json", "int8/files.json", "README.md"):
        (output / name).unlink()
    assert convert(root / "model", output, finish).report.shards == SHARDS
    assert tree(output) == tree(root / "one")


@pytest.mark.parametrize("joined", ["before", "while it ends"])
def test_a_part_whose_files_others_finished_and_removed_succeeds(
    joined: str, root: Path, tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk without locks nobody knows who is the last: the other one removed what this one was writing.

    It removes first what processes say of themselves. One that joins after that is still said to be there.
    """
    no_locks(monkeypatch)
    output = tmp_path / "out"

    class WhileItConverts(CoherentProgress):
        def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
            super().advance(task, part, amount, detail)
            if amount and not (output / "config.json").exists():
                here = {path: path.read_bytes() for path in (output / "int8/parts").iterdir()}
                child = start_part(nursery, root, tmp_path, 1, 1)
                outcome = child.wait()
                assert outcome.code == 0, outcome.err
                if joined == "while it ends":
                    (output / "int8/parts").mkdir()
                    for path, data in here.items():
                        path.write_bytes(data)

    result = convert(root / "model", output, part(1, 2, replace(NONE, threads=1)), progress=WhileItConverts())
    assert result.missing == ()
    assert tree(output) == tree(root / "one")


def test_a_part_hands_on_what_others_converted_in_its_place(
    root: Path, tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one, which pushes nothing, has concluded, and removed what this one was writing."""
    no_locks(monkeypatch)
    output, there = tmp_path / "out", tmp_path / "there"
    ended: list[int] = []

    class WhileItConverts(CoherentProgress):
        def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
            super().advance(task, part, amount, detail)
            if amount and task == "convert" and not ended:
                ended.append(start_part(nursery, root, tmp_path, 1, 1).wait().code)

    options = replace(NONE, threads=1, push_to=f"local://{there}")
    result = convert(root / "model", output, part(1, 2, options), progress=WhileItConverts())
    assert (ended, result.missing) == ([0], ())
    mine = {path.stem for path in (output / "int8/uploads").iterdir()}
    assert mine == {path.stem for path in there.glob("*.safetensors")}
    assert len(mine) == SHARDS // 2
    convert(root / "model", output, replace(options, finish=True))
    assert {path.name for path in there.glob("*.safetensors")} == {path.name for path in output.glob("*.safetensors")}
    assert (there / "config.json").exists()


@pytest.mark.parametrize("options", [part(1, 1), replace(NONE, finish=True)], ids=["part", "finish"])
def test_a_destination_that_is_refused_is_an_error_although_all_is_converted(
    options: ConvertOptions, root: Path, tmp_path: Path
) -> None:
    """Nothing is written beside another model, and nobody is told that a part is uploaded."""
    output, there = tmp_path / "out", tmp_path / "there"
    convert(root / "model", output, part(1, 1))
    there.mkdir()
    (there / "pytorch_model.bin").write_bytes(b"another model")
    for keep_output in (True, False):
        with pytest.raises(DestinationError, match="another model"):
            convert(root / "model", output, replace(options, push_to=f"local://{there}", keep_output=keep_output))
    assert [path.name for path in there.iterdir()] == ["pytorch_model.bin"]
    assert not (output / "int8/uploads").exists()


def test_what_concludes_is_not_disturbed_by_another_that_ends(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks another one may remove, at any moment, what this one writes in. Here: before each of its files."""
    no_locks(monkeypatch)
    output = tmp_path / "out"
    for number in (1, 2):
        convert(root / "model", output, part(number, 2))
    files: list[str] = []

    def create_in_what_is_gone(name: str, directory: int) -> int:
        files.append(name)
        if len(files) == removes_at:
            shutil.rmtree(output / "int8/partial")
        return create_file(name, directory)

    monkeypatch.setattr("int8cli.checkpoint.writer.create_file", create_in_what_is_gone)
    removes_at = 1
    while True:
        (output / "config.json").unlink()
        files.clear()
        assert convert(root / "model", output, replace(NONE, finish=True)).missing == ()
        assert tree(output) == tree(root / "one")
        if len(files) < removes_at:
            break
        removes_at += 1
    assert removes_at > 5


def test_an_error_while_others_have_not_concluded_stays_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards are there, and the last files are not, or are damaged."""
    output = tmp_path / "out"
    for number in (1, 2):
        convert(root / "model", output, part(number, 2))
    monkeypatch.setattr("int8cli.conversion.part.write_conclusion", refuse_for_room)
    finish = replace(NONE, finish=True)
    assert convert(root / "model", output, finish).missing == ()  # it is whole: nothing was left to do
    for name, data in (("config.json", None), ("int8/report.json", b"{"), ("int8/files.json", None)):
        before = (output / name).read_bytes()
        (output / name).unlink() if data is None else (output / name).write_bytes(data)
        with pytest.raises(DiskSpaceError):
            convert(root / "model", output, finish)
        (output / name).write_bytes(before)


def refuse_for_room(*args: Any) -> Any:
    raise DiskSpaceError("full")


@pytest.mark.parametrize("options", [replace(NONE, finish=True), part(2, 2)])
def test_two_that_conclude_at_once_without_locks(
    options: ConvertOptions, root: Path, tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one concludes, and removes what this one is about to write in, while it concludes too."""
    no_locks(monkeypatch)
    output = tmp_path / "out"
    for number in (1, 2):
        convert(root / "model", output, part(number, 2))
    (output / "config.json").unlink()
    concluded: list[int] = []

    def after_another(*args: Any) -> Any:
        child = nursery.start("convert", root / "model", "-o", "out", "--outliers", "none", "--finish", cwd=tmp_path)
        concluded.append(child.wait().code)
        return write_conclusion(*args)

    monkeypatch.setattr("int8cli.conversion.part.write_conclusion", after_another)
    assert convert(root / "model", output, options).missing == ()
    assert concluded == [0]
    assert tree(output) == tree(root / "one")


def test_a_directory_that_another_one_removes_meanwhile_is_made_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one that concludes while this one says that it works on the directory."""
    removed: list[str] = []

    def create_in_what_is_gone(name: str, directory: int) -> int:
        if not removed:
            removed.append(name)
            shutil.rmtree(tmp_path / "out/int8/parts")
        return create_file(name, directory)

    monkeypatch.setattr("int8cli.records.part.create_file", create_in_what_is_gone)
    assert convert(root / "model", tmp_path / "out", part(1, 1)).missing == ()
    assert removed
    assert tree(tmp_path / "out") == tree(root / "one")


@pytest.mark.parametrize("which", ["part", "finish"])
def test_what_another_machine_wrote_is_waited_for_where_it_is_shown_late(
    which: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems of a network list a file before they find one of a name that was looked up in vain."""
    output = tmp_path / "out"
    for number in (1, 2) if which == "finish" else (1,):
        convert(root / "model", output, part(number, 2))
    late = {*(output / "int8/records").iterdir(), *output.glob("*.safetensors")}
    (output / "config.json").unlink(missing_ok=True)
    pauses: list[float] = []

    def hidden(path: Path) -> bool:
        return path in late and len(pauses) < 3

    lexists, read_document, size_of = os.path.lexists, store.read_document, store._size_of
    monkeypatch.setattr(os.path, "lexists", lambda path: not hidden(path) and lexists(path))
    monkeypatch.setattr(
        store, "read_document", lambda path, *rest: None if hidden(path) else read_document(path, *rest)
    )
    monkeypatch.setattr(store, "_size_of", lambda path: -1 if hidden(path) else size_of(path))
    monkeypatch.setattr("int8cli.conversion.late.time", SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append))
    options = replace(NONE, finish=True) if which == "finish" else part(2, 2)
    assert convert(root / "model", output, options).missing == ()
    assert len(pauses) == 3
    assert tree(output) == tree(root / "one")


# What is refused


def test_another_version_is_refused_with_both(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(root / "model", tmp_path / "out", part(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(in_parts, "__version__", "9.9.9")
        for options in (part(2, 2), part(1, 2), replace(NONE, finish=True)):
            with pytest.raises(
                VersionMismatchError, match=r"part 1 of 2, on .*, has int8cli 0.*this process has 9.9.9"
            ):
                convert(root / "model", tmp_path / "out", options)
    assert convert(root / "model", tmp_path / "out", part(2, 2)).missing == ()
    assert tree(tmp_path / "out") == tree(root / "one")


def test_other_settings_are_refused_with_both(root: Path, tmp_path: Path) -> None:
    convert(root / "model", tmp_path / "out", part(1, 2))
    with pytest.raises(SettingsMismatchError, match=r"threshold 6.0; this one has 5.0"):
        convert(root / "model", tmp_path / "out", part(2, 2, replace(NONE, threshold=5.0)))


def test_another_source_is_refused(root: Path, tmp_path: Path) -> None:
    convert(root / "model", tmp_path / "out", part(1, 2))
    llama(tmp_path / "model", shards=SHARDS, seed=1)
    with pytest.raises(SettingsMismatchError, match=r"source shard model-00001-of-00006.safetensors '"):
        convert(tmp_path / "model", tmp_path / "out", part(2, 2))


def test_two_that_start_with_different_settings_do_not_both_go_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find an empty directory. The description is created once, and checked after that."""
    create = writer.create_file_once
    once: list[bool] = []

    def create_second(*args: Any) -> None:
        if not once:
            once.append(True)
            convert(root / "model", tmp_path / "out", part(1, 2, replace(NONE, threshold=5.0)))
        create(*args)

    monkeypatch.setattr("int8cli.records.store.create_file_once", create_second)
    with pytest.raises(SettingsMismatchError, match=r"threshold 5.0; this one has 6.0"):
        convert(root / "model", tmp_path / "out", part(1, 2))


@pytest.mark.parametrize("outliers", ["auto", "activations"])
def test_a_run_of_the_model_is_refused_with_the_way_to_do_it(outliers: str, root: Path, tmp_path: Path) -> None:
    for options in (ConvertOptions(outliers=outliers, part=(1, 2)), ConvertOptions(outliers=outliers, finish=True)):
        with pytest.raises(CannotRunInPartsError, match="has to run the whole model") as caught:
            convert(root / "model", tmp_path / "out", options)
        assert "statistics" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (part(0, 2), "part"),
        (part(3, 2), "part"),
        (part(1, 10**20), "part"),
        (part(1, 2, replace(NONE, overwrite=True)), "overwrite"),
        (part(1, 2, replace(NONE, finish=True)), "finish"),
    ],
)
def test_options_that_no_part_has(options: ConvertOptions, option: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        convert(root / "model", tmp_path / "out", options)
    assert caught.value.option == option


@pytest.mark.parametrize("text", ["3", "a/b", "1/", "/2", "-1/2", "0/2", "3/2"])
def test_a_part_is_k_of_n(text: str, root: Path, nursery: Nursery, tmp_path: Path) -> None:
    outcome = nursery.run("convert", root / "model", "-o", "out", "--outliers", "none", "--part", text, cwd=tmp_path)
    assert outcome.code == 2
    assert "--part" in outcome.err


def test_a_model_that_is_not_ours_gets_no_directory(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="was not written by int8cli"):
        convert(root / "model", llama(tmp_path / "other"), part(1, 2))
    assert not (tmp_path / "other/int8").exists()


# A dry run


def test_a_dry_run_shows_what_the_part_has_to_do(root: Path, nursery: Nursery, tmp_path: Path) -> None:
    whole = plan_conversion(root / "model", tmp_path / "out", NONE)
    plans = [plan_conversion(root / "model", tmp_path / "out", part(number, 4)) for number in (1, 2, 3, 4)]
    shares = [plan.share for plan in plans if plan.share is not None]
    assert whole.share is None
    assert sorted(name for share in shares for name in share.shards) == [each.file_name for each in whole.survey.shards]
    assert sum(share.source_bytes for share in shares) == whole.survey.source_bytes
    assert sum(share.output_bytes for share in shares) == whole.survey.output_bytes
    assert all(plan.needs.disks[0].needed_bytes < whole.needs.disks[0].needed_bytes for plan in plans)
    command = ("convert", root / "model", "--outliers", "none", "--dry-run", "--part", "2/4")
    assert f"part 2 of 4: {len(shares[1].shards)} of 6 shards, " in nursery.run(*command, cwd=tmp_path).out
    document = json.loads(nursery.run(*command, "--json", cwd=tmp_path).out)["part"]
    assert (document["part"], document["parts"], document["shards"]) == (2, 4, list(shares[1].shards))
    assert not (tmp_path / "out").exists()


# Who is there


def test_a_running_part_keeps_other_runs_out_and_is_shown(root: Path, nursery: Nursery, tmp_path: Path) -> None:
    llama(tmp_path / "model", layers=6, hidden=768, intermediate=2048, vocabulary=2048, shards=SHARDS)
    output = tmp_path / "out"
    options = ("--outliers", "none", "-q", "--workers", "1", "--part", "1/2")
    process = start("convert", "model", "-o", "out", *options, cwd=tmp_path)
    wait_until(lambda: (output / "int8/conversion.json").exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        found = status(output)
        assert found.state == "running"
        assert [(each.part, each.parts, each.state, each.shards) for each in found.parts] == [(1, 2, "running", 3)]
        with pytest.raises(OutputInUseError):
            convert(tmp_path / "model", output, NONE)
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
        outcome_of(process)
    found = status(output)
    assert (found.state, found.parts[0].state) == ("unfinished", "stopped")
    assert "1 of 2: " in nursery.run("status", "out", cwd=tmp_path).out


def test_a_part_on_another_machine_is_shown_without_a_guess(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert(root / "model", output, part(1, 2))
    record = {"schema": "int8cli.part/1", "part": 2, "parts": 2**62, "host": "n7", "machine": "another", "version": "1"}
    (output / "int8/parts/feedfeedfeedfeed.json").write_text(json.dumps(record))
    states = [(each.part, each.state, each.hosts) for each in status(output).parts]
    assert states[1] == (2, "elsewhere", ("n7",))
    assert states[0][:2] == (1, "finished")


def test_a_plain_run_keeps_parts_out(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    class Busy(CoherentProgress):
        refused = 0

        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            super().done(task, part, outcome)
            with pytest.raises(OutputInUseError):
                convert(root / "model", output, ConvertOptions(outliers="none", part=(1, 2)))
            self.refused += 1

    progress = Busy()
    convert(root / "model", output, replace(NONE, workers=1), progress=progress)
    assert progress.refused >= SHARDS


# Bad days


def test_a_disk_that_takes_a_part_of_a_write(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a part, cut off, would be in the way of all later runs."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:5]))
    for number in (1, 2):
        convert(root / "model", tmp_path / "out", part(number, 2))
    assert tree(tmp_path / "out") == tree(root / "one")

    def full(descriptor: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(1)
        return write(descriptor, bytes(data)[:5])

    written: list[int] = []
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskSpaceError):
        convert(root / "model", tmp_path / "other", part(1, 2))
    monkeypatch.setattr(os, "write", write)
    assert not list((tmp_path / "other/int8").rglob("*.*"))
    convert(root / "model", tmp_path / "other", part(1, 2))


def test_a_disk_without_locks(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch)
    for number in (1, 2, 2):
        convert(root / "model", tmp_path / "out", part(number, 2))
    assert tree(tmp_path / "out") == tree(root / "one")
    with pytest.raises(OutputError, match="cannot lock"):
        convert(root / "model", tmp_path / "out", NONE)


def test_a_disk_without_hard_links(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    for number in (1, 2):
        convert(root / "model", tmp_path / "out", part(number, 2))
    assert tree(tmp_path / "out") == tree(root / "one")


def test_a_machine_without_room_stops_its_part_only(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskSpaceError, match="not enough disk space"):
            convert(root / "model", output, part(1, 2))
    assert not list((output / "int8/partial").iterdir())
    convert(root / "model", output, part(2, 2))
    assert convert(root / "model", output, part(1, 2)).missing == ()
    assert tree(output) == tree(root / "one")


@pytest.mark.parametrize("time_s", [0, 2**32 - 1])
def test_clocks_that_disagree_change_nothing(time_s: int, root: Path, tmp_path: Path) -> None:
    """Files of a machine whose clock is in 1970, or in 2106."""
    output = tmp_path / "out"
    convert(root / "model", output, part(1, 2))
    for path in output.rglob("*"):
        os.utime(path, (time_s, time_s))
    assert status(output).parts[0].state == "finished"
    convert(root / "model", output, part(2, 2))
    assert tree(output) == tree(root / "one")


def test_a_part_prints_one_document(root: Path, nursery: Nursery, tmp_path: Path) -> None:
    options = ("--outliers", "none", "--json", "--part")
    outcomes = [
        nursery.run("convert", root / "model", "-o", "out", *options, text, cwd=tmp_path) for text in ("1/2", "2/2")
    ]
    first, last = (json.loads(outcome.out) for outcome in outcomes)
    assert (first["schema"], first["part"], first["parts"]) == ("int8cli.part-result/1", 1, 2)
    assert (first["finished"], len(first["missing"]), last["finished"], last["missing"]) == (False, 3, True, [])
    assert last["report"] == json.loads((tmp_path / "out/int8/report.json").read_text())


def test_records_of_one_shard_are_written_at_the_same_time(tmp_path: Path) -> None:
    """That of the shard by one thread, that of its upload by another, which another process has converted as well."""
    aside = tmp_path / "partial/token"
    record, upload = tmp_path / "records/shard.json", tmp_path / "uploads/shard.json"
    with new_file(record, below=tmp_path, aside=aside) as file:
        file.write(b"of the shard")
        write_file(upload, b"of the upload", below=tmp_path, aside=aside)
    assert (record.read_bytes(), upload.read_bytes()) == (b"of the shard", b"of the upload")
    assert list(aside.iterdir()) == []
