"""Text into sequences of tokens, as the model's own tokenizer makes them.

Owns which part of a text is used, and which texts cannot be used. The choice depends on the seed alone.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from int8cli.checkpoint.config_file import CONFIG_FILE, read_config
from int8cli.checkpoint.disk import is_panic, raise_if_of_the_system
from int8cli.checkpoint.source import Source
from int8cli.errors import CannotRunError, ShortTextError, TextError
from int8cli.model.extra import require_transformers
from int8cli.model.sampling import Sampling

_PUT_FILES = "Put the tokenizer files (tokenizer.json) in the directory of the weights."
_BYTES_A_TOKEN = 64  # more than any tokenizer needs; the rest of a longer text is not read
_LEAST_BYTES = 1 << 20
_MOST_SPECIAL_TOKENS = 16  # what a tokenizer puts around a text
_LONGEST_MESSAGE = 1000
_PROBE = "The quick brown fox"


@dataclass(frozen=True, slots=True)
class Text:
    """A text and its name. `sha256` is the digest of the bytes that are used."""

    name: str
    text: str
    sha256: str

    @classmethod
    def decode(cls, name: str, data: bytes) -> "Text":
        """Raises TextError if the bytes are not UTF-8, or only white space."""
        if b"\0" in data:
            raise TextError(
                f"{name} is not text: byte 0x00 at offset {data.index(0):,}",
                hint="Give a file of plain UTF-8 text.",
            )
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TextError(
                f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start:,}",
                hint="Convert it first: iconv -f LATIN1 -t UTF-8.",
            ) from error
        if not text.strip():
            raise TextError(f"{name} is empty", hint="Give plain text of the kind that the model is used for.")
        return cls(name, text, hashlib.sha256(data).hexdigest())

    @classmethod
    def read(cls, path: Path, tokens: int) -> "Text":
        """Read as much of a file as `tokens` tokens can need. Raises TextError if it cannot be read or used."""
        limit = max(_LEAST_BYTES, tokens * _BYTES_A_TOKEN)
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}", hint="Give a file of plain text.") from error
        if len(data) > limit:  # end at a whole character
            data = data[:limit].rsplit(b"\n", 1)[0]
        return cls.decode(path.name, data)


def sequences_of(text: Text, directory: Path, config: Any, sampling: Sampling) -> list[dict[str, Any]]:
    """Inputs of a model's forward: sequences of exactly the sampling's length, or the model's maximum if that is less.

    The text is cut into pieces. The seed chooses as many as the sampling needs, or all if there are fewer; they stay in
    order. Each gets the special tokens that the tokenizer puts around a text. Raises TextError if the text is too short
    for one sequence, CannotRunError without a tokenizer.
    """
    tokenizer = load_tokenizer(directory)
    before, after = _special_tokens(tokenizer)
    length = _length(config, sampling)
    body = length - len(before) - len(after)
    if body < 1:
        raise ShortTextError(
            f"sequences of {length} tokens are too short for text and the special tokens of this tokenizer"
        )
    ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
    if not pieces:
        raise ShortTextError(
            f"{text.name} has {len(ids)} tokens, but a sequence needs {body}",
            hint=f"Give a longer text, or sequences of {max(1, len(ids) + length - body)} tokens.",
        )
    count = max(1, sampling.tokens // length)
    if len(pieces) > count:
        chosen = sorted(random.Random(sampling.seed).sample(range(len(pieces)), count))
        pieces = [pieces[index] for index in chosen]
    return [_inputs([*before, *piece, *after], config) for piece in pieces]


def require_bytes_for_a_sequence(text: Text, source: Source, sampling: Sampling) -> None:
    """Raise ShortTextError for a text of fewer bytes than a sequence has tokens: a tokenizer makes at most one of each.

    Needs no tokenizer, and tells at once what `sequences_of` would tell after the import of transformers.
    """
    config = SimpleNamespace(**read_config(source)) if CONFIG_FILE in source.list_files() else None
    length, size = _length(config, sampling), len(text.text.encode(errors="surrogatepass"))
    if size < length - _MOST_SPECIAL_TOKENS:
        raise ShortTextError(
            f"{text.name} has {size:,} bytes, too few for a sequence of {length:,} tokens",
            hint="Give a longer text, or use shorter sequences.",
        )


def _length(config: Any, sampling: Sampling) -> int:
    """Tokens of a sequence: no more than the model takes, nor than are wanted in all."""
    wanted = max(2, min(sampling.sequence_length, sampling.tokens))
    return min(wanted, _longest(config, wanted))


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer, never with its own code. Raises CannotRunError if there is none."""
    require_transformers()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        has_words, returns_tokens = _has_words(tokenizer), bool(tokenizer(_PROBE)["input_ids"])
    except BaseException as error:  # damaged or missing tokenizer files may raise anything, panics too
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise_if_of_the_system(error)
        raise CannotRunError(f"the tokenizer cannot be loaded: {_in_a_line(error)}", hint=_PUT_FILES) from error
    if not has_words:
        raise CannotRunError("the tokenizer cannot be loaded: it has no vocabulary", hint=_PUT_FILES)
    if not returns_tokens:
        raise CannotRunError("the tokenizer returns no tokens for text")
    return tokenizer


def _has_words(tokenizer: Any) -> bool:
    """False for a tokenizer without a vocabulary, which transformers 5.0.0 returns if the files are missing."""
    return len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - {"▁"}) > 0


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _longest(config: Any, default: int) -> int:
    """How many positions a model has. RoBERTa's table has two more: its positions begin after the padding index."""
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(found, int) or found <= 0:
        return default
    padding = getattr(config, "pad_token_id", None)
    return max(1, found - (padding or 0) - 1) if _offset_positions(config) else found


def _offset_positions(config: Any) -> bool:
    return getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "esm"}


def _inputs(ids: Sequence[int], config: Any) -> dict[str, Any]:
    """A forward's arguments. A decoder beside an encoder gets the same text, shifted by its start token."""
    import torch

    tokens = torch.tensor([list(ids)])
    if not getattr(config, "is_encoder_decoder", False):
        return {"input_ids": tokens, "use_cache": False}
    start = next(
        (
            value
            for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
            if isinstance(value := getattr(config, name, None), int)
        ),
        0,
    )
    shifted = torch.cat([torch.tensor([[start]]), tokens[:, :-1]], dim=1)
    return {"input_ids": tokens, "decoder_input_ids": shifted, "use_cache": False}


def _in_a_line(error: BaseException) -> str:
    """All that an error says, in one line; of a very long one the start."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= _LONGEST_MESSAGE else f"{words[: _LONGEST_MESSAGE - 1]}…"
