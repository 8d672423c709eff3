"""Graphics cards: their names, how much of their memory a model can use, and which units of a model fit on each.

Owns the table of cards, parsing of card names, detection of this machine's cards, and placement of whole units in
order. Does not know about models. 1 GiB is 2^30 bytes, 1 GB is 10^9 bytes. A card sold as 24 GB has 24 GiB.
"""

import difflib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from int8cli.errors import OptionError

GIB = 1 << 30
_MIB = 1 << 20
# torch sees about 1.5 % less memory than the driver reports. A CUDA context with cuBLAS takes about 0.5 GiB.
UNSEEN_SHARE = 0.015
CONTEXT_BYTES = 512 * _MIB
USABLE_RULE = "usable: what the driver reports less 1.5 %, less 0.5 GiB for the CUDA context"
MOST_CARDS = 4096
_QUERY_TIMEOUT_S = 5.0


class UnknownCardError(OptionError):
    """The text does not name a card in the table and is not a memory size."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message, option="gpu", hint=hint)


@dataclass(frozen=True, slots=True)
class Card:
    """One graphics card, with the memory that its driver reports."""

    name: str
    total_bytes: int

    @property
    def usable_bytes(self) -> int:
        return max(0, int(self.total_bytes * (1 - UNSEEN_SHARE)) - CONTEXT_BYTES)


@dataclass(frozen=True, slots=True)
class Load:
    """The memory that one unit of a model needs on its card. Units on the same card share the largest workspace."""

    name: str
    weight_bytes: int
    kv_bytes: int = 0
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """A card, and the units on it in order."""

    card: Card
    loads: tuple[Load, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(load.weight_bytes for load in self.loads)

    @property
    def kv_bytes(self) -> int:
        return sum(load.kv_bytes for load in self.loads)

    @property
    def workspace_bytes(self) -> int:
        return max((load.workspace_bytes for load in self.loads), default=0)

    @property
    def left_bytes(self) -> int:
        return self.card.usable_bytes - self.weight_bytes - self.kv_bytes - self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """Units on cards, in order. The units in `without` did not fit on any card."""

    cards: tuple[Placed, ...]
    without: tuple[Load, ...]

    @property
    def fits(self) -> bool:
        return not self.without


def _card(name: str, driver_mib: int) -> Card:
    return Card(name, driver_mib * _MIB)


# Memory as nvidia-smi (memory.total) or rocm-smi reports it, in MiB.
CARDS = (
    _card("RTX 4060", 8188),
    _card("RTX 3080", 10240),
    _card("RTX 2080 Ti", 11264),
    _card("RTX 3060", 12288),
    _card("RTX 4070", 12282),
    _card("T4", 15360),
    _card("V100 16GB", 16384),
    _card("RTX 4060 Ti 16GB", 16380),
    _card("RTX 4080", 16376),
    _card("RTX 5080", 16303),
    _card("RTX 3090", 24576),
    _card("RTX 4090", 24564),
    _card("A10", 23028),
    _card("L4", 23034),
    _card("V100 32GB", 32768),
    _card("RTX 5090", 32607),
    _card("A100 40GB", 40960),
    _card("RTX A6000", 49140),
    _card("L40S", 46068),
    _card("A100 80GB", 81920),
    _card("H100 80GB", 81559),
    _card("RTX PRO 6000", 97887),
    _card("H200", 143771),
    _card("B200", 183359),
    _card("MI300X", 196592),
)
# One of each size, for the table that is shown by default.
SHOWN_CARDS = (
    *("RTX 4060", "RTX 3060", "RTX 4080", "RTX 3090", "RTX 5090", "A100 40GB", "L40S", "A100 80GB", "H200", "B200"),
    "MI300X",
)
_UNITS = {"gib": GIB, "gb": 10**9, "mib": _MIB, "mb": 10**6}


def card_named(name: str) -> Card:
    """The card with exactly this name in the table."""
    return next(card for card in CARDS if card.name == name)


def parse_cards(text: str) -> tuple[Card, ...]:
    """The cards of one machine: `RTX 3090`, `24GiB`, `8x24GiB`, `2x A100 80GB, T4`. Raises UnknownCardError."""
    return tuple(card for part in text.split(",") for card in _cards_of_a_kind(part))


def _cards_of_a_kind(text: str) -> tuple[Card, ...]:
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?(\S.*?)\s*", text)
    count = int(match[1] or 1) if match else 0
    if match is None or not 1 <= count <= MOST_CARDS:
        raise UnknownCardError(f"{text!r} does not name a card", hint="For example: 'RTX 3090', 8x24GiB.")
    return (_parse_card(match[2]),) * count


def place(loads: Sequence[Load], cards: Sequence[Card]) -> Placement:
    """Put units on cards in order. Each card is filled before the next. Units are never split or reordered."""
    placed: list[Placed] = []
    waiting = list(loads)
    for card in cards:
        on_card: list[Load] = []
        while waiting and Placed(card, (*on_card, waiting[0])).left_bytes >= 0:
            on_card.append(waiting.pop(0))
        placed.append(Placed(card, tuple(on_card)))
    return Placement(tuple(placed), tuple(waiting))


def cards_needed(loads: Sequence[Load], card: Card) -> int | None:
    """The number of cards of one kind that all units need; None if a single unit is too large for the card."""
    cards, weight_bytes, workspace_bytes = 1, 0, 0
    for load in loads:
        own_bytes = load.weight_bytes + load.kv_bytes
        if own_bytes + load.workspace_bytes > card.usable_bytes:
            return None
        if weight_bytes + own_bytes + max(workspace_bytes, load.workspace_bytes) > card.usable_bytes:
            cards, weight_bytes, workspace_bytes = cards + 1, 0, 0
        weight_bytes += own_bytes
        workspace_bytes = max(workspace_bytes, load.workspace_bytes)
    return cards


def cards_of_this_machine() -> tuple[Card, ...]:
    """The cards that nvidia-smi reports; empty if it is not installed or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(card for line in answer.stdout.splitlines() if (card := _reported(line)))


