"""The memory that a checkpoint's tensors need after loading, at each precision.

Owns what loading changes: a weight with two names counts once, leftovers of older versions do not count, some weights
stay in float32, and some tables (rotary frequencies, position ids) are created. The sizes of weights hold for every
version of transformers. Those of tables are an upper bound, because versions create more or fewer of them.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from int8cli.checkpoint.tensor import StoredTensor, TensorSpec
from int8cli.estimate.asking import ConfigClass
from int8cli.estimate.config_fields import (
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    LENGTH,
    WIDTH,
    Fields,
    MissingFieldError,
    language_model,
)
from int8cli.loaders.class_defaults import ties_head
from int8cli.loaders.config_class import NoConfigClassError
from int8cli.planning import reasons as why
from int8cli.planning.decisions import Decision
from int8cli.planning.output_files import output_specs

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Causal masks and frequencies that older versions saved. Current versions compute them or do not need them.
_LEFTOVER = re.compile(r"\.masked_bias$|rotary_emb\.inv_freq$|(?:^|\.)(?:position_ids|token_type_ids)$")
# Layers for multi-token prediction: apart (`mtp`), or numbered on after the model's own.
_PREDICTION = re.compile(r"(?:model\.|language_model\.)*mtp(?:_\w+)?\.")
_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.(?P<index>\d+)\.")
_MASK = re.compile(r"(?:attn|attention)\.bias$")
# transformers keeps these in float32 whatever dtype is requested (`_keep_in_fp32_modules_strict`).
_FLOAT32 = re.compile(r"\.e_score_correction_bias$")


@dataclass(frozen=True, slots=True)
class Weights:
    """Sizes of some tensors in bytes. `stored_bytes` is the size on disk, all others are sizes in memory.

    An LLM.int8() model consists of the int8 data, its float32 scales, and the rest, which is in the dtype on disk:
    transformers loads a quantized checkpoint in the dtypes of its file, whatever dtype is requested.
    """

    parameters: int = 0
    stored_bytes: int = 0
    float32_bytes: int = 0
    float16_bytes: int = 0
    int8_data_bytes: int = 0
    int8_scale_bytes: int = 0
    int8_rest_bytes: int = 0

    @property
    def int8_bytes(self) -> int:
        return self.int8_data_bytes + self.int8_scale_bytes + self.int8_rest_bytes

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @classmethod
    def total(cls, each: Iterable["Weights"]) -> "Weights":
        sums = cls()
        for weights in each:
            sums += weights
        return sums


def bytes_in_file(stored: StoredTensor) -> int:
    """The size of a tensor on disk: of 8-bit floats the codes and their part of the scales."""
    spec, scaled = stored.spec, stored.scaled
    if scaled is None:
        return spec.nbytes
    whole = scaled.codes.spec
    return (whole.nbytes + scaled.scales.spec.nbytes) * spec.numel // whole.numel


def weights_of(decision: Decision, stored_bytes: int, *, in_memory: bool) -> Weights:
    """The sizes of one tensor with its size on disk. One that is not `in_memory` counts only there."""
    spec = decision.spec
    if not in_memory:
        return Weights(stored_bytes=stored_bytes)
    if spec.dtype not in _FLOATS:
        return Weights(0, stored_bytes, spec.nbytes, spec.nbytes, int8_rest_bytes=spec.nbytes)
    float32_bytes = 4 * spec.numel
    always_float32 = decision.float32 == why.FLOAT32_ALWAYS or _FLOAT32.search(spec.name) is not None
    float16_bytes = float32_bytes if always_float32 or decision.float32 is not None else 2 * spec.numel
    float32_in_memory = always_float32 or (decision.float32 is not None and spec.dtype == "F16")
    written = {made.dtype: made.nbytes for made in output_specs(decision)}
    if not decision.quantize:
        rest_bytes = float32_bytes if float32_in_memory else sum(written.values())
        return Weights(spec.numel, stored_bytes, float32_bytes, float16_bytes, int8_rest_bytes=rest_bytes)
    # The third tensor, weight_format, is dropped after loading.
    return Weights(spec.numel, stored_bytes, float32_bytes, float16_bytes, written["I8"], written["F32"])


def names_not_in_memory(
    decisions: Iterable[Decision], config: Mapping[str, Any], config_class: ConfigClass
) -> frozenset[str]:
    """The tensors that are in the file but not in memory: leftovers, and second names of a shared weight.

    The class of the config is asked if only it knows whether a stored head is one.
    """
    decisions = tuple(decisions)
    specs = {decision.spec.name: decision.spec for decision in decisions}
    embeddings = {d.spec.shape for d in decisions if d.reason in (why.EMBEDDING, why.MAYBE_EMBEDDING)}
    stored_head = any(d.reason == why.HEAD and d.spec.shape in embeddings for d in decisions)
    heads = (why.HEAD, why.TIED_HEAD) if stored_head and _ties_head(config, config_class) else (why.TIED_HEAD,)
    layers = _layers_loaded(config)
    found = {name for name, spec in specs.items() if _is_leftover(spec) or _is_prediction(name, layers)}
    for decision in decisions:
        spec = decision.spec
        tied_head = decision.reason in heads and spec.shape in embeddings
        if tied_head or _is_second_embedding(spec, specs) or _is_second_bias(spec, specs):
            found.add(spec.name)
    return frozenset(found)


def _ties_head(config: Mapping[str, Any], config_class: ConfigClass) -> bool:
    """Whether the head is the embedding. One of which nobody knows counts: it is in the file."""
    tied = ties_head(config, language_model(config).fields.config)
    if tied is None and config:
        with suppress(NoConfigClassError):
            completed = config_class.completed()
            tied = ties_head(completed, language_model(completed).fields.config)
    return bool(tied)


def _is_leftover(spec: TensorSpec) -> bool:
    return bool(_LEFTOVER.search(spec.name)) or (len(spec.shape) >= 3 and bool(_MASK.search(spec.name)))


def _layers_loaded(config: Mapping[str, Any]) -> int | None:
    """How many layers of a model with prediction layers are loaded; None where it has none, or does not say."""
    fields = language_model(config).fields
    if not (fields.has("num_nextn_predict_layers") or fields.has("num_mtp_layers") or fields.has("mtp_num_layers")):
        return None
    return fields.number(*LAYERS, default=0) or None


def _is_prediction(name: str, layers: int | None) -> bool:
    """Whether a tensor is one of the layers that predict tokens further on, which transformers does not load."""
    if _PREDICTION.match(name):
        return True
    index = _LAYER.match(name)
    return layers is not None and index is not None and int(index["index"]) >= layers


def _is_second_embedding(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether this is `encoder.embed_tokens.weight` beside `shared.weight`, as in older files of T5 and BART."""
    prefix, found, _ = spec.name.rpartition(".embed_tokens.weight")
    if not found or prefix.rpartition(".")[2] not in ("encoder", "decoder"):
        return False
    shared = specs.get(f"{prefix[: -len('encoder')]}shared.weight")
    return shared is not None and shared.shape == spec.shape


