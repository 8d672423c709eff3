"""The quantizer that transformers' loader calls between building a model and reading its weights.

Owns what transformers must know about a loaded model: that it cannot be saved, that adapters can be trained with it,
and how it becomes a model in floats. Importing this imports transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from int8cli.errors import UnsupportedOperationError
from int8cli.runtime.experts import experts_in_floats
from int8cli.runtime.linear import Int8Linear

_METHOD = "int8cli"


class Int8cliConfig(QuantizationConfigMixin):
    """What a loaded model's config says of its quantization. `replacing` puts the int8 layers into a new model."""

    def __init__(self, replacing: Callable[[Any], None] | None = None) -> None:
        self.quant_method: Any = _METHOD
        self.replacing = replacing

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


@register_quantizer(_METHOD)
class Int8cliQuantizer(HfQuantizer):
    """Replaces layers, and says that the tensors come quantized and cannot be saved from here."""

    requires_calibration = False

    def __init__(self, quantization_config: Int8cliConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        self._config = quantization_config
        self._dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._config.replacing is not None:
            self._config.replacing(model)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._config.replacing = None
        _cast_as_built(model, self._dtypes)
        model.push_to_hub = _refuse_to_push
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        experts_in_floats(model, dtype or model.dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Linear):
                model.set_submodule(name, linear_in_floats(module, dtype or model.dtype))
        model.__dict__.pop("push_to_hub", None)
        return model

    def is_serializable(self) -> bool:
        """Called by `save_pretrained` alone. Raises UnsupportedOperationError."""
        raise UnsupportedOperationError(
            "a model of load_model cannot be saved: the directory that it was loaded from is its saved form, so copy "
            "that. For 16 bit: int8cli.dequantize(DIR, OUT), or model.dequantize() and then save_pretrained",
            hint="PEFT saves adapters on top of it as usual.",
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are; transformers' Trainer asks."""
        return True


def _refuse_to_push(*_: Any, **__: Any) -> NoReturn:
    """In place of `push_to_hub`, which would create a repository before it finds out that the model cannot be saved."""
    raise UnsupportedOperationError(
        "a model of load_model cannot be pushed: int8cli.push(DIR, REPO) uploads the directory that it was loaded from",
        hint="PEFT pushes adapters on top of it as usual.",
    )


def _cast_as_built(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give every parameter the dtype that the model was built with, or float32 where the class asks for it.

    transformers from 5.0 to 5.22 leaves tensors that it renames on load in the dtype of the file, if the model comes
    quantized (core_model_loading.py).
    """
    held = {*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for name, parameter in model.named_parameters():
        built = dtypes.get(name, parameter.dtype)
        stays = parameter.dtype == torch.float32 and not held.isdisjoint(name.split("."))
        if parameter.dtype != built and parameter.is_floating_point() and not stays:
            parameter.data = parameter.data.to(built)


def linear_in_floats(layer: Int8Linear, dtype: torch.dtype) -> nn.Module:
    """The layer that the model had there, nn.Linear or Conv1D, with the weight that the int8 layer computes with."""
    weight = layer.dequantize(dtype)
    linear: Any
    if layer.conv1d:
        linear, weight = Conv1D(1, 1), weight.t().contiguous()  # type: ignore[no-untyped-call]
        linear.nf, linear.nx = layer.out_features, layer.in_features
    else:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    linear.train(layer.training)
    return cast(nn.Module, linear)
