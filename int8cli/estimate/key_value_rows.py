"""The width of keys and values, layer by layer, as the headers have it.

Owns the names of the projections that make them. What a config leaves to its class, or gives under a new name, stands
in the shape of k_proj and v_proj all the same.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from int8cli.estimate.units import MemoryUnit, last_stack
from int8cli.planning.decisions import Decision

_KEY = re.compile(r"(?:^|\.)(?:k_proj|key|wk|k|key_proj|to_k|k_lin|lin_k)$")
_VALUE = re.compile(r"(?:^|\.)(?:v_proj|value|wv|v|value_proj|to_v|v_lin|lin_v)$")
# Of what an encoder made, or of something other than attention over tokens.
_OTHER = re.compile(r"cross|enc_?dec|encoder_attn|linear_attn|indexer|compressor", re.IGNORECASE)

RowsByLayer = Sequence[int | None]


def key_value_rows(units: Iterable[MemoryUnit]) -> tuple[int | None, ...]:
    """Rows of the key and the value projection together, for each block that a cache belongs to, first to last.

    None for a block in which the two do not stand apart, once each.
    """
    return tuple(_rows(unit.decisions) for unit in last_stack(units))


def _rows(decisions: Iterable[Decision]) -> int | None:
    found: Mapping[re.Pattern[str], list[int]] = {_KEY: [], _VALUE: []}
    for decision in decisions:
        spec = decision.spec
        if len(spec.shape) != 2 or not spec.name.endswith(".weight") or _OTHER.search(decision.module):
            continue
        for pattern, rows in found.items():
            if pattern.search(decision.module):
                rows.append(spec.shape[1] if decision.transpose else spec.shape[0])
    once = all(len(rows) == 1 for rows in found.values())
    return sum(rows[0] for rows in found.values()) if once else None
