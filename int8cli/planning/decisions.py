"""A plan as data: the decision on each tensor of a checkpoint, with its reason, and the options it was made with.

Knows no rules: `plan` makes the decisions.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.planning import reasons as why

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class FloatLayers:
    """Linear layers that a loader does not read in int8, by module name and model type (empty: every type)."""

    pattern: re.Pattern[str]
    model_types: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Which layers a loader supports in int8 besides plain linear layers: separate experts, transformers' Conv1D.

    `floats` are linear layers that it does not support in int8. With `language_model_only`, neither are those beside
    the language model in a model that also sees or hears. The defaults are those of transformers' bitsandbytes path.
    """

    experts: bool = False
    conv1d: bool = True
    floats: tuple[FloatLayers, ...] = ()
    language_model_only: bool = False


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The user's glob patterns on module names (a tensor's name without `.weight`), and what the loader accepts."""

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    loader: Acceptance = Acceptance()


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether one tensor becomes int8, and why.

    `transpose` is true for a Conv1D weight, stored (in, out) in the source. `kind` is the name with each layer or
    expert index replaced by `*`. `written_dtype` is the dtype of a tensor that is written as a float. A quantized one
    has it too, since with NaN it stays a float. `float32` says when loaders hold it in float32 (`why.FLOAT32`,
    `why.FLOAT32_ALWAYS`); None if never.
    """

    spec: TensorSpec
    quantize: bool
    transpose: bool
    kind: str
    reason: str
    written_dtype: str
    float32: str | None = None

    @property
    def computed_shape(self) -> tuple[int, ...]:
        """The shape of a weight as (out_features, in_features)."""
        return self.spec.shape[::-1] if self.transpose else self.spec.shape

    @property
    def module(self) -> str:
        """The name of the module that owns the tensor."""
        return self.spec.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision for each tensor of a checkpoint, in the given order of the tensors.

    `absent` lists entries for `llm_int8_skip_modules` that cover linear layers which the loader must leave alone, but
    whose tensors the checkpoint does not have: they are tied to other layers or made from other tensors. `dtype` is the
    float dtype that loaders give the model; None without a config or without floats.
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
        """Elements of all stored tensors. A tied weight that is stored twice counts twice."""
        return sum(decision.spec.numel for decision in self.decisions)

    @property
    def quantized_parameters(self) -> int:
        return sum(decision.spec.numel for decision in self.quantized)

    @property
    def percent_quantized(self) -> float:
        return 100.0 * self.quantized_parameters / self.parameters if self.parameters else 0.0

    @property
    def has_linear_layers(self) -> bool:
        """Whether any tensor is recognised as a linear layer's weight, even one that is left alone."""
        return any(decision.quantize or decision.reason in why.LINEAR_LEFT_ALONE for decision in self.decisions)

    @property
    def unmatched_patterns(self) -> tuple[str, ...]:
        """The patterns that have no effect, probably typos.

        A `--skip` pattern must match a module with a weight, an `--only` pattern a module that becomes int8: `--only`
        cannot turn an embedding into a linear layer.
        """
        weights = [d.module for d in self.decisions if d.spec.name.endswith(_WEIGHT)]
        if self.options.loader.experts:  # a pattern that covers fused experts keeps them from being split
            weights += [name for d in self.copied if len(d.spec.shape) == 3 for name in (d.module, d.spec.name)]
        quantized = [d.module for d in self.quantized]
        skips = (p for p in self.options.skip if not any(fnmatchcase(module, p) for module in weights))
        onlys = (p for p in self.options.only if not any(fnmatchcase(module, p) for module in quantized))
        return tuple(dict.fromkeys((*skips, *onlys)))

    def with_copied(self, tensor_names: Collection[str]) -> "Plan":
        """The same plan with these tensors, which hold NaN or infinity, written as floats."""
        non_finite = frozenset(tensor_names)
        decisions = (
            replace(d, quantize=False, transpose=False, reason=why.NON_FINITE)
            if d.quantize and d.spec.name in non_finite
            else d
            for d in self.decisions
        )
        return replace(self, decisions=tuple(decisions))
