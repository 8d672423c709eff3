"""Answers that are interrupted: by the library's caller, and by Ctrl-C on a terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.calibration_models import WORDS, make_model
from support.checkpoints import WITHOUT_COLUMNS
from support.program import LIMIT_S, environment

from int8cli import GenerateOptions, chat, convert
from int8cli.cli.signals import first_interrupt_sets
from int8cli.report.generation import speed_line

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
MESSAGE = " ".join(WORDS[:4])
NEVER_ENDS = 1_000_000


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not end its text, and takes as long a text as it likes."""
    root = tmp_path_factory.mktemp("chat")
    make_model("llama", root / "model")
    change(root / "model/config.json", max_position_embeddings=2 * NEVER_ENDS, eos_token_id=None)
    change(root / "model/generation_config.json", eos_token_id=None)
    convert(root / "model", root / "out", WITHOUT_COLUMNS)
    (root / "out/chat_template.jinja").write_text(TEMPLATE)
    return root / "out"


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@dataclass
class Stop:
    """Stops at the call of this number, and records what is shown."""

    at: int
    calls: int = 0
    shown: list[str] = field(default_factory=list)

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls >= self.at


def options(**changes: Any) -> GenerateOptions:
    return GenerateOptions(**{"max_new_tokens": 8, "device": "cpu", **changes})


# The library


def test_an_answer_that_is_stopped_has_what_came_and_the_conversation_goes_on(chatty: Path) -> None:
    whole = next(chat(chatty, [MESSAGE], options()))
    stop = Stop(at=12)
    talk = chat(chatty, [MESSAGE, MESSAGE], options(), on_text=stop.shown.append, stop=stop)
    cut = next(talk)
    assert cut.stopped == "interrupted"
    assert 0 < cut.new_tokens < whole.new_tokens
    assert whole.text.startswith(cut.text)
    assert "".join(stop.shown) == cut.text
    assert stop.shown[-1] == ""
    assert speed_line(cut).endswith(", interrupted")
    stop.at = 1_000
    after = next(talk)
    assert (after.stopped, after.new_tokens) == ("length", 8)
    assert after.prompt_tokens == len(f"{MESSAGE} {cut.text} {MESSAGE}".split())


def test_a_message_that_was_stopped_before_an_answer_counts_as_not_sent(chatty: Path) -> None:
    stop = Stop(at=1)
    talk = chat(chatty, [MESSAGE, MESSAGE], options(), stop=stop)
    nothing = next(talk)
    assert (nothing.text, nothing.new_tokens, nothing.stopped) == ("", 0, "interrupted")
    assert (nothing.seconds_to_first_token, nothing.tokens_per_second, nothing.seconds) == (None, None, 0.0)
    assert "before the first token" in speed_line(nothing)
    stop.at = 1_000
    assert next(talk).prompt_tokens == len(MESSAGE.split())


# Signals


def test_the_first_interrupt_asks_and_the_second_ends() -> None:
    asking = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with first_interrupt_sets(asking):
            assert not asking.is_set()
            signal.raise_signal(signal.SIGINT)
            assert asking.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


LONG_STEP = """
import hashlib, os, signal, sys, threading
from int8cli.cli.signals import end_on_signals, first_interrupt_sets

end_on_signals()
asking = threading.Event()
with first_interrupt_sets(asking):
    print("ready", flush=True)
    for after_s in range(int(sys.argv[1])):  # the system delivers two at the same moment as one
        threading.Timer(0.3 + after_s, os.kill, (os.getpid(), signal.SIGINT)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))  # no handler runs before it is done
print("asked", asking.is_set(), flush=True)
"""


@pytest.mark.parametrize(("interrupts", "ended"), [(1, (0, "ready\nasked True\n")), (2, (130, "ready\n"))])
def test_in_a_long_step_the_first_interrupt_is_waited_for_and_the_second_is_not(
    interrupts: int, ended: tuple[int, str]
) -> None:
    """The first, for longer than the time after which an interrupt ends the process by force."""
    rounds = rounds_for(3.0) if interrupts == 1 else (1 << 31) - 1
    program = [sys.executable, "-c", LONG_STEP, str(interrupts), str(rounds)]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == ended, done.stderr


def rounds_for(seconds: float) -> int:
    """How many rounds of the hash take about as long on this machine."""
    import hashlib

    begin = time.process_time()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    return int(100_000 * seconds / (time.process_time() - begin))


# A terminal

# The program in a session of its own, with the terminal as the one that its Ctrl-C comes from.
ON_ITS_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from int8cli.cli import main; main()"


class Terminal:
    """A conversation of the program with somebody who types."""

    def __init__(self, *args: str | Path) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_ITS_TERMINAL, *map(str, args)],
            env=environment(TERM="dumb"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._unread = b""
        os.set_blocking(self._ours, False)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def read_until(self, *words: str) -> str:
        """All that is shown up to the first place where these words have come, one after the other."""
        deadline = time.monotonic() + LIMIT_S
        while (end := self._end_of(words)) is None:
            assert time.monotonic() < deadline, self._unread[-2000:]
            self._read()
        shown, self._unread = self._unread[:end], self._unread[end:]
        return shown.decode()

    def _end_of(self, words: tuple[str, ...]) -> int | None:
        place = 0
        for word in words:
            found = self._unread.find(word.encode(), place)
            if found < 0:
                return None
            place = found + len(word)
        return place

    def _read(self) -> None:
        try:
            self._unread += os.read(self._ours, 65536)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # the program has ended
            raise AssertionError(self._unread[-2000:]) from None

    def end(self) -> tuple[int, str]:
        """Wait for the program's end. Returns its code, and what was shown since the last reading."""
        code = self._process.wait(timeout=LIMIT_S)
        try:
            while True:
                self._read()
        except AssertionError:
            return code, self._unread.decode()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@contextmanager
def conversation(*args: str | Path) -> Iterator[Terminal]:
    terminal = Terminal("generate", *args, "--chat", "--max-new-tokens", str(NEVER_ENDS), "--device", "cpu")
    try:
        terminal.read_until("Ctrl-C ends an answer, Ctrl-D the conversation.\r\n", "> ")
        yield terminal
    finally:
        terminal.close()


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_conversation(chatty: Path) -> None:
    with conversation(chatty) as terminal:
        for _ in range(2):
            terminal.type(f"{MESSAGE}\n")
            terminal.read_until(f"{MESSAGE}\r\n", " w", " w", " w")  # the echo, and some words of the answer
            terminal.type("\x03")
            shown = terminal.read_until("tokens/s, interrupted\r\n", "> ")
            assert "Traceback" not in shown
            time.sleep(0.9)  # two of these are longer than the time after which an interrupt ends the process by force
        terminal.type("\x03")
        code, shown = terminal.end()
    assert code == 130, shown
    assert "interrupted: run the same command again" in shown


def test_a_conversation_from_a_file_ends_at_the_first_interrupt(chatty: Path, tmp_path: Path) -> None:
    (tmp_path / "messages").write_text(f"{MESSAGE}\n{MESSAGE}\n")
    with (tmp_path / "messages").open() as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "int8cli", "generate", chatty, "--chat", "--max-new-tokens", str(NEVER_ENDS)],
            env=environment(PYTHONUNBUFFERED="1"),
            stdin=messages,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    assert process.stdout is not None
    process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert b"Traceback" not in err
