"""Generates text from a prompt, with a model and its tokenizer, and measures when each token comes.

Owns prompts, chat templates, sampling and time. Knows no directories; the model may be in int8 or in floats.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from int8cli.checkpoint.disk import raise_if_of_the_system
from int8cli.errors import CannotRunError, Int8cliError, TextError, UnsupportedModelError
from int8cli.results.generation import Stopped
from int8cli.runtime.stopping import ForwardStopped, Stop, stoppable

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Spoken:
    """New tokens, int64 (n,); their text; when each came, in seconds after the call; why they end.

    `stopped` is "end" if the model ended its text, "length" at the limit, "interrupted" if it was stopped on request.
    """

    ids: Tensor
    text: str
    times_s: tuple[float, ...]
    stopped: Stopped

    @property
    def tokens_per_second(self) -> float | None:
        """Over the tokens after the first; None if there is only one."""
        if len(self.times_s) < 2 or self.times_s[-1] <= self.times_s[0]:
            return None
        return (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])


class Speaker:
    """Continues prompts by a model with its tokenizer. `temperature` 0 takes the likeliest token each time."""

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float, seed: int) -> None:
        """Raises UnsupportedModelError for a model that does not generate text."""
        if not model.can_generate():
            raise UnsupportedModelError(f"a {type(model).__name__} does not generate text")
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed

    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def prompt(self, text: str) -> Tensor:
        """The tokens of a text to continue: int64 (1, n).

        Raises TextError for an empty text, CannotRunError if the tokenizer fails.
        """
        _require_unicode(text)
        with _rejections("the tokenizer cannot read the prompt", "Check the tokenizer's files."):
            found = self._tokenizer(text, return_tensors="pt")["input_ids"]
        return self._checked(found)

    def turn(self, messages: Sequence[dict[str, str]]) -> Tensor:
        """The tokens of a conversation up to the point where the model answers: int64 (1, n).

        Raises TextError for a message without words, CannotRunError for a chat template that does not work.
        """
        return self._checked(self._rendered(messages))

    def latest_turn(self, messages: Sequence[dict[str, str]]) -> tuple[Tensor, int]:
        """`turn` without the oldest pairs of messages, if there is no room for an answer, and how many were left out.

        The last message is always there. Raises what `turn` raises.
        """
        answer = 0 if self._limit is None else min(self._max_new_tokens, self._limit // 2)
        for left_out in range(0, len(messages) - 1, 2):
            ids = self._rendered(messages[left_out:])
            if self._limit is None or ids.shape[1] + answer <= self._limit:
                return self._checked(ids), left_out
        return self.turn(messages[-1:]), len(messages) - 1

    def _rendered(self, messages: Sequence[dict[str, str]]) -> Tensor:
        for message in messages:
            _require_unicode(message["content"])
        if not messages[-1]["content"].strip():
            raise _empty()
        with _rejections("the chat template does not work", "Without it, the model can continue a text."):
            found: Tensor = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        return found

    def speak(self, prompt: Tensor, on_text: OnText | None = None, stop: Stop | None = None) -> Spoken:
        """Continue a prompt. `on_text` gets the text in pieces as it comes, and an empty piece at its end.

        `stop` is asked before each block of the model: once it returns True, what has come until then is the result.
        Raises CannotRunError if the model cannot be run as generation_config.json and the options say.
        """
        streamer = _Clock(self._tokenizer, on_text)
        prompt = prompt.to(self._model.device)
        rejected = _rejections("the model cannot generate", "Check generation_config.json and the temperature.")
        interrupted = False
        with rejected, torch.inference_mode(), torch.random.fork_rng(), stoppable(self._model, stop):
            torch.manual_seed(self._seed)
            try:
                self._model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **self._options(prompt.shape[1])
                )
            except ForwardStopped:
                interrupted = True
                streamer.end()  # type: ignore[no-untyped-call]
        ids = torch.tensor(streamer.ids, dtype=torch.int64)
        stopped: Stopped = "interrupted" if interrupted else "end" if self._ends(ids) else "length"
        return Spoken(ids, streamer.text, tuple(streamer.times_s), stopped)

    def likeliest(self, prompt: Tensor, ids: Tensor) -> Tensor:
        """The likeliest token for this model at each place of `ids`, given the tokens before it: int64 (n,)."""
        prompt, ids = prompt.to(self._model.device), ids.to(self._model.device)
        with torch.inference_mode():
            if self._model.config.is_encoder_decoder:
                begin = torch.full((1, 1), self._model.generation_config.decoder_start_token_id, device=ids.device)
                decoded = torch.cat([begin, ids[None, :-1]], dim=1)
                logits = self._model(input_ids=prompt, decoder_input_ids=decoded).logits
            else:
                logits = self._model(torch.cat([prompt, ids[None, :-1]], dim=1)).logits[:, prompt.shape[1] - 1 :]
        found: Tensor = logits[0].argmax(dim=-1).cpu()
        return found

    def _checked(self, ids: Tensor) -> Tensor:
        if not ids.shape[1]:
            raise _empty()
        if self._limit is not None and ids.shape[1] >= self._limit:
            raise TextError(
                f"the prompt has {ids.shape[1]:,} tokens; this model takes fewer than {self._limit:,}",
                hint="Give less text.",
            )
        return ids

    @property
    def _limit(self) -> int | None:
        """The most tokens, old and new, that the model takes; None if its config does not say."""
        found: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return found

    def _options(self, prompt_tokens: int) -> dict[str, Any]:
        room = self._max_new_tokens if self._limit is None else min(self._max_new_tokens, self._limit - prompt_tokens)
        options: dict[str, Any] = {"max_new_tokens": room, "num_beams": 1, "pad_token_id": self._padding()}
        if self._temperature > 0.0:
            return {**options, "do_sample": True, "temperature": self._temperature}
        return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def _padding(self) -> int | None:
        """The token for padding or, if there is none, the one that ends a text. Without either, transformers warns."""
        configured = self._model.generation_config.pad_token_id
        if configured is not None:
            return int(configured)
        return self._end_tokens()[0] if self._end_tokens() else None

    def _end_tokens(self) -> list[int]:
        end = self._model.generation_config.eos_token_id
        return [end] if isinstance(end, int) else list(end or ())

    def _ends(self, ids: Tensor) -> bool:
        return bool(ids.numel()) and int(ids[-1]) in self._end_tokens()


def _empty() -> TextError:
    return TextError("the prompt is empty", hint="Give some text to continue or to answer.")


def _require_unicode(text: str) -> None:
    """Raise TextError for half a surrogate pair: bytes of the command line that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError("the prompt is not UTF-8 text", hint="Convert it first: iconv -f LATIN1 -t UTF-8.") from error


@contextmanager
def _rejections(problem: str, hint: str) -> Iterator[None]:
    """Raise CannotRunError for whatever the model's own files make transformers raise."""
    try:
        yield
    except (Int8cliError, OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise_if_of_the_system(error)
        raise CannotRunError(f"{problem}: {type(error).__name__}: {error!s:.300}", hint=hint) from error


class _Clock(TextStreamer):
    """Records each token and when it comes, and passes its text on."""

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._begin_s = on_text, time.perf_counter()
        self.ids: list[int] = []
        self.times_s: list[float] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            tokens = value.flatten().tolist()  # several at once, if generation_config.json asks for a lookup
            self.ids += tokens
            self.times_s += [time.perf_counter() - self._begin_s] * len(tokens)
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self._on_text is not None:
            if text:
                self._on_text(text)
            if stream_end:
                self._on_text("")
