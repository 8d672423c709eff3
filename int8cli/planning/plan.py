"""Makes the plan: which tensors of a checkpoint become int8, and why each of the others does not.

Decides from names, shapes and config.json alone. Knows no model code, file format or layout, and needs no torch. The
reference is what transformers' bitsandbytes path holds in int8 after loading: modules of the exact type `nn.Linear` or
`Conv1D`, except output embeddings, tied weights, modules in float32, and the module of the very last parameter
(transformers, quantizers/base.py, `get_keys_to_not_convert`). If a name is not clear, the tensor is left alone: that
costs bytes, while the opposite mistake breaks the model.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from int8cli.checkpoint.tensor import CAST_ON_LOAD, QUANTIZABLE_DTYPES, TensorSpec
from int8cli.loaders.transformers_versions import float32_of, is_misread
from int8cli.planning import absent_modules
from int8cli.planning import architectures as names
from int8cli.planning import reasons as why
from int8cli.planning.architectures import Rule
from int8cli.planning.decisions import Acceptance, Decision, Plan, PlanOptions
from int8cli.planning.language_model import outside_language_model
from int8cli.planning.leftovers import modules_without_weight

_WEIGHT = ".weight"
_FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "half": "F16", "float": "F32"}


def make_plan(specs: Iterable[TensorSpec], config: Mapping[str, Any], options: PlanOptions) -> Plan:
    """Decide on every tensor of a checkpoint. `specs` must be all of them, since a bias helps to recognise a layer.

    `config` is the parsed config.json. Without it, the exceptions for single model types do not apply.
    """
    specs = tuple(specs)
    checkpoint = _Checkpoint({spec.name: spec for spec in specs}, config)
    decisions = tuple(_decide(spec, checkpoint, options) for spec in specs)
    absent = (*_absent_linears(config), *modules_without_weight({spec.name: spec for spec in specs}))
    return Plan(decisions, options, tuple(dict.fromkeys(absent)), checkpoint.dtype)


def kind_of(tensor_name: str) -> str:
    """The tensor's name with each layer or expert index replaced by `*`."""
    return ".".join("*" if part.isdigit() else part for part in tensor_name.split("."))


