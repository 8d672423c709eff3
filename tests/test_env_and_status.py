"""`int8cli env` tells no secret, and `int8cli status` says how far a conversion is."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.program import CONVERT, Nursery, llama, outcome_of, run, start, wait_until

from int8cli.commands.env import env


def test_env_names_versions_and_no_secret(tmp_path: Path) -> None:
    changes = {
        "HF_TOKEN": "hf_secret",
        "HF_ENDPOINT": "https://user:password@hub.example/path?key=secret",
        "HF_HOME": str(tmp_path),
    }
    for options in ([], ["--json"]):
        outcome = run("env", *options, cwd=tmp_path, env=changes)
        assert outcome.code == 0, outcome.err
        assert "secret" not in outcome.out + outcome.err
        assert "password" not in outcome.out + outcome.err
        assert "https://hub.example/path" in outcome.out
        assert torch.__version__ in outcome.out
    document = json.loads(outcome.out)
    assert document["schema"] == "int8cli.environment/1"
    assert document["hub"]["token"] == "set"
    assert document["cores"] >= 1
    assert document["packages"]["torch"] == torch.__version__


def test_status_before_during_and_after(nursery: Nursery, tmp_path: Path) -> None:
    llama(tmp_path / "model", layers=6, hidden=768, intermediate=2048, vocabulary=2048, shards=6)

    def status() -> dict[str, object]:
        outcome = nursery.run("status", "out", "--json", cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        found: dict[str, object] = json.loads(outcome.out)
        assert found["schema"] == "int8cli.status/1"
        return found

    nothing = nursery.run("status", "out", cwd=tmp_path)
    assert nothing.code == 1
    assert nothing.err.startswith("error: out is not a conversion")
    process = start(*CONVERT, "model", "-o", "out", "--workers", "1", cwd=tmp_path)
    wait_until(lambda: any((tmp_path / "out/int8/records").glob("*.json")))
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        running = status()
        assert running["state"] == "running"
        assert 1 <= int(str(running["shards_finished"])) <= 6
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
        outcome_of(process)
    if not (tmp_path / "out/int8/files.json").exists():
        stopped = status()
        assert (stopped["state"], stopped["model"], stopped["shards"]) == ("unfinished", "model", 6)
        shown = nursery.run("status", "out", cwd=tmp_path)
        assert "same int8cli convert command again" in shown.out
    assert nursery.run(*CONVERT, "model", "-o", "out", "-q", cwd=tmp_path).code == 0
    done = status()
    assert (done["state"], done["shards_finished"]) == ("finished", 6)
    assert done["source_bytes_finished"] == done["source_bytes"]


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        ("http://[bad", "http://[bad"),
        ("u:secret@host", "host"),
        ("https://u:secret@host:8/at?token=secret", "https://host:8/at"),
    ],
)
def test_no_address_ends_env_or_shows_what_is_secret(
    endpoint: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert env().hub["HF_ENDPOINT"] == shown


def test_env_works_in_a_directory_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert env().cores >= 1


def test_status_does_not_take_what_it_cannot_read_for_nothing(nursery: Nursery, tmp_path: Path) -> None:
    llama(tmp_path / "model", layers=1)
    assert nursery.run(*CONVERT, "model", "-o", "out", "-q", cwd=tmp_path).code == 0
    (tmp_path / "out/int8/incoming").symlink_to("incoming")
    ended = nursery.run("status", "out", cwd=tmp_path)
    assert ended.code == 1
    assert "Too many levels of symbolic links" in ended.err
    assert ended.err.count("hint: ") == 1


def accepts(setting: dict[str, str]) -> bool:
    """Whether the installed huggingface_hub can be used with this setting in the environment."""
    imports = [sys.executable, "-c", "from huggingface_hub import HfApi"]
    return subprocess.run(imports, env=os.environ | setting, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("setting", [{"HF_ENDPOINT": "http://[bad"}, {"HF_HUB_DOWNLOAD_TIMEOUT": "soon"}], ids=str)
def test_settings_that_the_hubs_client_refuses_are_an_error(setting: dict[str, str], tmp_path: Path) -> None:
    """In processes of their own: its client reads them when it is imported."""
    [(name, value)] = setting.items()
    if accepts(setting):
        pytest.skip("this huggingface_hub accepts the setting until it connects")
    refused = run("estimate-memory", "org/name", cwd=tmp_path, env=setting)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("error: huggingface_hub refuses a setting in the environment: ")
    assert "hint: Check HF_ENDPOINT" in refused.err
    shown = run("env", cwd=tmp_path, env=setting)
    assert shown.code == 0, shown.err
    assert name in shown.out
    assert value in shown.out
    assert "huggingface_hub refuses one of these settings" in shown.out
