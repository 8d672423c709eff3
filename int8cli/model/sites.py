"""Which linear layers of a unit share an input, and the kind of that input, found by observing one run.

Owns `Site`. Follows the data, not names: two linears whose inputs are the same memory share a site, an input that a
norm wrote is norm-fed, and attention is where activations are multiplied by activations.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Kind = Literal["norm-fed", "attention output", "second feed-forward"]

# Products of activations by activations. Everything between them and the next linear is elementwise.
_MIXING = frozenset({"scaled_dot_product_attention", "bmm", "baddbmm", "matmul", "__matmul__", "__rmatmul__", "einsum"})
_LINEAR = frozenset({"linear", "addmm"})
# Functions that are the identity on most values. A run that reaches no limit cannot tell them from it.
_LIMITING = frozenset({"clamp", "clamp_", "clip", "clip_", "clamp_max", "clamp_max_", "hardtanh", "hardtanh_", "relu6"})
# The number of a part of a module, as in experts.3 and expert_3, but not in linear1 and w2.
_NUMBERS = re.compile(r"(?:^|(?<=[._]))\d+(?=\.|$)")
_NORM_MARK = "_int8cli_made_by_norm"


@dataclass(frozen=True, slots=True)
class Site:
    """An input that one or more linear layers of a unit share. `linears` are their names in the checkpoint.

    `name` is the first of them; `stack` and `layer` are those of the unit. `norm` is the name of the norm in the unit
    that wrote the input, if one did.
    """

    name: str
    linears: tuple[str, ...]
    kind: Kind
    stack: str | None
    layer: int | None
    in_features: int
    norm: str | None = None


@dataclass(slots=True)
class _Found:
    kind: Kind
    in_features: int
    norm: nn.Module | None
    linears: list[nn.Module] = field(default_factory=list)


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers in a module, by their names in it: nn.Linear, its subclasses, and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, Conv1D))}


def weight_of(linear: nn.Module) -> Tensor:
    """A linear's weight as (out_features, in_features). Conv1D stores the transpose."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight if isinstance(linear, nn.Linear) else weight.t()


def product_of(linear: nn.Module, inputs: Sequence[Tensor], output: object) -> Tensor:
    """What a linear computed, given what a forward hook gets.

    A subclass may return more than its product: Llama 4's router returns scores, too. Then it is computed again.
    """
    if isinstance(output, Tensor):
        return output
    return nn.functional.linear(inputs[0], weight_of(linear), linear.bias)  # type: ignore[arg-type]


