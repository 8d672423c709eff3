"""What a conversion takes on several machines like this one, before any weight is read.

Owns how the time of a part follows from the rates of one machine. The division is that of the conversion itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from int8cli.estimate.ways import DISK_BYTES_A_SECOND, conversion_s
from int8cli.machine.speed import Speed
from int8cli.planning.share import Share
from int8cli.planning.survey import Survey


@dataclass(frozen=True, slots=True)
class OnMachines:
    """A conversion by so many machines, each with one part. The figures are those of the largest part.

    `source_bytes` are read, `output_bytes` written by its machine, in `shards`. `seconds` is None where the speed of
    this machine is not known; `transfer_s`, the time in which the source arrives, where that of the network is not.
    """

    machines: int
    shards: int
    source_bytes: int
    output_bytes: int
    transfer_s: float | None
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def on_machines(
    survey: Survey,
    counts: Sequence[int],
    speed: Speed | None,
    network_bytes_a_second: float | None,
    disk_bytes_a_second: float = DISK_BYTES_A_SECOND,
) -> tuple[OnMachines, ...]:
    """One answer for each of `counts`. `network_bytes_a_second` is what each machine gets of the source."""
    return tuple(_on(survey, count, speed, network_bytes_a_second, disk_bytes_a_second) for count in counts)


def _on(survey: Survey, machines: int, speed: Speed | None, network: float | None, disk: float) -> OnMachines:
    """While a shard is converted the next one arrives: the slower of the two counts, and the other for one shard."""
    sizes = {contents.file_name: contents.file_bytes for contents in survey.shards}
    parts = [Share(part, machines).of(sizes) for part in range(1, min(machines, len(sizes)) + 1)]
    largest = max(parts, key=lambda names: sum(sizes[name] for name in names), default=())
    source_bytes = sum(sizes[name] for name in largest)
    transfer_s = source_bytes / network if network is not None else None
    seconds = conversion_s(source_bytes, speed, disk) if speed is not None else None
    if seconds is not None and transfer_s is not None:
        seconds = max(seconds, transfer_s) + min(seconds, transfer_s) / max(1, len(largest))
    output_bytes = sum(survey.outputs[name].file_bytes for name in largest)
    return OnMachines(machines, len(largest), source_bytes, output_bytes, transfer_s, seconds)
