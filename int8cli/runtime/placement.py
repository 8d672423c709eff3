"""Where the int8 weights of each block stay: on the computing device, in RAM, or on the disk.

Owns that decision, which depends on sizes alone. Knows no tensors and no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from int8cli.errors import NotEnoughGpuMemoryError, NotEnoughMemoryError, OptionError
from int8cli.model.memory import available_bytes
from int8cli.results.units import human_bytes

Place = Literal["device", "ram", "disk"]
# max_memory as accelerate takes it: GPU 0 and "cpu", in bytes or as "8GB".
MaxMemory = Mapping[Any, int | str]
# The share of the free memory for weights, if no limit is given. Activations and the KV cache need the rest.
_SHARE = 0.8
# The block that runs, and the next one, which is loaded meanwhile.
_BLOCKS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """Most bytes of weights: on the computing device and, if that is a GPU, in RAM."""

    device_bytes: int
    ram_bytes: int | None


@dataclass(frozen=True, slots=True)
class BlockPlacement:
    """The place of each block, by name, in the order in which they run; `block_bytes` are their int8 weights."""

    places: Mapping[str, Place]
    block_bytes: Mapping[str, int]
    fixed_bytes: int

    def bytes_in(self, place: Place) -> int:
        return sum(self.block_bytes[name] for name, found in self.places.items() if found == place)

    def blocks_in(self, place: Place) -> tuple[str, ...]:
        return tuple(name for name, found in self.places.items() if found == place)

    @property
    def moves(self) -> bool:
        """Whether some blocks are elsewhere than on the device, so that their weights are loaded each time they run."""
        return any(place != "device" for place in self.places.values())


def memory_limits(device: str, max_memory: MaxMemory | None) -> MemoryLimits:
    """The limits that the caller gave, or else four fifths of the free memory. Raises OptionError for a bad one."""
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise OptionError(f"{max_memory!r} does not say for which device: {{'cpu': '8GB'}} does", option="max_memory")
    allowed = {key: _in_bytes(size) for key, size in (max_memory or {}).items()}
    unknown = [key for key in allowed if key != "cpu" and not (device == "cuda" and key == 0)]
    if unknown:
        known = "'cpu' and 0, the GPU" if device == "cuda" else "'cpu'"
        raise OptionError(f"{unknown[0]!r} is not a device for weights here: use {known}", option="max_memory")
    if device == "cuda":
        return MemoryLimits(_allowed(allowed, 0, "cuda"), _allowed(allowed, "cpu", "cpu"))
    return MemoryLimits(_allowed(allowed, "cpu", "cpu"), None)


def _allowed(allowed: Mapping[int | str, int], key: int | str, device: str) -> int:
    if key in allowed:
        return allowed[key]
    free = available_bytes(device)
    return 2**62 if free is None else int(free * _SHARE)


def _in_bytes(size: int | str) -> int:
    from accelerate.utils import convert_file_size_to_int  # type: ignore[import-untyped]

    try:
        return int(convert_file_size_to_int(size))
    except (AttributeError, ValueError, OverflowError) as error:  # AttributeError: neither an int nor a str
        raise OptionError(f"{size!r} is not a size, such as '8GB' or '8GiB'", option="max_memory") from error


def place_blocks(block_bytes: Mapping[str, int], fixed_bytes: int, limits: MemoryLimits) -> BlockPlacement:
    """Whole blocks on the device as far as they fit, then in RAM, the rest on the disk.

    `fixed_bytes` are all weights but the int8 weights of blocks; they are always on the device. If a block is
    elsewhere, the device keeps room for two blocks. Raises NotEnoughMemoryError if the device has no room for both.
    """
    if fixed_bytes + sum(block_bytes.values()) <= limits.device_bytes:
        return BlockPlacement(dict.fromkeys(block_bytes, "device"), block_bytes, fixed_bytes)
    in_flight = min(_BLOCKS_AT_ONCE, len(block_bytes)) * max(block_bytes.values(), default=0)
    room = limits.device_bytes - fixed_bytes - in_flight
    if room < 0:
        kind = NotEnoughMemoryError if limits.ram_bytes is None else NotEnoughGpuMemoryError
        raise kind(
            f"embeddings, norms and the output head take {human_bytes(fixed_bytes)} and two blocks "
            f"{human_bytes(in_flight)}, but only {human_bytes(limits.device_bytes)} are allowed",
            hint="Allow more memory, or use a machine with more.",
        )
    places: dict[str, Place] = {}
    names = _fill(places, "device", list(block_bytes), block_bytes, room)
    if limits.ram_bytes is not None:
        on_disk = sum(block_bytes[name] for name in names) > limits.ram_bytes
        names = _fill(places, "ram", names, block_bytes, limits.ram_bytes - (in_flight if on_disk else 0))
    _fill(places, "disk", names, block_bytes, 2**62)
    return BlockPlacement(places, block_bytes, fixed_bytes)


def _fill(
    places: dict[str, Place], place: Place, names: Sequence[str], block_bytes: Mapping[str, int], room: int
) -> list[str]:
    """Place blocks in order until the next does not fit; returns those that are left."""
    for index, name in enumerate(names):
        if block_bytes[name] > room:
            return list(names[index:])
        places[name] = place
        room -= block_bytes[name]
    return []
