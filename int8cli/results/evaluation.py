"""What an evaluation found, as result objects and as one JSON document.

Owns the terms: what is compared with what, over which positions. Computes nothing but means of what it holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EVALUATION_SCHEMA = "int8cli.evaluation/1"
REFERENCE = "16-bit"  # the key of the model as it is, in its own dtype


@dataclass(frozen=True, slots=True)
class EvaluatedText:
    """The text, and what of it was used. `positions` are those at which the next token was predicted; 0 without."""

    name: str
    sha256: str
    tokens: int
    sequences: int
    sequence_length: int
    seed: int
    positions: int


@dataclass(frozen=True, slots=True)
class StoredColumnsSummary:
    """Where the outlier columns come from that are stored with the weights.

    `limit` is how many a linear layer keeps at most; None where a converted model brought its own. `text`, `tokens`:
    what they were calibrated on; empty and 0 where that is not known. `mean_columns`: how many a layer keeps.
    """

    limit: int | None
    text: str
    text_sha256: str
    tokens: int
    mean_columns: float


@dataclass(frozen=True, slots=True)
class Scores:
    """What a method predicts, over all positions of all sequences.

    `nats`: the mean negative log-likelihood of the text's tokens; `perplexity` is exp(nats). The others hold a method
    against the 16-bit model on the same sequences, and are None for that model itself and where it was not run:
    `nats_over_reference` the difference of nats, `standard_error` its standard error over sequences (None with fewer
    than two), `kl_divergence` the mean over positions of KL(16 bit ‖ method) in nats, `same_top_share` the share of
    positions where the most likely token is the same.
    """

    nats: float
    nats_by_sequence: tuple[float, ...]
    nats_over_reference: float | None = None
    standard_error: float | None = None
    kl_divergence: float | None = None
    same_top_share: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nats); infinite where that is beyond a float."""
        return math.exp(self.nats) if self.nats < 709.0 else math.inf


@dataclass(frozen=True, slots=True)
class LayerError:
    """The output error of one linear layer, ‖Y_method - Y‖ / ‖Y‖ over all its inputs, Y = X Wᵀ without the bias.

    X is what the layer gets in the 16-bit model: errors of layers before it are not in it. `kind` is the kind of its
    input (norm-fed, attention output, second feed-forward); `stack` and `layer` place its block, None outside of them.
    """

    name: str
    kind: str
    stack: str | None
    layer: int | None
    error: float


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method: its key and label, and what was found. `scores` is None for models that predict no next token;
    `layers`, in the model's order, is empty for the 16-bit model and where there is none to compare with."""

    key: str
    label: str
    scores: Scores | None
    layers: tuple[LayerError, ...]

    @property
    def mean_error(self) -> float | None:
        """The mean of the layers' errors."""
        return sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else None

    @property
    def worst_layer(self) -> LayerError | None:
        return max(self.layers, key=lambda layer: layer.error, default=None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All methods on one model and text, in the order of the table; the 16-bit model first where it was run.

    `converted`: the int8 tensors are those of a converted model, named `model`; `reference` is then the 16-bit model
    given beside it, None without. `int8_layers` are the linear layers that the methods compute in int8.
    `error_tokens`: how many tokens the layers' errors were measured on. `notes` are sentences for the reader.
    """

    model: str
    revision: str | None
    converted: bool
    reference: str | None
    dtype: str
    text: EvaluatedText
    threshold: float
    columns: StoredColumnsSummary | None
    int8_layers: int
    error_tokens: int
    methods: tuple[MethodResult, ...]
    notes: tuple[str, ...]
    seconds: float

    def method(self, key: str) -> MethodResult | None:
        return next((method for method in self.methods if method.key == key), None)

    @property
    def predicts(self) -> bool:
        """Whether there are perplexities: an encoder has output errors only."""
        return any(method.scores is not None for method in self.methods)


def evaluation_to_json(found: Evaluation) -> dict[str, Any]:
    """One JSON document; numbers are not rounded, what is not finite is null."""
    text, columns = found.text, found.columns
    return {
        "schema": EVALUATION_SCHEMA,
        "model": found.model,
        "revision": found.revision,
        "converted": found.converted,
        "reference": found.reference,
        "dtype": found.dtype,
        "text": {"name": text.name, "sha256": text.sha256},
        "tokens": text.tokens,
        "sequences": text.sequences,
        "sequence_length": text.sequence_length,
        "seed": text.seed,
        "positions": text.positions,
        "threshold": found.threshold,
        "stored_columns": None
        if columns is None
        else {
            "limit": columns.limit,
            "mean": columns.mean_columns,
            "text": {"name": columns.text, "sha256": columns.text_sha256},
            "tokens": columns.tokens,
        },
        "int8_layers": found.int8_layers,
        "error_tokens": found.error_tokens,
        "methods": [_method_to_json(method) for method in found.methods],
        "notes": list(found.notes),
        "seconds": found.seconds,
    }


def _method_to_json(method: MethodResult) -> dict[str, Any]:
    worst = method.worst_layer
    return {
        "key": method.key,
        "label": method.label,
        "scores": None if method.scores is None else _scores_to_json(method.scores),
        "mean_error": _number(method.mean_error),
        "worst_layer": None if worst is None else worst.name,
        "worst_error": None if worst is None else _number(worst.error),
        "layers": [_layer_to_json(layer) for layer in method.layers],
    }


def _scores_to_json(scores: Scores) -> dict[str, Any]:
    return {
        "perplexity": _number(scores.perplexity),
        "nats": _number(scores.nats),
        "nats_by_sequence": _numbers(scores.nats_by_sequence),
        "nats_over_reference": _number(scores.nats_over_reference),
        "standard_error": _number(scores.standard_error),
        "kl_divergence": _number(scores.kl_divergence),
        "same_top_share": _number(scores.same_top_share),
    }


def _layer_to_json(layer: LayerError) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "stack": layer.stack,
        "layer": layer.layer,
        "error": _number(layer.error),
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
