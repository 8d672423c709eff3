"""The width of keys and values, layer by layer, as the headers have it.

Owns the names of the projections that make them. What a config leaves to its class, or gives under a new name, stands
in the shape of k_proj and v_proj all the same.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from int8cli.estimate.config_fields import HEAD_WIDTH, Fields, language_model
from int8cli.estimate.units import MemoryUnit, last_stack
from int8cli.planning.decisions import Decision

_KEY = re.compile(r"(?:^|\.)(?:k_proj|key|wk|k|key_proj|to_k|k_lin|lin_k)$")
_VALUE = re.compile(r"(?:^|\.)(?:v_proj|value|wv|v|value_proj|to_v|v_lin|lin_v)$")
# All three in one, and what the attention's output passes through.
_FUSED = re.compile(r"^(?P<attention>.*\.)?(?:qkv_proj|Wqkv|wqkv|qkv|query_key_value|c_attn|W_pack|att_proj)$")
_OUTPUT = re.compile(r"^(?P<attention>.*\.)?(?:o_proj|out_proj|dense|c_proj|wo|attn_out|proj)$")
# Of what an encoder made, or of something other than attention over tokens.
_OTHER = re.compile(r"cross|enc_?dec|encoder_attn|linear_attn|indexer|compressor", re.IGNORECASE)

RowsByLayer = Sequence[int | None]


def key_value_rows(units: Iterable[MemoryUnit], config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Rows of the key and the value projection together, for each block that a cache belongs to, first to last.

    None for a block that has neither the two once each, nor one projection for queries, keys and values in which all
    heads are equally wide, as far as the config says.
    """
    alike = _heads_are_alike(language_model(config).fields)
    return tuple(_rows(unit.decisions, alike=alike) for unit in last_stack(units))


def _heads_are_alike(fields: Fields) -> bool:
    """Whether the heads of values are as wide as those of queries. If not, the output tells nothing of the queries."""
    width = fields.number(*HEAD_WIDTH, default=0)
    return fields.number("v_head_dim", default=width) == width


def _rows(decisions: Iterable[Decision], *, alike: bool) -> int | None:
    found: Mapping[re.Pattern[str], list[int]] = {_KEY: [], _VALUE: []}
    for decision in decisions:
        spec = decision.spec
        if len(spec.shape) != 2 or not spec.name.endswith(".weight") or _OTHER.search(decision.module):
            continue
        for pattern, rows in found.items():
            if pattern.search(decision.module):
                rows.append(decision.computed_shape[0])
    if not any(found.values()):
        return _fused_rows(decisions) if alike else None
    once = all(len(rows) == 1 for rows in found.values())
    return sum(rows[0] for rows in found.values()) if once else None


def _fused_rows(decisions: Iterable[Decision]) -> int | None:
    """What is left of a fused projection without the queries, which are as wide as the attention's output is."""
    fused, queries = dict[str, int](), dict[str, int]()
    for decision in decisions:
        if (
            len(decision.spec.shape) != 2
            or not decision.spec.name.endswith(".weight")
            or _OTHER.search(decision.module)
        ):
            continue
        out_features, in_features = decision.computed_shape
        if (match := _FUSED.search(decision.module)) is not None:
            fused[match["attention"]] = out_features
        elif (match := _OUTPUT.search(decision.module)) is not None:
            queries[match["attention"]] = in_features
    if len(fused) != 1:
        return None
    ((attention, rows),) = fused.items()
    left = rows - queries.get(attention, rows)
    return left if left > 0 and left % 2 == 0 else None