def _reported(line: str) -> Card | None:
    name, comma, memory_mib = line.rpartition(",")
    name = re.sub(r"^NVIDIA (GeForce )?", "", name.strip())
    return _card(name, int(memory_mib)) if comma and memory_mib.strip().isdigit() else None


def _parse_card(text: str) -> Card:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb|mib|mb)", text, re.IGNORECASE)
    if size:
        return Card(text, int(float(size[1]) * _UNITS[size[2].lower()]))
    if re.fullmatch(r"\d+(\.\d+)?\s*g?", text, re.IGNORECASE) and len(re.sub(r"\D", "", text)) < 4:
        number = text.rstrip("gG ")
        raise UnknownCardError(
            f"{text!r} has no unit", hint=f"Write {number}GiB (2^30 bytes) or {number}GB (10^9 bytes)."
        )
    found = [card for card in CARDS if _key(text) == _key(card.name)]
    found = found or [card for card in CARDS if re.fullmatch(re.escape(_key(text)) + r"\d+gb", _key(card.name))]
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(card.name for card in found)
        raise UnknownCardError(f"{text!r} could mean {which}", hint="Name one of them, or give the memory: 24GiB.")
    close = difflib.get_close_matches(_key(text), {_key(card.name): card for card in CARDS}, n=1, cutoff=0.7)
    near = next((card.name for card in CARDS if close and _key(card.name) == close[0]), "")
    hint = f"Is it {near}? " if near else ""
    known = ", ".join(card.name for card in CARDS)
    hint += f"Known cards: {known}. Or give its memory, as in 24GiB."
    raise UnknownCardError(f"unknown card: {text!r}", hint=hint)


def _key(name: str) -> str:
    """A name without the parts that people leave out, so that `NVIDIA GeForce RTX 3090` and `3090` are equal."""
    plain = re.sub(r"nvidia|geforce|tesla|amd|instinct|[^a-z0-9]", "", name.lower())
    return plain.removeprefix("rtx")
