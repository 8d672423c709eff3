"""What smoothing did to a layer, as a plain object with a JSON form, and in total over all layers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from int8cli.llm_int8.limits import EXACT_STEPS, Steps


@dataclass(frozen=True, slots=True)
class LayerSmoothing:
    """The smoothing of one layer's input columns.

    `scaled` names the tensors that make the divided input. The divisors are from `smallest_divisor` to
    `largest_divisor`, chosen with `alpha`; `steps` of them are a factor of 2. If the layer was left alone, `reason`
    says why, and `scaled` is empty.
    """

    scaled: tuple[str, ...] = ()
    alpha: float | None = None
    smallest_divisor: float = 1.0
    largest_divisor: float = 1.0
    reason: str = ""
    steps: Steps = EXACT_STEPS

    @property
    def smoothed(self) -> bool:
        return bool(self.scaled)

    def to_json(self) -> dict[str, Any]:
        """Without `steps` where they are whole powers of two, as in files of earlier versions."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("steps", EXACT_STEPS)}


@dataclass(frozen=True, slots=True)
class SmoothingSummary:
    """How many layers were smoothed, how many 16-bit tensors took a division, and the others by reason.

    `steps` of a divisor are a factor of 2. Whole powers of two lose nothing.
    """

    layers: int
    smoothed: int
    scaled_tensors: int
    reasons: tuple[tuple[str, int], ...]
    steps: Steps = EXACT_STEPS

    @property
    def exact(self) -> bool:
        return self.steps == EXACT_STEPS

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "smoothed": self.smoothed,
            "scaled_tensors": self.scaled_tensors,
            "left_alone": [{"reason": reason, "layers": count} for reason, count in self.reasons],
            **({} if self.exact else {"steps": self.steps}),
        }


def summarize_smoothing(layers: Iterable[LayerSmoothing | None]) -> SmoothingSummary | None:
    """The summary of all layers; None if no smoothing was looked for."""
    found = [layer for layer in layers if layer is not None]
    if not found:
        return None
    reasons = Counter(layer.reason for layer in found if not layer.smoothed)
    scaled = {name for layer in found for name in layer.scaled}
    by_count = tuple(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])))
    steps = max((layer.steps for layer in found), default=EXACT_STEPS)
    return SmoothingSummary(len(found), sum(layer.smoothed for layer in found), len(scaled), by_count, steps)
