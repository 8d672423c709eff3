"""From a converted directory to a transformers model that computes the exact decomposition.

Owns the use of transformers for this. Its loader builds the model, matches names and ties weights. Before it reads any
weights, each linear layer that is int8 in the directory is replaced by an Int8Linear.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from int8cli.llm_int8.matmul import DEFAULT_INPUTS, InputScheme
from int8cli.model.config import dtype_of, model_class_of, read_config
from int8cli.model.extra import require_version
from int8cli.model.loading import name_targets
from int8cli.runtime.linear import Int8Linear
from int8cli.runtime.stored import StoredLinear, StoredModel

_METHOD = "int8cli"
_GENERATION_CONFIG = "generation_config.json"
_OTHER_LOADERS_HINT = "If transformers loads the directory itself, use AutoModel...from_pretrained(DIR)."


@system_errors()
def load_model(
    directory: str | Path,
    *,
    inputs: InputScheme = DEFAULT_INPUTS,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The transformers model in a directory that `convert` wrote. Its int8 layers compute LLM.int8() exactly.

    Stored columns are removed from X and multiplied in floats, all others in int8 with exact integer sums. `inputs`
    says how X is quantized: "zeropoint" (at most half the error of absmax) or "absmax". `device` defaults to the GPU if
    there is one, as for transformers' own int8 models. `dtype` applies to everything that is not int8 and defaults to
    the dtype in the config. The model is in eval mode and for inference only. bitsandbytes is not needed.

    Raises MissingExtraError without transformers, UnsupportedModelError if the directory is not a conversion or
    transformers has no class for the model, CheckpointError for tensors that do not fit.
    """
    _require_extra()
    stored = StoredModel(Path(directory))
    try:
        config = _config(Path(directory))
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return _load(stored, Path(directory), config, inputs, place, dtype or dtype_of(config, stored.float_specs))
    finally:
        stored.close()


def _require_extra() -> None:
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"running a model needs {package}, which is not installed", hint="pip install 'int8cli[calibrate]'"
            )
    require_version()


def _config(directory: Path) -> Any:
    """The model's config without its quantization_config, which would make transformers use another quantizer."""
    try:
        config = read_config(directory)
        model_class_of(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(str(error), hint="load_model runs only classes of transformers itself.") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _load(
    stored: StoredModel, directory: Path, config: Any, inputs: InputScheme, device: torch.device, dtype: torch.dtype
) -> Any:
    model_class = model_class_of(config)
    model, info = model_class.from_pretrained(
        None,  # a directory and a state dict exclude each other
        config=config,
        generation_config=_generation_config(model_class, directory),
        state_dict=stored.state_dict(),
        quantization_config=_registered()(_Replacing(stored.linears, inputs)),
        dtype=dtype,
        device_map={"": device},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
    )
    for name, found, wanted in info["mismatched_keys"]:
        raise CheckpointError(f"{name} has the shape {tuple(found)}, but config.json requires {tuple(wanted)}")
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            lost = sorted(key for key in info["missing_keys"] if key.rpartition(".")[0] == name)
            if lost:
                raise CheckpointError(f"transformers needs {lost[0]}, which is missing", hint=_OTHER_LOADERS_HINT)
            module.prepare()
    return model


def _generation_config(model_class: Any, directory: Path) -> Any:
    """From generation_config.json or, for older models, from config.json: the places where transformers looks."""
    from transformers import GenerationConfig

    if not model_class.can_generate():
        return None
    if (directory / _GENERATION_CONFIG).is_file():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return GenerationConfig.from_pretrained(directory, "config.json", local_files_only=True, _from_model_config=True)


@dataclass(frozen=True, slots=True)
class _Replacing:
    """Replaces each linear layer that is stored in int8 by an Int8Linear."""

    linears: tuple[StoredLinear, ...]
    inputs: InputScheme

    def __call__(self, model: Any) -> None:
        modules = _modules_of(model, {linear.weight_name: linear for linear in self.linears})
        for module_name, linear in modules.items():
            model.set_submodule(module_name, self._replacement(model.get_submodule(module_name), linear))

    def _replacement(self, module: nn.Module, linear: StoredLinear) -> Int8Linear:
        from transformers.pytorch_utils import Conv1D

        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UnsupportedModelError(
                f"{linear.name} is int8, but its module in transformers is a {type(module).__name__}",
                hint=_OTHER_LOADERS_HINT,
            )
        shape = tuple(module.weight.shape) if isinstance(module, nn.Linear) else tuple(reversed(module.weight.shape))
        if shape != (linear.out_features, linear.in_features):
            raise CheckpointError(
                f"{linear.weight_name} has the shape {(linear.out_features, linear.in_features)}, the model's "
                f"config.json requires {shape}"
            )
        return Int8Linear(
            linear.in_features,
            linear.out_features,
            module.bias,
            inputs=self.inputs,
            columns=linear.columns,
            columns_dtype=TORCH_DTYPES[linear.columns_dtype],
            device=module.weight.device,
        )


def _modules_of(model: Any, linears: Mapping[str, StoredLinear]) -> dict[str, StoredLinear]:
    """The linears by the names of their modules in the model. Linears of a head that the model lacks are left out."""
    found: dict[str, StoredLinear] = {}
    for weight_name, target in name_targets(model, linears).items():
        module_name, _, leaf = target.rpartition(".")
        if leaf != "weight" or module_name in found:
            raise UnsupportedModelError(
                f"{weight_name} is int8, but transformers merges it with others into {target}", hint=_OTHER_LOADERS_HINT
            )
        found[module_name] = linears[weight_name]
    return found


@cache
def _registered() -> Any:
    """The config class of our quantizer, which is registered with transformers once.

    transformers calls a quantizer after it has built a model and before it reads the weights.
    """
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Int8cliConfig(QuantizationConfigMixin):
        """The quantization_config of a loaded model."""

        def __init__(self, replacing: _Replacing | None = None) -> None:
            self.quant_method: Any = _METHOD
            self.replacing = replacing

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": self.quant_method}

    @register_quantizer(_METHOD)
    class Int8cliQuantizer(HfQuantizer):
        """Replaces the layers. The weights are already quantized, and the model cannot be saved or trained."""

        requires_calibration = False

        def __init__(self, quantization_config: Int8cliConfig, **kwargs: Any) -> None:
            super().__init__(quantization_config, pre_quantized=True)
            self._config = quantization_config

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            if self._config.replacing is not None:
                self._config.replacing(model)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self._config.replacing = None
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    return Int8cliConfig
