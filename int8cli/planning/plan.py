"""The plan: which tensors of a checkpoint become int8, and why each of the others does not.

Decided from names, shapes and config.json alone; knows no model code, no file format, no layout and no torch. The
measure is what transformers' bitsandbytes path holds in int8 on load: modules of the exact type `nn.Linear` or `Conv1D`
but output embeddings, tied weights, modules kept in float32, and the module of the very last parameter
(transformers, quantizers/base.py, `get_keys_to_not_convert`). Where names cannot tell, a tensor is left alone: that
costs bytes, the other mistake costs the model.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from int8cli.checkpoint.tensor import CAST_ON_LOAD, QUANTIZABLE_DTYPES, TensorSpec
from int8cli.loaders.transformers_versions import float32_of
from int8cli.planning import architectures as names
from int8cli.planning.architectures import Rule

_WEIGHT = ".weight"
_FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "half": "F16", "float": "F32"}


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a loader holds in int8 beside plain linear layers: experts stored one by one, transformers' Conv1D.

    The defaults are those of transformers' bitsandbytes path.
    """

    experts: bool = False
    conv1d: bool = True


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user asked for: glob patterns on module names (a tensor's name without `.weight`), for which loader."""

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    loader: Acceptance = Acceptance()


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one tensor, and why.

    `transpose` is true for a Conv1D weight, stored (in, out) in the source. `kind` is the name with each layer or
    expert index replaced by `*`. `written_dtype` is what a tensor that does not become int8 is written in. `float32`
    says when loaders hold it in float32 (`names.FLOAT32`, `names.FLOAT32_ALWAYS`), None if never.
    """

    spec: TensorSpec
    quantize: bool
    transpose: bool
    kind: str
    reason: str
    written_dtype: str
    float32: str | None = None

    @property
    def module(self) -> str:
        """Name of the module that holds the tensor."""
        return self.spec.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision for each tensor of a checkpoint, in the order the tensors were given.

    `absent` covers linear layers that the loader must leave alone although the checkpoint has no tensor of that name,
    since they are tied to one it has, or made from one: entries for `llm_int8_skip_modules`. `dtype` is the float dtype
    that loaders give the model, None where there is no config or no float.
    """

    decisions: tuple[Decision, ...]
    options: PlanOptions = PlanOptions()
    absent: tuple[str, ...] = ()
    dtype: str | None = None

    @property
    def quantized(self) -> tuple[Decision, ...]:
        return tuple(decision for decision in self.decisions if decision.quantize)

    @property
    def copied(self) -> tuple[Decision, ...]:
        return tuple(decision for decision in self.decisions if not decision.quantize)

    @property
    def parameters(self) -> int:
        """Elements of all tensors, as stored: a tied weight counts as often as the checkpoint holds it."""
        return sum(decision.spec.numel for decision in self.decisions)

    @property
    def quantized_parameters(self) -> int:
        return sum(decision.spec.numel for decision in self.quantized)

    @property
    def percent_quantized(self) -> float:
        return 100.0 * self.quantized_parameters / self.parameters if self.parameters else 0.0

    @property
    def has_linear_layers(self) -> bool:
        """Whether any tensor is known for a linear layer's weight, also if this loader or the user leaves it alone."""
        return any(decision.quantize or decision.reason in names.LINEAR_LEFT_ALONE for decision in self.decisions)

    @property
    def unmatched_patterns(self) -> tuple[str, ...]:
        """The patterns that changed nothing, most likely typos.

        Those of `--skip` that name no module with a weight, and those of `--only` that name none that became int8:
        `--only` narrows, it cannot make an embedding a linear layer.
        """
        weights = [d.module for d in self.decisions if d.spec.name.endswith(_WEIGHT)]
        quantized = [d.module for d in self.quantized]
        skips = (p for p in self.options.skip if not any(fnmatchcase(module, p) for module in weights))
        onlys = (p for p in self.options.only if not any(fnmatchcase(module, p) for module in quantized))
        return tuple(dict.fromkeys((*skips, *onlys)))

    def keeping(self, tensor_names: Collection[str]) -> "Plan":
        """The plan in which these tensors, found to hold NaN or infinity, are copied as they are."""
        kept = frozenset(tensor_names)
        decisions = (
            replace(d, quantize=False, transpose=False, reason=names.NON_FINITE, written_dtype=d.spec.dtype)
            if d.quantize and d.spec.name in kept
            else d
            for d in self.decisions
        )
        return replace(self, decisions=tuple(decisions))


def make_plan(specs: Iterable[TensorSpec], config: Mapping[str, Any], options: PlanOptions) -> Plan:
    """Decide on every tensor of a checkpoint; `specs` must be all of them, since a layer is also told by its bias.

    `config` is config.json as read; an empty one costs only the exceptions that go by model type.
    """
    specs = tuple(specs)
    checkpoint = _Checkpoint({spec.name: spec for spec in specs}, config)
    decisions = tuple(_decide(spec, checkpoint, options) for spec in specs)
    return Plan(decisions, options, tuple(dict.fromkeys(_absent_linears(config))), checkpoint.dtype)


def kind_of(tensor_name: str) -> str:
    """The tensor's name with each layer or expert index replaced by `*`."""
    return ".".join("*" if part.isdigit() else part for part in tensor_name.split("."))


class _Checkpoint:
    """What the rules need to know of the whole checkpoint beside the one tensor."""

    def __init__(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> None:
        self._specs = specs
        self.rules = tuple(_rules_for(config))
        self._float32 = tuple(float32_of(model_types(config)))
        self.tied = bool(config.get("tie_word_embeddings", False))
        self._vocabularies = frozenset(_vocabularies(config))
        self._token_embeddings = frozenset(
            spec.shape for name, spec in specs.items() if len(spec.shape) == 2 and names.TOKEN_EMBEDDING.search(name)
        )
        self._kinds = Counter(kind_of(name) for name in specs)
        self.dtype = (_dtype_in(config) or _most_common_float(specs.values())) if config else None
        self._conv1d_blocks = frozenset(_block(s.name) for s in specs.values() if self._shows_conv1d(s))

    def bias_length(self, module: str) -> int | None:
        """Length of the module's bias, None where it has none."""
        bias = self._specs.get(f"{module}.bias")
        return bias.numel if bias is not None and len(bias.shape) == 1 else None

    def holds(self, tensor_name: str) -> bool:
        return tensor_name in self._specs

    def is_head(self, spec: TensorSpec) -> bool:
        """Whether a matrix is an output head by its rows, or by its name where the config names no vocabulary.

        In a numbered block that can only be one which has no like in the others: code that numbers all of its parts.
        """
        if self._kinds[kind_of(spec.name)] > 1 or self.is_conv1d(spec):
            return False
        if not self._vocabularies:
            return bool(self._token_embeddings) and names.HEAD_OUTSIDE_BLOCKS.search(_module(spec)) is not None
        return self._has_vocabulary_rows(spec) and spec.shape in self._token_embeddings

    def is_surely_embedding(self, spec: TensorSpec) -> bool:
        return names.SURE_EMBEDDING.search(_module(spec)) is not None or self._has_vocabulary_rows(spec)

    def _has_vocabulary_rows(self, spec: TensorSpec) -> bool:
        """Whether a matrix has a row for each token, or for each and what fills up a multiple of 64 or 128."""
        rows, columns = spec.shape
        return rows > columns and any(rows in (size, *_padded(size)) for size in self._vocabularies)

    def is_conv1d(self, spec: TensorSpec) -> bool:
        """Whether a matrix is stored (in, out): a square one does not show it, but others of its block do."""
        return bool(names.CONV1D_NAME.search(_module(spec))) and _block(spec.name) in self._conv1d_blocks

    def float32(self, module: str) -> str | None:
        """When some loader holds the module in float32: always, in a float16 model, or never."""
        always = {fact.always for fact in self._float32 if fact.covers(module)}
        return (names.FLOAT32_ALWAYS if True in always else names.FLOAT32) if always else None

    def stays_float(self, module: str) -> bool:
        """Whether a linear layer is left alone for its float32: what is always float32 becomes int8 all the same."""
        return self.float32(module) == names.FLOAT32

    def _shows_conv1d(self, spec: TensorSpec) -> bool:
        if len(spec.shape) != 2 or not names.CONV1D_NAME.search(_module(spec)):
            return False
        return spec.shape[0] != spec.shape[1] and self.bias_length(_module(spec)) == spec.shape[1]


def _decide(spec: TensorSpec, checkpoint: _Checkpoint, options: PlanOptions) -> Decision:
    reason = _why_not_linear(spec) or _reason_by_name(spec, checkpoint)
    if reason == names.EXPERT and options.loader.experts:
        reason = names.LINEAR
    if reason == names.LINEAR and checkpoint.is_conv1d(spec) and not options.loader.conv1d:
        reason = names.CONV1D
    if reason == names.LINEAR:
        reason = _reason_by_options(_module(spec), options)
    quantize = reason == names.LINEAR
    transpose = quantize and checkpoint.is_conv1d(spec)
    written_dtype = spec.dtype if quantize else _written_dtype(spec, checkpoint)
    float32 = None if quantize else checkpoint.float32(_module(spec))
    return Decision(spec, quantize, transpose, kind_of(spec.name), reason, written_dtype, float32)


def _written_dtype(spec: TensorSpec, checkpoint: _Checkpoint) -> str:
    """The dtype in which a tensor that stays a float has to stand in the file.

    On load, transformers casts every float of a checkpoint to the model's dtype, or to float32 where a model wants it;
    but of one that is int8 already most versions cast no `X.weight`. So those are written as a load of the source would
    hold them: nearly always as they are, and in float32 where any version wants that, which loses nothing.
    (transformers, quantizers/base.py, `get_new_dtype`)
    """
    if spec.dtype not in CAST_ON_LOAD or not spec.name.endswith(_WEIGHT) or checkpoint.dtype is None:
        return spec.dtype
    widening = {"F16": {names.FLOAT32, names.FLOAT32_ALWAYS}, "BF16": {names.FLOAT32_ALWAYS}}.get(checkpoint.dtype, ())
    return "F32" if checkpoint.float32(_module(spec)) in widening else checkpoint.dtype


def _padded(vocabulary: int) -> Iterator[int]:
    """The rows that a vocabulary is filled up to, where that adds little."""
    for multiple in (64, 128, 256, 1024):
        rows = -(-vocabulary // multiple) * multiple
        if rows <= 1.05 * vocabulary:
            yield rows


def _vocabularies(config: Mapping[str, Any]) -> Iterator[int]:
    """The sizes of all vocabularies that a config names, and each config in it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _vocabularies(value)
        elif names.VOCABULARY_FIELD.fullmatch(key) and type(value) is int and value > 1:
            yield value


def _dtype_in(config: Mapping[str, Any]) -> str | None:
    """The dtype that config.json gives the model, under its name of today or of transformers 4."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return _FLOAT_DTYPES.get(named)


def _most_common_float(specs: Iterable[TensorSpec]) -> str | None:
    sizes = Counter[str]()
    for spec in specs:
        if spec.dtype in QUANTIZABLE_DTYPES:
            sizes[spec.dtype] += spec.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default=None)


def _why_not_linear(spec: TensorSpec) -> str | None:
    """Why dtype, shape or the last part of the name rule out the weight of a linear layer; None if they do not."""
    if spec.dtype not in QUANTIZABLE_DTYPES:
        return names.NOT_FLOAT
    if len(spec.shape) < 2:
        return names.NORM_OR_BIAS
    if len(spec.shape) > 2:
        return names.NOT_A_MATRIX
    if not spec.name.endswith(_WEIGHT):
        return names.NOT_A_WEIGHT
    return names.EMPTY if spec.numel == 0 else None


def _reason_by_name(spec: TensorSpec, checkpoint: _Checkpoint) -> str:
    """What the module is by its name, its family, and its bias: `LINEAR`, or why it is left alone."""
    module = _module(spec)
    bias_length = checkpoint.bias_length(module)
    for rule in checkpoint.rules:
        if rule.pattern.search(module) and not (rule.biasless and bias_length is not None):
            reason = names.TIED_HEAD if rule.reason == names.HEAD and checkpoint.tied else rule.reason
            if reason == names.EMBEDDING and not checkpoint.is_surely_embedding(spec):
                return names.MAYBE_EMBEDDING
            return names.FLOAT32 if reason == names.LINEAR and checkpoint.stays_float(module) else reason
    if checkpoint.is_head(spec):
        return names.TIED_HEAD if checkpoint.tied else names.HEAD
    if checkpoint.stays_float(module):
        return names.FLOAT32
    if module.endswith(".out_proj") and checkpoint.holds(f"{module.removesuffix('.out_proj')}.in_proj_weight"):
        return names.SUBCLASS  # torch.nn.MultiheadAttention's NonDynamicallyQuantizableLinear
    if bias_length is None:
        return names.LINEAR if names.LINEAR_NAME.search(module) else names.UNKNOWN
    out_features = spec.shape[1] if checkpoint.is_conv1d(spec) else spec.shape[0]
    return names.LINEAR if bias_length == out_features else names.UNKNOWN


def _reason_by_options(module: str, options: PlanOptions) -> str:
    if any(fnmatchcase(module, pattern) for pattern in options.skip):
        return names.SKIPPED
    if options.only and not any(fnmatchcase(module, pattern) for pattern in options.only):
        return names.NOT_NAMED
    return names.LINEAR


def _rules_for(config: Mapping[str, Any]) -> Iterator[Rule]:
    """The rules that hold for a model, the most particular first: its class, its model types, then all models."""
    for pattern, rules in names.ARCHITECTURE_RULES:
        if any(re.fullmatch(pattern, architecture) for architecture in config.get("architectures") or ()):
            yield from rules
    for model_type in dict.fromkeys(model_types(config)):
        yield from names.MODEL_TYPE_RULES.get(model_type, ())
    yield from names.GENERAL_RULES


def _absent_linears(config: Mapping[str, Any]) -> Iterator[str]:
    """Entries for linear layers that are left alone without being in the file; all heads where the type is unknown."""
    types = tuple(model_types(config))
    for head, owners in names.TIED_HEADS.items():
        if not types or any(model_type in owners for model_type in types):
            yield head
    for model_type in types:
        yield from names.ABSENT_LINEARS.get(model_type, ())
        if model_type in names.POOLED:
            yield names.POOLER


def model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The model type of a config and of each config inside it (text_config, vision_config, ...)."""
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        yield model_type
    for value in config.values():
        if isinstance(value, Mapping):
            yield from model_types(value)


def _module(spec: TensorSpec) -> str:
    return spec.name.rpartition(".")[0]


def _block(tensor_name: str) -> str:
    """The layer that a tensor belongs to: its name up to the last index (`h.3` of `h.3.mlp.c_fc.weight`)."""
    parts = tensor_name.split(".")
    indices = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: indices[-1] + 1]) if indices else ""
