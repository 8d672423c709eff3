"""Generate text with a converted model: continue a prompt, or answer in a conversation."""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8cli.checkpoint.disk import system_errors
from int8cli.commands.checks import check_device, check_generate
from int8cli.commands.options import GenerateOptions
from int8cli.errors import CannotRunError
from int8cli.model.extra import require_transformers, without_progress_bars
from int8cli.model.memory import peak_bytes, return_memory_promptly
from int8cli.model.text import load_tokenizer
from int8cli.progress import SILENT, Progress
from int8cli.results.generation import Agreement, Generation
from int8cli.runtime.reference import check_reference, load_reference

if TYPE_CHECKING:
    from torch import Tensor

    from int8cli.runtime.speaker import Speaker, Spoken

_DEFAULTS = GenerateOptions()
_MALLOC_KEEPS_BYTES = 32 << 20  # as for `evaluate`: smaller temporaries are reused
OnText = Callable[[str], None]


@system_errors()
def generate(
    directory: str | Path,
    prompt: str,
    options: GenerateOptions = _DEFAULTS,
    *,
    on_text: OnText | None = None,
    progress: Progress = SILENT,
) -> Generation:
    """Continue a prompt with the model in a directory that `convert` wrote.

    `on_text` gets the text in pieces as it comes, and an empty piece at its end. The prompt is put into the tokenizer's
    chat template where there is one, unless `raw`. The model may be larger than the machine: what does not fit is read
    from the disk for each token, as `load_model` does with `device_map="auto"`. With `compare`, the 16-bit model runs
    on the same prompt afterwards, once the int8 model has left the memory. Raises what `load_model` raises,
    CannotRunError without a tokenizer, TextError, ReferenceModelError.
    """
    session = _open(Path(directory), options, progress)
    speaker = session.speaker
    ids = speaker.prompt(prompt) if options.raw or not speaker.has_chat_template() else speaker.turn([_user(prompt)])
    spoken = speaker.speak(ids, on_text)
    found = session.result(ids, spoken)
    if options.compare is None:
        return found
    session.forget()
    del speaker
    progress.note(f"running {options.compare} on the same prompt")
    return replace(found, agreement=_agreement(str(options.compare), session, ids, spoken))


def chat(
    directory: str | Path,
    messages: Iterable[str],
    options: GenerateOptions = _DEFAULTS,
    *,
    on_text: OnText | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Progress = SILENT,
) -> Iterator[Generation]:
    """A conversation: an answer to each message, given all that was said before. Loads the model once.

    `stop` is asked before each block of the model. Once it returns True, the answer ends there, and the conversation
    goes on with what has come of it; if nothing has, the message counts as not sent.
    Of a conversation that is longer than the model takes, the oldest messages are left out; `progress` gets a note.
    Raises what `generate` raises, and CannotRunError for a tokenizer without a chat template.
    """
    with system_errors():  # around a generator, it would end before the first answer
        yield from _answers(directory, messages, options, on_text, stop, progress)


def _answers(
    directory: str | Path,
    messages: Iterable[str],
    options: GenerateOptions,
    on_text: OnText | None,
    stop: Callable[[], bool] | None,
    progress: Progress,
) -> Iterator[Generation]:
    session = _open(Path(directory), options, progress)
    if not session.speaker.has_chat_template():
        raise CannotRunError(
            f"the tokenizer of {directory} has no chat template", hint="The model can continue a text instead."
        )
    said: list[dict[str, str]] = []
    left_out = 0
    for message in messages:
        said.append(_user(message))
        before = left_out
        ids, left_out = session.speaker.latest_turn(said)
        if left_out > before:
            progress.note(f"the conversation is too long: the model no longer sees its first {left_out} messages")
        spoken = session.speaker.speak(ids, on_text, stop)
        if spoken.ids.numel():
            said.append({"role": "assistant", "content": spoken.text})
        else:
            said.pop()
        yield session.result(ids, spoken)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@dataclass(slots=True)
class _Session:
    """A loaded model; `forget` frees its memory."""

    directory: Path
    options: GenerateOptions
    device: Any
    tokenizer: Any
    weights_bytes: int
    speaker: "Speaker"

    def result(self, ids: "Tensor", spoken: "Spoken") -> Generation:
        return Generation(
            model=self.directory.name,
            prompt_tokens=ids.shape[1],
            text=spoken.text,
            new_tokens=spoken.ids.numel(),
            stopped=spoken.stopped,
            seconds_to_first_token=spoken.times_s[0] if spoken.times_s else None,
            seconds=spoken.times_s[-1] if spoken.times_s else 0.0,
            tokens_per_second=spoken.tokens_per_second,
            weights_bytes=self.weights_bytes,
            peak_memory_bytes=peak_bytes("cpu"),
            peak_gpu_bytes=peak_bytes("cuda") if self.device.type == "cuda" else None,
            device=self.device.type,
        )

    def forget(self) -> None:
        del self.speaker
        gc.collect()


def _open(directory: Path, options: GenerateOptions, progress: Progress) -> _Session:
    check_generate(options)
    if options.device is not None:
        check_device(options.device)
    require_transformers()
    if options.compare is not None:
        check_reference(str(options.compare))
    return_memory_promptly(_MALLOC_KEEPS_BYTES)
    from int8cli.runtime.load import load_model

    with without_progress_bars():
        model = load_model(
            directory,
            inputs=options.inputs,
            device=options.device,
            device_map="auto",
            max_memory=_limits(options.max_memory),
            progress=progress,
        )
    tokenizer = load_tokenizer(directory)
    return _Session(
        directory, options, model.device, tokenizer, _weights_bytes(model), _speaker(model, tokenizer, options)
    )


def _speaker(model: Any, tokenizer: Any, options: GenerateOptions) -> "Speaker":
    from int8cli.runtime.speaker import Speaker

    return Speaker(
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )


def _limits(max_memory: tuple[str, ...]) -> dict[int | str, int | str] | None:
    """`cpu=8GB` and `0=10GB`, after `check_generate`."""
    pairs = (entry.split("=", 1) for entry in max_memory)
    return {int(device) if device.isdecimal() else device: size for device, size in pairs} or None


def _weights_bytes(model: Any) -> int:
    return int(model.get_memory_footprint())


def _agreement(source: str, session: _Session, ids: "Tensor", spoken: "Spoken") -> Agreement:
    with without_progress_bars():
        model = load_reference(source, session.device)
    speaker = _speaker(model, session.tokenizer, session.options)
    theirs = speaker.speak(ids)
    same = int((speaker.likeliest(ids, spoken.ids) == spoken.ids).sum())
    return Agreement(
        source=source,
        text=theirs.text,
        new_tokens=theirs.ids.numel(),
        first_difference=_first_difference(spoken.ids.tolist(), theirs.ids.tolist()),
        agreeing_tokens=same,
        tokens_per_second=theirs.tokens_per_second,
        weights_bytes=_weights_bytes(model),
    )


def _first_difference(ours: list[int], theirs: list[int]) -> int | None:
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
