"""A user who pushes to a stand-in for the Hub, and what must be there afterwards."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from support.hub_uploads import SIGNATURE, WritableHub
from support.program import Child, Nursery, Outcome

SOURCE = "org/model"
REPO = "me/model-int8"
TOKEN = "hf_SecretOfTheTests"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in range(1, 4)]
LOCAL_STATE = ("int8/uploads/", "int8/push.json")  # what is of this machine alone
STREAM = ("--push-to-hub", REPO, "--no-keep-output")


def local_conversion(published: Path, nursery: Nursery, home: Path, outliers: str) -> Path:
    """A conversion of the published model, from the Hub, that is not pushed."""
    with WritableHub(home / "hub", {TOKEN: {"me"}}) as hub:
        hub.add_repo(SOURCE, published)
        command = ("convert", SOURCE, "-o", "out", "--outliers", outliers, "-q")
        outcome = nursery.run(*command, cwd=home, env={"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf")})
        assert outcome.code == 0, outcome.err
    return home / "out"


def hub_environment(hub: WritableHub, home: Path) -> dict[str, str]:
    """That of a machine which finds this Hub and has a token for it. `home` is for huggingface_hub."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }


class User:
    """Somebody with a token for this Hub."""

    def __init__(self, hub: WritableHub, nursery: Nursery, home: Path, converted: Path) -> None:
        self.hub = hub
        self.home = home
        self.output = home / "out"
        self._nursery = nursery
        self._converted = converted

    @property
    def environment(self) -> dict[str, str]:
        return hub_environment(self.hub, self.home / "hf")

    def start(self, *args: str | Path, **changes: str) -> Child:
        return self._nursery.start(*args, cwd=self.home, env=self.environment | changes)

    def run(self, *args: str | Path, **changes: str) -> Outcome:
        outcome = self.start(*args, **changes).wait()
        assert "Traceback" not in outcome.err, outcome.err
        assert TOKEN not in outcome.out + outcome.err
        assert SIGNATURE not in outcome.out + outcome.err
        return outcome

    def convert(self, *args: str, **changes: str) -> Outcome:
        return self.run("convert", SOURCE, "-o", "out", "--outliers", "none", *args, **changes)

    def has_converted(self) -> None:
        """Have the conversion that other tests have too."""
        shutil.copytree(self._converted, self.output)

    def push(self, *args: str, **changes: str) -> Outcome:
        if not self.output.exists():
            self.has_converted()
        return self.run("push", "out", REPO, *args, **changes)


def files_in(directory: Path) -> dict[str, bytes]:
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    return {name: data for name, data in found.items() if not name.startswith(LOCAL_STATE)}


def weights_here(directory: Path) -> list[str]:
    """The shards and sidecars under their final names."""
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*.safetensors")]
    return sorted(name for name in names if not name.startswith(("int8/incoming", "int8/partial", "int8/calibration")))


def assert_whole(user: User, converted: Path) -> None:
    """The repository has the files of the conversion, in one commit; nothing was sent twice, no token was written."""
    assert user.hub.files_of(REPO) == files_in(converted)
    assert len(user.hub.commits) == 1
    assert set(user.hub.put_objects.values()) == {1}
    for path in user.home.rglob("*"):
        if path.is_file() and "hub" not in path.parts:
            assert TOKEN.encode() not in path.read_bytes(), path


def refused(outcome: Outcome, message: str, hint: str) -> None:
    assert outcome.code == 1, outcome
    assert re.search(message, outcome.err), outcome.err
    assert re.search(hint, outcome.err), outcome.err


def until_done(user: User, start: Callable[[], Child], *, every: int = 1) -> int:
    """Start the command again and again, kill the nth run at step 2n * `every`. Returns the step it was not killed at.

    A step is a request that arrives, or one that is answered.
    """
    for run in range(every, 100, every):
        steps = -run
        child: list[Child] = []

        def kill(step: str, when: str, run: int = run, child: list[Child] = child) -> bool:
            nonlocal steps
            steps += 1
            if steps < run or not child:
                return False
            os.kill(child[0].pid, signal.SIGKILL)
            return when == "before"

        user.hub.watch = kill
        child.append(start())
        outcome = child[0].wait()
        if outcome.code != -signal.SIGKILL:
            assert outcome.code == 0, outcome.err
            return run
    raise AssertionError("it never ended")
