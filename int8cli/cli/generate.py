"""`int8cli generate`."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import ConvertedDirectory, Device, InputsScheme, Json, Quiet, options_of
from int8cli.cli.signals import first_interrupt_sets
from int8cli.commands.options import GenerateOptions
from int8cli.errors import TextError

if TYPE_CHECKING:
    from int8cli.results.generation import Generation

EXAMPLES = """\
int8cli generate ./my-model-int8 "Why is the sky blue?"
int8cli generate ./my-model-int8 "Once upon a time" --raw --temperature 0.8
int8cli generate ./my-model-int8 "Hello" --compare ./my-model
int8cli generate ./bloom-int8 "Hello" --max-memory cpu=24GB
int8cli generate ./my-model-int8 --chat
int8cli generate ./my-model-int8 --json < prompt.txt
"""

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="[PROMPT]", help="What to continue or to answer; - for standard input.", show_default="-"),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="Hold a conversation: each line of standard input is a message. Ctrl-C ends an answer."
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to generate.", min=1)]
Temperature = Annotated[
    float, typer.Option(help="Sampling temperature; 0 takes the likeliest token each time.", min=0.0)
]
Seed = Annotated[int, typer.Option(help="Seed for sampling.")]
Inputs = Annotated[InputsScheme, typer.Option(help="How inputs become int8: zeropoint has half of absmax's error.")]
Where = Annotated[Device | None, typer.Option(help="Device to run on.", show_default="the GPU if there is one")]
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE=SIZE",
        help="The most memory for weights: cpu=8GB, or 0=10GB for the GPU. What does not fit is read from the disk for "
        "each token. Repeatable.",
        show_default="four fifths of what is free",
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Run this 16-bit model on the same prompt: a directory or a Hub id."),
]


@shows_errors(hints.GENERATE)
def generate(
    directory: ConvertedDirectory,
    prompt: Prompt = None,
    chat: Chat = False,
    raw: Raw = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    inputs: Inputs = InputsScheme.zeropoint,
    device: Where = None,
    max_memory: MaxMemory = None,
    compare: Compare = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text with a converted model; the text appears as it is generated.

    The prompt goes into the model's chat template, if it has one. Stored columns are exact. A model that is larger than
    the memory runs too: what does not fit is read from the disk for each token, and a line says first how long that
    takes.
    """
    options = options_of(GenerateOptions, locals())
    if chat:
        if prompt is not None or raw or as_json or compare is not None:
            raise typer.BadParameter("it takes no PROMPT, --raw, --json or --compare", param_hint="'--chat'")
        _chat(directory, options, quiet=quiet)
        return
    text = _standard_input() if prompt in (None, "-") else prompt
    _generate(directory, text, options, as_json=as_json, quiet=quiet)


def _generate(directory: Path, prompt: str, options: GenerateOptions, *, as_json: bool, quiet: bool) -> None:
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import generate as command

    with shown_progress(quiet=quiet) as progress:
        found = command.generate(directory, prompt, options, on_text=None if as_json else _show, progress=progress)
    with writing_result():
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
            return
    show_figures(found, quiet=quiet)


def _chat(directory: Path, options: GenerateOptions, *, quiet: bool) -> None:
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import generate as command
    from int8cli.report.generation import memory_line, speed_line

    found, interrupted = None, threading.Event()
    messages = _messages(interrupted)
    with shown_progress(quiet=quiet) as progress:
        for found in command.chat(
            directory, messages, options, on_text=_show, stop=interrupted.is_set, progress=progress
        ):
            _show_lines(speed_line(found), quiet=quiet)
    if found is not None:
        _show_lines(memory_line(found), quiet=quiet)


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("give one, or write it to standard input", param_hint="'PROMPT'")
    with _utf8():
        return sys.stdin.read().rstrip("\n")


@contextmanager
def _utf8() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise TextError(
            f"standard input is not UTF-8 text: byte {error.object[error.start]:#04x}",
            hint="Convert it first: iconv -f LATIN1 -t UTF-8.",
        ) from error


def _messages(interrupted: threading.Event) -> Iterator[str]:
    """The lines of standard input, asked for on a terminal; empty ones say nothing.

    From one line of a terminal to the next, Ctrl-C sets `interrupted`.
    """
    if sys.stdin is None:  # closed before the start
        return
    asks = sys.stdin.isatty()
    if asks:
        print("Each line is a message. Ctrl-C ends an answer, Ctrl-D the conversation.", file=sys.stderr)
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        with _utf8():
            line = sys.stdin.readline()
        if not line:
            if asks:
                print(file=sys.stderr)  # what follows begins on a new line
            return
        if line.strip():
            with first_interrupt_sets(interrupted) if asks else nullcontext():
                yield line.strip()


def _show(text: str) -> None:
    """A piece of the text; an empty one ends it."""
    from int8cli.report.text import printable_lines

    with writing_result():
        print(printable_lines(text) or "\n", end="", flush=True)


def show_figures(found: "Generation", *, quiet: bool) -> None:
    from int8cli.report.generation import generation_lines

    _show_lines(*generation_lines(found), quiet=quiet)


def _show_lines(*lines: str, quiet: bool) -> None:
    """On stderr, apart from the text."""
    from int8cli.report.text import printable_lines

    if not quiet:
        print(file=sys.stderr)
        for line in lines:
            print(printable_lines(line), file=sys.stderr)