class SiteFinder:
    """Observes one run of a module and finds its sites.

    `on_input(linear, x)` is called when the first linear of a site gets its input.
    """

    def __init__(self, on_input: Callable[[nn.Module, Tensor], None] | None = None) -> None:
        self._on_input = on_input
        self._found: dict[tuple[object, ...], _Found] = {}
        self._is_first: dict[nn.Module, bool] = {}  # linears called so far: whether each is the first of its site
        self._norm_made: dict[int, nn.Module | None] = {}  # memory, and the norm of this unit that wrote it
        self._weights: set[int] = set()
        self._mixed = False
        self.limits = False  # whether the run called a function that limits values
        self._used: set[int] = set()  # memory of all that the run passed to a function
        self._alive: list[Tensor] = []  # keeps memory from being reused while its addresses are compared

    @contextmanager
    def watching(self, module: nn.Module, linears: Iterable[nn.Module], arguments: object) -> Iterator[None]:
        """Observe these linears while the module that holds them runs once with these arguments."""
        for tensor in tensors_in(arguments):
            if is_marked(tensor):
                self._norm_made[_memory(tensor)] = None
        self._weights = {_memory(parameter) for parameter in module.parameters()}
        with ExitStack() as stack:
            stack.enter_context(_Products(self))
            for child in module.modules():
                if is_norm(child):
                    stack.callback(child.register_forward_hook(self._after_norm).remove)
            for linear in linears:
                stack.callback(linear.register_forward_pre_hook(self._before_linear).remove)
            yield

    def found(self) -> Iterator[tuple[Kind, int, list[nn.Module], nn.Module | None]]:
        """Kind, in_features, linears and norm of each site, in the order in which they were first called."""
        for site in self._found.values():
            yield site.kind, site.in_features, site.linears, site.norm

    def made_by_norm(self, tensor: Tensor) -> bool:
        """Whether a norm wrote the memory of a tensor. Valid only while the tensors of the run are alive."""
        return _memory(tensor) in self._norm_made

    def multiplied(self, factors: object, *, by_weights: bool) -> None:
        """Record a product. Unless `by_weights` or a factor is a weight, it is one of activations by activations."""
        self._mixed = not (by_weights or any(_memory(factor) in self._weights for factor in tensors_in(factors)))

    def used(self, arguments: object) -> None:
        """Record what a function of the run was called with."""
        self._used.update(map(_memory, tensors_in(arguments)))

    def unused(self, module: nn.Module) -> Iterator[str]:
        """The parameters that the run passed to no function. Valid only while the tensors of the run are alive.

        Of the numbered parts of a module (experts), one that ran stands for those that did not.
        """
        parameters = dict(module.named_parameters())
        kinds = {_NUMBERS.sub("*", name) for name, each in parameters.items() if _memory(each) in self._used}
        yield from (name for name in parameters if _NUMBERS.sub("*", name) not in kinds)

    def _after_norm(self, module: nn.Module, inputs: object, output: object) -> None:
        for tensor in tensors_in(output):
            self._alive.append(tensor)
            self._norm_made[_memory(tensor)] = module

    def _before_linear(self, linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        if linear not in self._is_first:
            key = (_memory(x), x.storage_offset(), x.numel(), x.shape[-1], x._version)
            self._is_first[linear] = key not in self._found
            if key not in self._found:
                self._alive.append(x)
                self._found[key] = _Found(self._kind(x), x.shape[-1], self._norm_made.get(_memory(x)))
            self._found[key].linears.append(linear)
        if self._is_first[linear] and self._on_input is not None:
            self._on_input(linear, x)

    def _kind(self, x: Tensor) -> Kind:
        if self._mixed:
            return "attention output"
        return "norm-fed" if self.made_by_norm(x) else "second feed-forward"


class _Products(TorchFunctionMode):
    """Reports products to a SiteFinder in the order in which they are computed."""

    def __init__(self, finder: SiteFinder) -> None:
        super().__init__()
        self._finder = finder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name != "__get__":  # reading a dtype or a shape is no use
            self._finder.used((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if name in _LIMITING:
            self._finder.limits = True
        if name in _LINEAR or name in _MIXING:
            self._finder.multiplied(args, by_weights=name in _LINEAR)
        return result


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm. The classes of norms have only the word in their names in common."""
    return "norm" in type(module).__name__.lower() and not linears_of(module)


def mark(tensor: Tensor) -> Tensor:
    """Mark a tensor as the output of a norm, for the next unit."""
    setattr(tensor, _NORM_MARK, True)
    return tensor


def is_marked(tensor: Tensor) -> bool:
    return bool(getattr(tensor, _NORM_MARK, False))


def moved_to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, marked if it was marked before."""
    if tensor.device == device:
        return tensor
    moved = tensor.to(device)
    return mark(moved) if is_marked(tensor) else moved


def tensors_in(structure: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        yield from itertools.chain.from_iterable(map(tensors_in, structure.values()))
    elif isinstance(structure, (tuple, list)):
        yield from itertools.chain.from_iterable(map(tensors_in, structure))


def map_tensors(structure: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting of plain tuples, lists and dicts with `change` applied to each tensor and to nothing else."""
    if isinstance(structure, Tensor):
        return change(structure)
    if type(structure) is dict:
        return {key: map_tensors(value, change) for key, value in structure.items()}
    if type(structure) in (tuple, list):
        return type(structure)(map_tensors(value, change) for value in structure)
    return structure


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def first_hidden(output: object) -> Tensor | None:
    """The hidden states in a block's output: its first float tensor."""
    return next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)
