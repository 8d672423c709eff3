"""What the bitsandbytes path of the installed transformers (4.57, 5.0, or later) does with a model on the meta device.

Owns everything that differs between versions of transformers: the names in a saved state dict, the parameter that each
saved tensor becomes, the modules that are replaced, and what stays in float32. Uses the loader's own functions.
"""

import re
from dataclasses import dataclass
from typing import Any

INT8_PARTS = ("weight", "SCB", "weight_format")


def without_initialization() -> Any:
    """A context in which a model is built without drawing its weights."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()


def default_skips(model: Any) -> list[str]:
    """The modules that the loader does not quantize by default."""
    from transformers.quantizers.base import HfQuantizer

    return list(HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ())))


def replaced_modules(model: Any, skips: list[str]) -> set[str]:
    """The names of the modules that the loader replaces by int8 layers. The model is restored afterwards."""
    from bitsandbytes.nn import Linear8bitLt
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    before = dict(model.named_modules())
    replace_with_bnb_linear(
        model, modules_to_not_convert=skips, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    replaced = {name for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}
    for name in replaced:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = before[name]
    return replaced


def held_in_float32(model: Any, dtype: str) -> list[str]:
    """The parameters and buffers that are in float32 after a load in `dtype`. The model was built in bfloat16."""
    import torch

    patterns = [*(model._keep_in_fp32_modules_strict or ())]
    if dtype == "float16":
        patterns += model._keep_in_fp32_modules or ()
    matches = _float32_search(model, patterns)
    made_so = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    if not hasattr(model, "_get_dtype_plan") and not _casts_by_place():
        made_so = set()  # 4.57 casts every float to the model's dtype
    return sorted(name for name in model.state_dict() if name in made_so or matches(name))


def _casts_by_place() -> bool:
    """Whether the loader keeps a parameter in the dtype in which its module creates it, as from 5.0 on."""
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def _float32_search(model: Any, patterns: list[str]) -> Any:
    if not patterns:
        return lambda name: None
    if _casts_by_place():
        from transformers.core_model_loading import build_glob_alternation

        return build_glob_alternation(patterns)[0].search
    return re.compile("|".join(rf"((^|\.){pattern}($|\.))" for pattern in patterns)).search


@dataclass(frozen=True, slots=True)
class Naming:
    """How a model's tensors are named in a checkpoint, and the parameter that each becomes on load.

    `saved` is the state dict as `save_pretrained` writes it: tied weights once, names and fusions of the Hub's
    checkpoints.
    """

    saved: dict[str, Any]
    renamings: list[Any]
    converters: list[Any]
    base_model_prefix: str
    state: dict[str, Any]

    def target(self, name: str) -> tuple[str, bool]:
        """The parameter that a saved tensor becomes (or becomes part of), and whether the model's ops change it."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self.renamings, self.converters, self.base_model_prefix, self.state)
        if target not in self.state and name in self.state:
            return name, False
        return target, pattern is not None and pattern not in INT8_PARTS


@dataclass(frozen=True, slots=True)
class NamingByPattern:
    """The same for transformers 4, which renames by regular expressions and changes nothing."""

    saved: dict[str, Any]
    patterns: dict[str, str]

    def target(self, name: str) -> tuple[str, bool]:
        return _first_substitution(self.patterns, name), False


def naming_of(model: Any) -> Naming | NamingByPattern:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return _naming_by_pattern(model)
    from transformers import BitsAndBytesConfig
    from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    state = dict(model.state_dict())
    for tied in model.all_tied_weights_keys:
        state.pop(tied, None)
    saved = dict(revert_weight_conversion(model, state))
    mapping = get_model_conversion_mapping(model, add_legacy=True)
    mapping += Bnb8BitHfQuantizer(BitsAndBytesConfig(load_in_8bit=True), pre_quantized=True).get_weight_conversions()
    return Naming(
        saved,
        [m for m in mapping if isinstance(m, WeightRenaming)],
        [m for m in mapping if isinstance(m, WeightConverter)],
        model.base_model_prefix,
        model.state_dict(),
    )


def _naming_by_pattern(model: Any) -> NamingByPattern:
    """The naming of `save_pretrained` in transformers 4: shared tensors once, class mappings reversed."""
    model.tie_weights()
    first: dict[int, str] = {}
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name in model.state_dict():
        first.setdefault(id(parameters.get(name, name)), name)
    mapping = dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})
    reverse = {new: re.sub(r"\(.*\)", "", old.lstrip("^")) for old, new in mapping.items()}
    saved = {}
    for name in first.values():
        renamed = name
        for pattern, replacement in reverse.items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                break
        saved[renamed] = model.state_dict()[name]
    return NamingByPattern(saved, mapping)


def _first_substitution(patterns: dict[str, str], name: str) -> str:
    for pattern, replacement in patterns.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
