"""A conversion that is killed at any time: the same command resumes, with the same result."""

import fcntl
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.program import CONVERT, Child, Nursery, llama, outcome_of, run, start, tree, wait_until

SHARDS = 6


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose shards take long enough for a kill to land inside one."""
    directory = tmp_path_factory.mktemp("large") / "model"
    return llama(directory, layers=6, hidden=768, intermediate=2048, vocabulary=2048, shards=SHARDS)


@pytest.fixture(scope="module")
def reference(large: Path, nursery: Nursery) -> dict[str, bytes]:
    """What an unbroken run writes."""
    assert nursery.run(*CONVERT, large, "-o", "reference", "-q", cwd=large.parent).code == 0
    return tree(large.parent / "reference")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


@pytest.fixture
def done(model: Path, nursery: Nursery) -> Path:
    """A finished conversion of `model`."""
    assert nursery.run(*CONVERT, model, "-o", "out", "-q", cwd=model.parent).code == 0
    return model.parent / "out"


def identities(paths: list[Path]) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again, even with the same bytes."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def recorded_shards(output: Path) -> list[Path]:
    records = (output / "int8/records").glob("[!.]*.json")
    return [output / f"{record.stem}.safetensors" for record in records]


def wait_for(path: Path, child: Child) -> None:
    wait_until(lambda: path.exists() or process_state(child.pid) in ("Z", None), str(path))


def process_state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def descendants_of(pid: int) -> list[int]:
    return [each for child in children_of(pid) for each in (child, *descendants_of(child))]


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


def assert_only_whole_files(output: Path, reference: dict[str, bytes]) -> None:
    """Every file with a final name equals that of an uninterrupted run."""
    for name, data in tree(output).items() if output.exists() else ():
        aside = name.startswith("int8/partial/") or Path(name).name.startswith(".") or name.endswith("/")
        assert aside or data == reference[name], f"{name} is not whole"


# Kills


@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_instants_leave_no_trace(
    seed: int, large: Path, reference: dict[str, bytes], nursery: Nursery, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    output = tmp_path / "out"
    finished: dict[str, tuple[int, int]] = {}
    kills = 0
    for attempt in range(30):
        child = nursery.start(*CONVERT, large, "-o", output, cwd=tmp_path)
        wait_for(output / "int8", child)
        time.sleep((chance.choice([0.01, 0.05, 0.2, 0.4]) if attempt else 0.01) * chance.random())
        child.signal(signal.SIGKILL)
        outcome = child.wait()
        again = identities(recorded_shards(output))
        assert {name: again[name] for name in finished} == finished, "a finished shard was done again"
        finished = again
        if outcome.code == 0:
            break
        assert outcome.code == -signal.SIGKILL, outcome.err
        kills += 1
        assert_only_whole_files(output, reference)
    else:  # on a busy machine every run may be killed before its end
        assert nursery.start(*CONVERT, large, "-o", output, cwd=tmp_path).wait().code == 0
    assert kills > 0
    assert tree(output) == reference


@pytest.mark.parametrize(
    "moment",
    [
        "int8",
        "int8/.conversion.json.partial",
        "int8/conversion.json",
        ".LICENSE.partial",
        "LICENSE",
        "int8/partial/model-00001-of-00003.safetensors",
        "model-00001-of-00003.safetensors",
        "int8/records/.model-00001-of-00003.json.partial",
        "int8/records/model-00003-of-00003.json",
        "int8/report.json",
        "README.md",
        ".model.safetensors.index.json.partial",
        "model.safetensors.index.json",
        ".config.json.partial",
        "config.json",
    ],
)
def test_a_kill_when_a_file_appears_leaves_no_trace(
    moment: str, model: Path, done: Path, nursery: Nursery, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    child = nursery.start(*CONVERT, model, "-o", output, cwd=tmp_path)
    wait_for(output / moment, child)
    child.signal(signal.SIGKILL)
    child.wait()
    assert_only_whole_files(output, tree(done))
    assert nursery.run(*CONVERT, model, "-o", output, cwd=tmp_path).code == 0
    assert tree(output) == tree(done)


@pytest.mark.parametrize(
    "leftover",
    [
        ".config.json.partial",
        ".LICENSE.partial",
        "int8/records/.model-00002-of-00003.json.partial",
        "int8/partial/model-00002-of-00003.safetensors",
        "int8/incoming/0123456789012345678901234567890123456789/model-00002-of-00003.safetensors.incomplete",
    ],
)
def test_temporary_files_of_a_killed_run_are_removed_in_the_end(
    leftover: str, model: Path, done: Path, nursery: Nursery
) -> None:
    expected = tree(done)
    for file in ("model-00002-of-00003.safetensors", "int8/records/model-00002-of-00003.json", "config.json"):
        (done / file).unlink()
    (done / leftover).parent.mkdir(parents=True, exist_ok=True)
    (done / leftover).write_bytes(b"half of a fi")
    assert nursery.run(*CONVERT, model, "-o", done, cwd=model.parent).code == 0
    assert tree(done) == expected


def test_workers_end_when_their_parent_is_killed(
    large: Path, reference: dict[str, bytes], nursery: Nursery, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    parent = start(*CONVERT, large, "-o", output, "--workers", "2", cwd=tmp_path)
    workers: list[int] = []

    def workers_write() -> bool:
        workers[:] = [pid for pid in descendants_of(parent.pid) if holds_open(pid, output / "int8")]
        return bool(workers) and any((output / "int8/partial").glob("*"))

    wait_until(workers_write)
    parent.kill()
    outcome_of(parent)
    lock = os.open(output / "int8", os.O_RDONLY)
    try:
        while True:
            locked = not try_lock(lock)
            alive = [pid for pid in workers if holds_open(pid, output / "int8")]
            assert locked or not alive, "the lock went before the last worker"
            if not alive:
                break
        wait_until(lambda: all(process_state(pid) in ("Z", None) for pid in workers), "the end of the workers")
    finally:
        os.close(lock)
    assert_only_whole_files(output, reference)
    outcome = run(*CONVERT, large, "-o", output, "--workers", "2", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert tree(output) == reference


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holds_open(pid: int, path: Path) -> bool:
    try:
        return any(os.readlink(link) == str(path) for link in Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or does so now
        return False


def test_a_killed_worker_ends_the_run_with_an_error(large: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "out"
    parent = start(*CONVERT, large, "-o", output, "--workers", "2", cwd=tmp_path)
    wait_until(lambda: any((output / "int8/partial").glob("*")))
    victim = next(pid for pid in descendants_of(parent.pid) if holds_open(pid, output / "int8"))
    os.kill(victim, signal.SIGKILL)
    outcome = outcome_of(parent)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "error: a worker process ended" in outcome.err
    assert "hint:" in outcome.err
    assert_only_whole_files(output, reference)
    assert run(*CONVERT, large, "-o", output, "-q", cwd=tmp_path).code == 0
    assert tree(output) == reference


def test_two_workers_write_what_one_writes(large: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    outcome = run(*CONVERT, large, "-o", "out", "--workers", "2", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert tree(tmp_path / "out") == reference


# Two runs at once


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--threshold", "5"]])
def test_a_second_run_is_refused_and_does_not_disturb_the_first(
    options: list[str], large: Path, reference: dict[str, bytes], nursery: Nursery, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    first = nursery.start(*CONVERT, large, "-o", output, cwd=tmp_path)
    wait_until(lambda: any((output / "int8/partial").glob("*")))
    first.signal(signal.SIGSTOP)
    before = tree(output)
    second = nursery.run(*CONVERT, large, "-o", output, *options, cwd=tmp_path)
    assert (second.code, second.out) == (1, "")
    assert "error:" in second.err
    assert "in use" in second.err
    assert tree(output) == before
    first.signal(signal.SIGCONT)
    assert first.wait().code == 0
    assert tree(output) == reference


# The same directory, another conversion


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--threshold", "5"], "threshold 6.0; this one has 5.0"),
        (["--skip", "*.down_proj"], "skip"),
        (["--only", "*.down_proj"], "only"),
        (["--float32", "float16"], "float32 'direct'; this one has 'float16'"),
    ],
)
def test_other_settings_are_refused_by_name(
    options: list[str], field: str, model: Path, done: Path, nursery: Nursery
) -> None:
    before = tree(done)
    outcome = nursery.run(*CONVERT, model, "-o", done, *options, cwd=model.parent)
    assert (outcome.code, outcome.out) == (1, "")
    assert field in outcome.err
    assert "--overwrite" in outcome.err
    assert tree(done) == before
    assert nursery.run(*CONVERT, model, "-o", done, *options, "--overwrite", cwd=model.parent).code == 0
    assert nursery.run(*CONVERT, model, "-o", "fresh", *options, cwd=model.parent).code == 0
    assert tree(done) == tree(model.parent / "fresh")


def test_settings_that_do_not_decide_the_bytes_may_change(model: Path, done: Path, nursery: Nursery) -> None:
    before = tree(done)
    outcome = nursery.run(*CONVERT, model, "-o", done, "--on-nonfinite", "keep", "--workers", "1", cwd=model.parent)
    assert outcome.code == 0
    assert tree(done) == before


def test_a_changed_source_is_refused_and_its_shard_named(model: Path, done: Path, nursery: Nursery) -> None:
    llama(model, seed=1)
    outcome = nursery.run(*CONVERT, model, "-o", done, cwd=model.parent)
    assert outcome.code == 1
    assert "source shard model-00001-of-00003.safetensors" in outcome.err


def test_another_model_is_refused_by_name(model: Path, done: Path, nursery: Nursery) -> None:
    outcome = nursery.run(*CONVERT, llama(model.parent / "other"), "-o", done, cwd=model.parent)
    assert outcome.code == 1
    assert "model 'model'; this one has 'other'" in outcome.err


def test_a_config_that_changes_the_plan_is_refused(model: Path, done: Path, nursery: Nursery) -> None:
    config = json.loads((model / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "float32"
    (model / "config.json").write_text(json.dumps(config))
    outcome = nursery.run(*CONVERT, model, "-o", done, cwd=model.parent)
    assert outcome.code == 1
    assert "holds a conversion with plan" in outcome.err


# Finished shards


def test_a_finished_conversion_is_not_done_twice(model: Path, done: Path, nursery: Nursery) -> None:
    before, shards = tree(done), identities(sorted(done.glob("*.safetensors")))
    outcome = nursery.run(*CONVERT, model, "-o", done, "--json", cwd=model.parent)
    assert outcome.code == 0
    assert "3 of 3 shards already converted" in outcome.err
    assert json.loads(outcome.out) == json.loads((done / "int8/report.json").read_text())
    assert tree(done) == before
    assert identities(sorted(done.glob("*.safetensors"))) == shards


@pytest.mark.parametrize("damage", ["gone", "short", "long", "empty", "no record"])
def test_only_an_incomplete_shard_is_converted_again(damage: str, model: Path, done: Path, nursery: Nursery) -> None:
    before = tree(done)
    others = identities([done / f"model-0000{number}-of-00003.safetensors" for number in (1, 3)])
    shard = done / "model-00002-of-00003.safetensors"
    if damage == "gone":
        shard.unlink()
    elif damage == "no record":
        (done / "int8/records/model-00002-of-00003.json").unlink()
    else:
        os.truncate(shard, {"short": shard.stat().st_size - 1, "long": shard.stat().st_size + 1, "empty": 0}[damage])
    assert nursery.run(*CONVERT, model, "-o", done, cwd=model.parent).code == 0
    assert tree(done) == before
    assert identities([done / name for name in others]) == others


@pytest.mark.parametrize("file", ["conversion.json", "records/model-00002-of-00003.json"])
@pytest.mark.parametrize("text", ["{garbage", '{"a": 1}', "[]", "", "null", "\xff"])
def test_an_edited_record_is_an_error_with_a_hint(
    file: str, text: str, model: Path, done: Path, nursery: Nursery
) -> None:
    expected = tree(done)
    (done / "int8" / file).write_text(text, encoding="latin-1")
    before = tree(done)
    outcome = nursery.run(*CONVERT, model, "-o", done, cwd=model.parent)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert f"int8/{file} is damaged or was edited" in outcome.err
    assert tree(done) == before
    # The way out that the hint names.
    if file == "conversion.json":
        shutil.rmtree(done)
    else:
        (done / "int8" / file).unlink()
    assert nursery.run(*CONVERT, model, "-o", done, cwd=model.parent).code == 0
    assert tree(done) == expected


# What is not ours


def test_overwrite_touches_nothing_that_it_did_not_write(model: Path, done: Path, nursery: Nursery) -> None:
    theirs = {"notes.txt": b"mine", "int8/notes.txt": b"mine too", "int8/records/x.json": b"{}", "sub/model.bin": b"w"}
    for name, data in theirs.items():
        (done / name).parent.mkdir(exist_ok=True)
        (done / name).write_bytes(data)
    before = tree(done)
    outcome = nursery.run(*CONVERT, model, "-o", done, "--overwrite", "--skip", "*.up_proj", cwd=model.parent)
    assert outcome.code == 0
    after = tree(done)
    assert {name: after[name] for name in theirs} == theirs
    assert after.keys() == before.keys()
    assert after != before


@pytest.mark.parametrize("part", ["shards", "files"])
@pytest.mark.parametrize("form", ["above", "absolute", "through a link"])
def test_overwrite_removes_nothing_elsewhere_whatever_its_records_name(
    form: str, part: str, model: Path, done: Path, nursery: Nursery
) -> None:
    elsewhere = model.parent / "elsewhere"
    elsewhere.mkdir()
    precious = [elsewhere / "x.json", elsewhere / "x.safetensors", elsewhere / "x"]
    for file in precious:
        file.write_text("precious")
    (done / "link").symlink_to(elsewhere)
    directory = {"above": "../elsewhere", "absolute": str(elsewhere), "through a link": "link"}[form]
    conversion = json.loads((done / "int8/conversion.json").read_text())
    entry = {**conversion["shards"][0], "output": f"{directory}/x.safetensors"}
    conversion[part].append(entry if part == "shards" else f"{directory}/x")
    (done / "int8/conversion.json").write_text(json.dumps(conversion))
    before = tree(done)
    outcome = nursery.run(*CONVERT, model, "-o", done, "--overwrite", cwd=model.parent)
    assert [file.read_text() for file in precious] == ["precious"] * 3
    if form == "through a link" and part == "shards":  # its record would be at int8/records/link/x.json: all is ours
        assert outcome.code == 0
    else:
        assert outcome.code == 1
        assert "Traceback" not in outcome.err
        assert tree(done) == before


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "foreign",
    [
        "config.json",
        "README.md",
        "LICENSE",
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
        "int8/report.json",
        "int8/records/model-00001-of-00003.json",
        "int8/partial/thesis.txt",
    ],
)
def test_a_foreign_file_with_the_name_of_an_output_is_refused(
    foreign: str, options: list[str], model: Path, nursery: Nursery
) -> None:
    output = model.parent / "out"
    (output / foreign).parent.mkdir(parents=True)
    (output / foreign).write_text("mine")
    outcome = nursery.run(*CONVERT, model, "-o", output, *options, cwd=model.parent)
    assert outcome.code == 1
    assert "was not written by int8cli" in outcome.err
    assert {name: data for name, data in tree(output).items() if not name.endswith("/")} == {foreign: b"mine"}


def test_after_a_kill_during_overwrite_the_directory_is_still_ours(model: Path, done: Path, nursery: Nursery) -> None:
    expected = tree(done)
    (done / "config.json").unlink()
    (done / "model-00001-of-00003.safetensors").unlink()
    assert nursery.run(*CONVERT, model, "-o", done, "--overwrite", "--threshold", "5", cwd=model.parent).code == 0
    assert nursery.run(*CONVERT, model, "-o", done, "--overwrite", cwd=model.parent).code == 0
    assert tree(done) == expected


# Source and output close together


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--dry-run"]])
@pytest.mark.parametrize("output", ["model", "model/", "./model/../model", "link"])
def test_the_source_is_never_the_output(output: str, options: list[str], model: Path, nursery: Nursery) -> None:
    (model.parent / "link").symlink_to(model)
    before = tree(model)
    outcome = nursery.run(*CONVERT, "model", "-o", output, *options, cwd=model.parent)
    assert (outcome.code, outcome.out) == (1, "")
    assert "the directory of the source" in outcome.err
    assert tree(model) == before


@pytest.mark.parametrize("output", ["model-int8", "deep/er"])
def test_an_output_inside_the_source_is_not_part_of_it(output: str, model: Path, nursery: Nursery) -> None:
    (model / "modeling_own.py").write_text("")
    before = tree(model)
    assert nursery.run(*CONVERT, model, "-o", model.parent / "elsewhere", cwd=model).code == 0
    for _ in range(2):
        outcome = nursery.run(*CONVERT, ".", "-o", output, cwd=model)
        assert outcome.code == 0, outcome.err
        assert tree(model / output) == tree(model.parent / "elsewhere")
    assert {name: data for name, data in tree(model).items() if not name.startswith(output)} == before


def test_a_source_inside_the_output_is_not_changed(model: Path, nursery: Nursery) -> None:
    before = tree(model)
    for _ in range(2):
        assert nursery.run(*CONVERT, "model", "-o", ".", cwd=model.parent).code == 0
    assert tree(model) == before