class _Checkpoint:
    """What the rules need to know of the whole checkpoint."""

    def __init__(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> None:
        self._specs = specs
        self.rules = tuple(_rules_for(config))
        self._model_types = frozenset(model_types(config))
        self._float32 = tuple(float32_of(model_types(config)))
        self._beside_text = outside_language_model(specs, config)
        self.tied = bool(config.get("tie_word_embeddings", False))
        self._vocabularies = frozenset(_vocabularies(config))
        self._token_embeddings = frozenset(
            spec.shape for name, spec in specs.items() if len(spec.shape) == 2 and names.TOKEN_EMBEDDING.search(name)
        )
        self._kinds = Counter(kind_of(name) for name in specs)
        self.dtype = (dtype_in(config) or _most_common_float(specs.values())) if config else None
        self._conv1d_blocks = frozenset(_block(s.name) for s in specs.values() if self._shows_conv1d(s))

    def bias_length(self, module: str) -> int | None:
        """The length of the module's bias; None if it has none."""
        bias = self._specs.get(f"{module}.bias")
        return bias.numel if bias is not None and len(bias.shape) == 1 else None

    def has(self, tensor_name: str) -> bool:
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
        """Whether a matrix is stored (in, out). A square one does not show it, but others of its block do."""
        return bool(names.CONV1D_NAME.search(_module(spec))) and _block(spec.name) in self._conv1d_blocks

    def float32(self, module: str) -> str | None:
        """When any loader holds the module in float32: FLOAT32_ALWAYS, FLOAT32 (in float16 models), or None."""
        always = {fact.always for fact in self._float32 if fact.covers(module)}
        return (why.FLOAT32_ALWAYS if True in always else why.FLOAT32) if always else None

    def stays_float(self, module: str) -> bool:
        """Whether a linear layer is left alone because of its float32. One that is always float32 becomes int8."""
        return self.float32(module) == why.FLOAT32

    def why_float_for(self, loader: Acceptance, module: str) -> str | None:
        """Why a loader does not support this linear layer in int8; None if it does."""
        concerned = (each for each in loader.floats if not each.model_types or each.model_types & self._model_types)
        if any(each.pattern.search(module) for each in concerned):
            return why.LOADER_FLOAT
        return why.BESIDE_TEXT if loader.language_model_only and module in self._beside_text else None

    def _shows_conv1d(self, spec: TensorSpec) -> bool:
        if len(spec.shape) != 2 or not names.CONV1D_NAME.search(_module(spec)):
            return False
        return spec.shape[0] != spec.shape[1] and self.bias_length(_module(spec)) == spec.shape[1]


def _decide(spec: TensorSpec, checkpoint: _Checkpoint, options: PlanOptions) -> Decision:
    reason = _why_not_linear(spec) or _reason_by_name(spec, checkpoint)
    if reason == why.EXPERT and options.loader.experts:
        reason = why.LINEAR
    if reason == why.LINEAR and checkpoint.is_conv1d(spec) and not options.loader.conv1d:
        reason = why.CONV1D
    if reason == why.LINEAR and is_misread(_module(spec)):
        reason = why.MISREAD
    if reason == why.LINEAR:
        reason = checkpoint.why_float_for(options.loader, _module(spec)) or reason
    if reason == why.LINEAR:
        reason = _reason_by_options(_module(spec), options)
    quantize = reason == why.LINEAR
    transpose = quantize and checkpoint.is_conv1d(spec)
    written_dtype = _written_dtype(spec, checkpoint)
    float32 = None if quantize else checkpoint.float32(_module(spec))
    return Decision(spec, quantize, transpose, kind_of(spec.name), reason, written_dtype, float32)


def _written_dtype(spec: TensorSpec, checkpoint: _Checkpoint) -> str:
    """The dtype in which a tensor that stays a float is written.

    On load, transformers casts every float of a checkpoint to the model's dtype, or to float32 for some modules. In an
    int8 checkpoint, most versions do not cast any `X.weight`. So these are written in the dtype that they would have
    after loading the source: nearly always unchanged, and in float32 if any version uses that, which loses nothing.
    (transformers, quantizers/base.py, `get_new_dtype`)
    """
    if spec.dtype not in CAST_ON_LOAD or not spec.name.endswith(_WEIGHT) or checkpoint.dtype is None:
        return spec.dtype
    widening = {"F16": {why.FLOAT32, why.FLOAT32_ALWAYS}, "BF16": {why.FLOAT32_ALWAYS}}.get(checkpoint.dtype, ())
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


def dtype_in(config: Mapping[str, Any]) -> str | None:
    """The model's dtype in config.json, under its current key or that of transformers 4."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return _FLOAT_DTYPES.get(named)


def _most_common_float(specs: Iterable[TensorSpec]) -> str | None:
    sizes = Counter[str]()
    for spec in specs:
        if spec.dtype in QUANTIZABLE_DTYPES:
            sizes[spec.dtype] += spec.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default=None)


def _why_not_linear(spec: TensorSpec) -> str | None:
    """Why a tensor cannot be the weight of a linear layer, by its dtype, shape and suffix; None if it can."""
    if spec.dtype not in QUANTIZABLE_DTYPES:
        return why.NOT_FLOAT
    if len(spec.shape) < 2:
        return why.NORM_OR_BIAS
    if len(spec.shape) > 2:
        return why.NOT_A_MATRIX
    if not spec.name.endswith(_WEIGHT):
        return why.NOT_A_WEIGHT
    return why.EMPTY if spec.numel == 0 else None


def _reason_by_name(spec: TensorSpec, checkpoint: _Checkpoint) -> str:
    """Whether a module is a linear layer, by its name, its family and its bias: `LINEAR`, or why it is left alone."""
    module = _module(spec)
    bias_length = checkpoint.bias_length(module)
    for rule in checkpoint.rules:
        if rule.pattern.search(module) and not (rule.biasless and bias_length is not None):
            reason = why.TIED_HEAD if rule.reason == why.HEAD and checkpoint.tied else rule.reason
            if reason == why.EMBEDDING and not checkpoint.is_surely_embedding(spec):
                return why.MAYBE_EMBEDDING
            return why.FLOAT32 if reason == why.LINEAR and checkpoint.stays_float(module) else reason
    if checkpoint.is_head(spec):
        return why.TIED_HEAD if checkpoint.tied else why.HEAD
    if checkpoint.stays_float(module):
        return why.FLOAT32
    if module.endswith(".out_proj") and checkpoint.has(f"{module.removesuffix('.out_proj')}.in_proj_weight"):
        return why.SUBCLASS  # torch.nn.MultiheadAttention's NonDynamicallyQuantizableLinear
    if bias_length is None:
        return why.LINEAR if names.LINEAR_NAME.search(module) else why.UNKNOWN
    out_features = spec.shape[1] if checkpoint.is_conv1d(spec) else spec.shape[0]
    return why.LINEAR if bias_length == out_features else why.UNKNOWN


def _reason_by_options(module: str, options: PlanOptions) -> str:
    if any(fnmatchcase(module, pattern) for pattern in options.skip):
        return why.SKIPPED
    if options.only and not any(fnmatchcase(module, pattern) for pattern in options.only):
        return why.NOT_NAMED
    return why.LINEAR


def _rules_for(config: Mapping[str, Any]) -> Iterator[Rule]:
    """The rules for a model, the most specific first: those of its class, its model types, then all models."""
    for pattern, rules in names.ARCHITECTURE_RULES:
        if any(re.fullmatch(pattern, architecture) for architecture in config.get("architectures") or ()):
            yield from rules
    for model_type in dict.fromkeys(model_types(config)):
        yield from names.MODEL_TYPE_RULES.get(model_type, ())
    yield from names.GENERAL_RULES


def _absent_linears(config: Mapping[str, Any]) -> Iterator[str]:
    """Entries for linear layers that are left alone and not in the file; all heads if the model type is unknown."""
    types = tuple(model_types(config))
    for head, owners in absent_modules.TIED_HEADS.items():
        if not types or any(model_type in owners for model_type in types):
            yield head
            if "." in head and isinstance(config.get("decoder"), Mapping):
                yield f"decoder.{head}"  # for the version that compares whole names
    for head, families in absent_modules.FAMILY_TASK_HEADS.items():
        if not set(families).isdisjoint(types):
            yield head
    for model_type in types:
        yield from absent_modules.ABSENT_LINEARS.get(model_type, ())
        if model_type in absent_modules.POOLED:
            yield absent_modules.POOLER


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
