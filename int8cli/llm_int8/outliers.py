"""Which dimensions of the inputs of linear layers have outliers, from their statistics.

Owns the definitions: which dimensions are systematic outlier features [LLM.int8(), section 4], and which values are
massive activations [Sun et al. 2024, arXiv:2402.17762]. Knows no model, layer name or file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from int8cli.llm_int8.inputs import InputSummary

LAYER_SHARE = 0.25
POSITION_SHARE = 0.06
# A massive value is at least 100 and a thousand times the median magnitude around it [Sun et al. 2024].
MASSIVE_MAGNITUDE = 100.0
MASSIVE_RATIO = 1000.0
_SHARE_SLACK = 1e-6  # shares are float32


@dataclass(frozen=True, slots=True)
class OutlierFeature:
    """One dimension of the residual stream that has outliers in many layers, by the paper's criteria.

    `layers` are indices into the given layers. `position_share` is the share of positions at which the dimension
    reaches the threshold, averaged over all sites; `peak_share` is the largest one. `largest` is the largest |x|.
    """

    dimension: int
    layers: tuple[int, ...]
    layer_share: float
    position_share: float
    peak_share: float
    largest: float
    sign: str


def systematic_features(
    layers: Sequence[Sequence[InputSummary]],
    *,
    layer_share: float = LAYER_SHARE,
    position_share: float = POSITION_SHARE,
) -> tuple[OutlierFeature, ...]:
    """Dimensions with |x| >= threshold in at least `layer_share` of the layers and `position_share` of the positions.

    `layers` has, for each layer, the summaries of its norm-fed sites, all over the same index space. A dimension counts
    for a layer if it reaches the threshold anywhere at one of these sites. Positions are counted over all sites of all
    layers. The most widespread features come first. [LLM.int8(), section 4.1, which also leaves out the inputs of the
    second feed-forward layers]
    """
    if not layers:
        return ()
    by_layer = torch.stack([torch.stack([site.share_over for site in sites]).amax(dim=0) for sites in layers])
    mean_share = torch.stack([site.share_over for sites in layers for site in sites]).double().mean(dim=0)
    present = by_layer > 0  # (layers, features)
    enough = (present.sum(dim=0) >= layer_share * len(layers)) & (mean_share >= position_share - _SHARE_SLACK)
    found = []
    for dimension in enough.nonzero().squeeze(1).tolist():
        where = present[:, dimension].nonzero().squeeze(1).tolist()
        sites = [site for layer in where for site in layers[layer]]
        found.append(
            OutlierFeature(
                dimension=dimension,
                layers=tuple(where),
                layer_share=len(where) / len(layers),
                position_share=float(mean_share[dimension]),
                peak_share=float(by_layer[:, dimension].max()),
                largest=max(float(site.absmax[dimension]) for site in sites),
                sign=_joint_sign([site.sign(dimension) for site in sites]),
            )
        )
    return tuple(sorted(found, key=lambda feature: (-len(feature.layers), -feature.position_share, feature.dimension)))


@dataclass(frozen=True, slots=True)
class MassiveActivation:
    """A dimension that reaches a magnitude far beyond all others, usually at one position only.

    `value` is the extreme value, `position` its place in the sequence. `later` is the largest |x| after position 0.
    """

    dimension: int
    value: float
    position: int
    later: float


def massive_activations(summary: InputSummary) -> tuple[MassiveActivation, ...]:
    """The dimensions with massive activations, largest first: |x| > 100 and > 1000 times the median |x|."""
    absmax = summary.absmax
    massive = absmax > max(MASSIVE_MAGNITUDE, MASSIVE_RATIO * summary.median)
    found = [
        MassiveActivation(
            dimension,
            float(max(summary.maximum[dimension], summary.minimum[dimension], key=abs)),
            int(summary.absmax_position[dimension]),
            float(summary.absmax_later[dimension]),
        )
        for dimension in massive.nonzero().squeeze(1).tolist()
    ]
    return tuple(sorted(found, key=lambda activation: (-abs(activation.value), activation.dimension)))


def _joint_sign(signs: Sequence[str]) -> str:
    found = set(signs) - {""}
    return next(iter(found)) if len(found) == 1 else "±" if found else ""
