"""Mixtures of experts in int8: transformers' fused experts, computed by one Int8Linear for each matrix.

transformers keeps the experts of a layer in two 3-D parameters, and lets other implementations compute them
(`ExpertsInterface`). Llama 4's class does not take part in that, so its forward is replaced. Owns which int8 layers of
a checkpoint are such experts, the module that replaces the parameters, and the implementation: each expert gets its
tokens in one int8 product, exact like that of any other layer.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from int8cli.errors import CheckpointError, UnsupportedModelError
from int8cli.model.loading import name_targets
from int8cli.runtime.linear import Int8Linear
from int8cli.runtime.stored import StoredLinear

IMPLEMENTATION = "int8cli"
INSIDE = "int8_experts"  # the child of an experts module that holds the matrices
_EXPERT = re.compile(r"(?P<experts>(?:\S+\.)?experts)\.(?P<number>\d+)\.(?P<matrix>\w+)")
_FUSED = ("gate_up_proj", "down_proj")  # the parameters of an experts module
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


class ExpertMatrices(nn.Module):
    """The three matrices of one expert.

    As modules they have names that no renaming of transformers meets: PhiMoE's makes a router of any `gate.weight`.
    """

    def __init__(self, gate: Int8Linear, up: Int8Linear, down: Int8Linear) -> None:
        super().__init__()
        for role, matrix in (("gate", gate), ("up", up), ("down", down)):
            self.add_module(_child(role), matrix)

    @property
    def gate(self) -> Int8Linear:
        return cast(Int8Linear, self.get_submodule(_child("gate")))

    @property
    def up(self) -> Int8Linear:
        return cast(Int8Linear, self.get_submodule(_child("up")))

    @property
    def down(self) -> Int8Linear:
        return cast(Int8Linear, self.get_submodule(_child("down")))


def _child(role: str) -> str:
    return f"{role}_matrix"


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """Where an int8 matrix belongs: the experts module in the model, the expert, the matrix; its name on loading."""

    module: str
    number: int
    role: str
    name: str

    @property
    def path(self) -> str:
        """The name of its Int8Linear in the model."""
        return f"{self.module}.{INSIDE}.{self.number}.{_child(self.role)}"


def find_experts(model_class: Any, config: Any, linears: Iterable[StoredLinear]) -> dict[str, ExpertPlace]:
    """The places of those linears that transformers fuses with others, by the linears' names.

    Raises UnsupportedModelError if the model has no module for them.
    """
    matches = {linear.name: found for linear in linears if (found := _EXPERT.fullmatch(linear.name))}
    if not matches:
        return {}
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    fused = sorted({f"{found['experts']}.gate_up_proj" for found in matches.values()})
    targets = name_targets(model, (*fused, *(f"{name}.weight" for name in matches)))
    places: dict[str, ExpertPlace] = {}
    for name, found in matches.items():
        target = targets.get(f"{found['experts']}.gate_up_proj")
        role = _ROLES.get(found["matrix"])
        if target is None:
            if f"{name}.weight" in targets:
                continue  # a module of its own
            raise UnsupportedModelError(
                f"{name} is int8, but {model_class.__name__} of this transformers has no experts in its place"
            )
        module = target.rpartition(".")[0]
        if role is None or not _is_computable(model.get_submodule(module)):
            kind = type(model.get_submodule(module)).__name__
            raise UnsupportedModelError(f"{name} is int8, but a {kind} cannot be computed in int8 here")
        number = int(found["number"])
        places[name] = ExpertPlace(module, number, role, f"{found['experts']}.{INSIDE}.{number}.{_child(role)}")
    return places


def _is_computable(module: nn.Module) -> bool:
    """Whether transformers lets others compute this module, and whether it has the matrices and nothing else."""
    gated = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    in_interface = bool(gated) and not getattr(module, "has_bias", True) and hasattr(module, "_apply_gate")
    return in_interface or _is_llama4(module)


def _is_llama4(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"


def _is_transposed(module: Any) -> bool:
    """Whether the fused parameters are (experts, in, out)."""
    return _is_llama4(module) or bool(module.is_transposed)


def replace_experts(
    model: Any, places: Mapping[str, tuple[ExpertPlace, StoredLinear]], make: Callable[[StoredLinear], Int8Linear]
) -> None:
    """Put Int8Linears in the place of the fused parameters. `make` allocates one.

    Raises CheckpointError if matrices of an experts module are missing or have other shapes than its parameters.
    """
    layers: dict[str, dict[tuple[int, str], StoredLinear]] = {}
    for place, linear in places.values():
        layers.setdefault(place.module, {})[place.number, place.role] = linear
    for name, linears in layers.items():
        module = model.get_submodule(name)
        _check_shapes(name, module, linears)
        matrices = [
            ExpertMatrices(**{role: make(linears[number, role]) for role in ("gate", "up", "down")})
            for number in range(len(linears) // 3)
        ]
        for parameter in _FUSED:
            delattr(module, parameter)
            # The class, or that of the module around it (Qwen3-Omni), fills the parameters that it finds.
            setattr(module, parameter, torch.empty(0))
        module.add_module(INSIDE, nn.ModuleList(matrices))
        if _is_llama4(module):
            module.forward = MethodType(int8_llama4_forward, module)
        else:
            _use_implementation(module)


def _check_shapes(name: str, module: Any, linears: Mapping[tuple[int, str], StoredLinear]) -> None:
    fused = {"gate_up": tuple(module.gate_up_proj.shape), "down": tuple(module.down_proj.shape)}
    if _is_transposed(module):
        fused = {each: (shape[0], shape[2], shape[1]) for each, shape in fused.items()}
    count, together, width = fused["gate_up"]
    expected = {"gate": (together // 2, width), "up": (together // 2, width), "down": fused["down"][1:]}
    for number in range(count):
        for role, shape in expected.items():
            linear = linears.get((number, role))
            found = None if linear is None else (linear.out_features, linear.in_features)
            if found != shape:
                raise CheckpointError(
                    f"{name}: the {role} matrix of expert {number} is {found or 'missing'} in int8, the model's "
                    f"config.json requires {shape}"
                )
    if len(linears) != 3 * count:
        raise CheckpointError(
            f"{name} has {len(linears) // 3} experts in int8, the model's config.json requires {count}"
        )


def _use_implementation(module: Any) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ExpertsInterface.register(IMPLEMENTATION, int8_experts_forward)
    if module.config._experts_implementation != IMPLEMENTATION:
        module.config._int8cli_replaced = module.config._experts_implementation
        module.config._experts_implementation = IMPLEMENTATION


def int8_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum of the chosen experts' outputs by token: (tokens, hidden) in the dtype of the input.

    `top_k_index` and `top_k_weights` are (tokens, k). Layers whose experts stay floats compute as their class does.
    """
    experts = getattr(self, INSIDE, None)
    if experts is None:
        in_floats: Tensor = type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
        return in_floats
    result = torch.zeros_like(hidden_states)
    for number in sorted(set(top_k_index.flatten().tolist())):
        if number >= len(experts):  # marks a token of another process
            continue
        tokens, choice = torch.where(top_k_index == number)
        rows, expert = hidden_states[tokens], experts[number]
        output = expert.down(self._apply_gate(torch.cat([expert.gate(rows), expert.up(rows)], dim=-1)))
        if getattr(self, "has_post_expert_norm", False):  # transformers 5.19 has no such norm, and no such attribute
            output = self.post_expert_norm(output)
        output = output * top_k_weights[tokens, choice, None]
        result.index_add_(0, tokens, output.to(result.dtype))
    return result