def _is_second_bias(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether this is `cls.predictions.decoder.bias` beside `cls.predictions.bias`."""
    first = specs.get(spec.name.replace(".decoder.bias", ".bias"))
    return spec.name.endswith(".decoder.bias") and first is not None and first.shape == spec.shape


@dataclass(frozen=True, slots=True)
class Buffers:
    """Tables that a loader creates besides the weights, in bytes: once for the model, and once per block.

    The largest sizes in transformers 5.0 to 5.24. A later version may create others, which are not counted.
    """

    model_bytes: int = 0
    block_bytes: int = 0


_ROTARY_FIELDS = (
    *("rope_theta", "rope_parameters", "rope_scaling", "rotary_pct", "rotary_emb_base", "rope_local_base_freq"),
    "global_rope_theta",
)
# These have rotary positions even if the config leaves the fields out.
_ROTARY_FAMILIES = re.compile(
    r"(code_)?llama|mistral|mixtral|qwen[23]|gemma|phi|gpt_neox|falcon$|stablelm|olmo|starcoder2|cohere|granite$|deepseek"
)
# One set of frequencies for each kind of layer.
_ROTARY_BY_KIND = frozenset({"gemma3", "gemma3_text", "modernbert"})
_SINUSOIDAL_BLOCKS = frozenset({"gptj", "codegen"})  # since 5.24.0 all blocks share one table
_MASKED_BLOCKS = frozenset({"gpt2", "gpt_neo"})  # gpt2's until 5.0.0, seen to be absent in 5.23.0
_TWO_POSITION_TABLES = frozenset(
    {"bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "albert", "roberta-prelayernorm"}
)
_ONE_POSITION_TABLE = frozenset({"deberta-v2", "distilbert", "mpnet", "layoutlm", "ernie"})
_SCALED_EMBEDDINGS = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})


def buffers_of(config: Mapping[str, Any]) -> Buffers:
    """The tables of this model type; zero if the type is unknown or the config lacks a field."""
    fields = language_model(config).fields
    try:
        return _buffers(fields)
    except (MissingFieldError, TypeError, ValueError):
        return Buffers()


def _buffers(fields: Fields) -> Buffers:
    family = fields.model_type
    if family in _TWO_POSITION_TABLES:
        return Buffers(16 * fields.number(*LENGTH))  # int64 position_ids and token_type_ids
    if family in _ONE_POSITION_TABLE:
        return Buffers(8 * fields.number(*LENGTH))
    if family in _SINUSOIDAL_BLOCKS:
        return Buffers(0, 4 * fields.number(*LENGTH) * fields.number("rotary_dim", default=_head_width(fields)))
    if family in _MASKED_BLOCKS:
        return Buffers(0, fields.number(*LENGTH) ** 2)  # a causal mask of bool in each layer
    if family == "gpt_bigcode":
        return Buffers(fields.number(*LENGTH) ** 2)
    rotary = any(fields.has(name) for name in _ROTARY_FIELDS) or _ROTARY_FAMILIES.match(family)
    if not rotary or fields.has("alibi"):
        return Buffers()
    frequencies = _rotary_width(fields) // 2
    kinds = len(set(fields.words("layer_types") or (1, 2))) if family in _ROTARY_BY_KIND else 1
    # inv_freq and original_inv_freq, in float32; the embeddings' scale in 16 bit.
    return Buffers(2 * 4 * frequencies * kinds + (2 if family in _SCALED_EMBEDDINGS else 0))


def _rotary_width(fields: Fields) -> int:
    if fields.has("qk_rope_head_dim"):
        return fields.number("qk_rope_head_dim")
    parameters = fields.config.get("rope_parameters")
    partly = parameters.get("partial_rotary_factor") if isinstance(parameters, Mapping) else None
    share = partly or fields.config.get("partial_rotary_factor") or fields.config.get("rotary_pct") or 1.0
    return int(_head_width(fields) * float(share))


def _head_width(fields: Fields) -> int:
    fields.number(*LAYERS)
    return fields.number(*HEAD_WIDTH, default=fields.number(*WIDTH, default=0) // fields.number(*HEADS))
