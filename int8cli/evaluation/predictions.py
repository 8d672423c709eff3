"""The predictions of a model on a text, and how those of each method differ from the 16-bit model's.

Owns which tokens are predicted, and the figures computed from logits. Only the 16-bit model's logits for one sequence
are in memory: the logits of all methods for the same sequence come next.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8cli.errors import NonFiniteError, UnsupportedModelError
from int8cli.results.evaluation import Scores

_CHUNK_ELEMENTS = 1 << 19  # 2 MB of float32, which fit in the cache: takes half as long as 16 MB


@dataclass(frozen=True, slots=True)
class Passage:
    """A model's inputs, and the tokens that its first logits predict, int64 (positions,); None if it predicts none."""

    inputs: Mapping[str, Any]
    targets: Tensor | None


def passages_of(model: Any, sequences: Sequence[Mapping[str, Any]]) -> list[Passage]:
    """The inputs and targets for each sequence.

    A decoder predicts each token from those before it. An encoder-decoder reads the first half of a sequence and
    predicts the second half. Encoders and models without an output head predict nothing.
    """
    kind = _kind(model)
    if kind == "decoder":
        return [Passage(inputs, inputs["input_ids"][0, 1:]) for inputs in sequences]
    if kind == "encoder-decoder":
        return [_continuation(inputs) for inputs in sequences]
    return [Passage(inputs, None) for inputs in sequences]


def _continuation(inputs: Mapping[str, Any]) -> Passage:
    tokens: Tensor = inputs["input_ids"]
    half = max(1, tokens.shape[1] // 2)
    read, wanted = tokens[:, :half], tokens[:, half:]
    start = inputs["decoder_input_ids"][:, :1]
    given = torch.cat([start, wanted[:, :-1]], dim=1)
    return Passage({**inputs, "input_ids": read, "decoder_input_ids": given}, wanted[0])


def _kind(model: Any) -> str | None:
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    if model.get_output_embeddings() is None:
        return None
    if name in _class_names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        return "encoder-decoder"
    decoders = _class_names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    decoders |= _class_names(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return "decoder" if name in decoders and not model.config.is_encoder_decoder else None


def _class_names(mapping: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for value in mapping.values():
        found |= set(value) if isinstance(value, (tuple, list)) else {value}
    return found


@dataclass(frozen=True, slots=True)
class _Figures:
    """Means over the positions of one sequence. The last two compare with the 16-bit model, None without it."""

    nats: float
    kl_divergence: float | None
    same_top_share: float | None


class Scorer:
    """Receives the logits of every method on every passage. For each passage, the first method comes first.

    `methods` is the number of methods. `has_reference` says whether the first one is the 16-bit model.
    """

    def __init__(self, passages: Sequence[Passage], methods: int, *, has_reference: bool) -> None:
        self._passages, self._methods, self._has_reference = passages, methods, has_reference
        self._figures: dict[tuple[int, int], _Figures] = {}
        self._reference: Tensor | None = None
        self._reference_of = -1

    def take(self, passage: int, method: int, output: Any) -> None:
        """Score the output of a forward pass. Raises NonFiniteError if the 16-bit model's logits are not finite."""
        logits: Tensor = output.logits[0] if hasattr(output, "logits") else output[0][0]  # (positions, vocabulary)
        targets = self._passages[passage].targets
        assert targets is not None
        logits = logits[: targets.numel()]
        if not self._has_reference:
            self._figures[passage, method] = _compare(logits, targets, None)
            return
        if method == 0:
            self._reference, self._reference_of = logits, passage
        if self._reference is None or self._reference_of != passage:
            raise UnsupportedModelError(
                "this model does not return logits in the order of its sequences, and they do not all fit in memory"
            )
        figures = _compare(logits, targets, self._reference if method else None)
        if method == 0 and not math.isfinite(figures.nats):
            raise NonFiniteError(
                "the predictions of the 16-bit model contain NaN or infinity",
                hint="It overflows on this text, or a weight is damaged. int8cli inspect-outliers shows where.",
            )
        self._figures[passage, method] = figures

    def scores(self, method: int) -> Scores | None:
        """The scores of a method over all passages; None if nothing was predicted."""
        found = [self._figures.get((passage, method)) for passage in range(len(self._passages))]
        figures = [each for each in found if each is not None]
        if not figures:
            return None
        nats = tuple(each.nats for each in figures)
        if method == 0 or not self._has_reference:
            return Scores(_mean(nats), nats)
        differences = [mine - self._figures[passage, 0].nats for passage, mine in enumerate(nats)]
        return Scores(
            _mean(nats),
            nats,
            _mean(differences),
            _standard_error(differences),
            _mean([each.kl_divergence or 0.0 for each in figures]),
            _mean([each.same_top_share or 0.0 for each in figures]),
        )


def _compare(logits: Tensor, targets: Tensor, reference: Tensor | None) -> _Figures:
    """The figures of one sequence from logits (positions, vocabulary). Processes a few positions at a time."""
    step = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
    nats = divergence = same = 0.0
    for start in range(0, targets.numel(), step):
        scores = logits[start : start + step].float()  # (positions, vocabulary)
        log_shares = torch.log_softmax(scores, dim=1)
        wanted = targets[start : start + step].to(scores.device)[:, None]
        nats -= float(log_shares.gather(1, wanted).double().sum())
        if reference is not None:
            exact = reference[start : start + step].float()
            top = exact.argmax(dim=1, keepdim=True)
            same += _same_top(scores, top)
            divergence += _kl_divergence(exact, top, log_shares)
    count = targets.numel()
    if reference is None:
        return _Figures(nats / count, None, None)
    return _Figures(nats / count, max(0.0, divergence / count), same / count)


def _kl_divergence(exact: Tensor, top: Tensor, log_shares: Tensor) -> float:
    """Σ p (log p - log q) over positions and vocabulary, where p is from the `exact` logits and log q is `log_shares`.

    `top` has the indices of the largest exact logits. Overwrites `exact`.
    """
    shares = torch.softmax(exact, dim=1)
    log_sum = exact.gather(1, top) - torch.log(shares.gather(1, top))  # (positions, 1)
    gaps = exact.sub_(log_sum).sub_(log_shares)
    found = torch.linalg.vecdot(shares, gaps)  # (positions,)
    if not bool(torch.isfinite(found).all()):  # both models exclude some tokens with -inf
        found = torch.linalg.vecdot(shares, gaps.masked_fill_(shares == 0, 0.0))
    return float(found.double().sum())


def _same_top(scores: Tensor, top: Tensor) -> int:
    """At how many positions the exact model's top token has the highest score, or ties for it, as 16-bit logits do."""
    return int((scores.gather(1, top) >= scores.amax(dim=1, keepdim=True)).sum())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values; None for a single value."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