def int8_llama4_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """(experts x tokens, hidden) in and out: every token for each expert, zeros where it did not choose that one."""
    experts = getattr(self, INSIDE)
    rows_by_expert = hidden_states.view(len(experts), -1, self.hidden_size)
    result = torch.zeros_like(rows_by_expert)
    for expert, rows, place in zip(experts, rows_by_expert, result, strict=True):
        tokens = rows.any(dim=-1).nonzero().flatten()
        if tokens.numel():
            chosen = rows[tokens]
            output = expert.down(expert.up(chosen) * self.act_fn(expert.gate(chosen)))
            place.index_copy_(0, tokens, output.to(place.dtype))
    return result.view(-1, self.hidden_size)


def experts_in_floats(model: Any, dtype: torch.dtype) -> None:
    """Give every experts module its fused parameters back, with the weights that the int8 layers compute with."""
    for module in list(model.modules()):
        experts = getattr(module, INSIDE, None)
        if not isinstance(experts, nn.ModuleList):
            continue
        each = [expert for expert in experts if isinstance(expert, ExpertMatrices)]
        gate_up = torch.stack([torch.cat([e.gate.dequantize(dtype), e.up.dequantize(dtype)]) for e in each])
        down = torch.stack([e.down.dequantize(dtype) for e in each])
        delattr(module, INSIDE)
        for name, weight in zip(_FUSED, (gate_up, down), strict=True):
            delattr(module, name)
            oriented = weight.transpose(1, 2).contiguous() if _is_transposed(module) else weight
            module.register_parameter(name, nn.Parameter(oriented, requires_grad=False))
        if _is_llama4(module):
            del module.forward
        elif hasattr(module.config, "_int8cli_replaced"):
            module.config._experts_implementation = module.config._int8cli_replaced
            del module.config._int8cli_replaced
