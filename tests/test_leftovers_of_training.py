"""Files that training leaves behind are not taken for the model: loaders would fill what is missing at random."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import WITHOUT_COLUMNS, read_all, read_json, save_by_hand, save_tiny
from support.verifying import verified
from test_plan import plan_of, spec
from torch import Tensor

from int8cli import convert
from int8cli.commands.options import ConvertOptions, LayoutName
from int8cli.errors import UnsupportedModelError

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "model")


def saved(tiny: Path, tensors: dict[str, Tensor], path: Path) -> Path:
    return save_by_hand(path, tensors, read_json(tiny / "config.json"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model.", "module.model.", "'module'"),
        ("model.", "_orig_mod.model.", "'_orig_mod'"),
        ("layers.0.", "layers.0._orig_mod.", "'_orig_mod'"),
        ("layers.", "layers._fsdp_wrapped_module.", "'_fsdp_wrapped_module'"),
        ("layers.1.", "layers.1._checkpoint_wrapped_module.", "'_checkpoint_wrapped_module'"),
    ],
)
def test_the_names_of_a_wrapper_are_refused(old: str, new: str, words: str, tiny: Path, tmp_path: Path) -> None:
    tensors = {name.replace(old, new, 1): tensor for name, tensor in read_all(tiny).items()}
    if new.startswith("module."):
        tensors["module.lm_head.weight"] = tensors.pop("lm_head.weight")
    source = saved(tiny, tensors, tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=words) as error:
        convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    assert error.value.hint


@pytest.mark.parametrize(
    "leaf",
    ["lora_A.default.weight", "lora_B.weight", "lora_embedding_A.default.weight", "modules_to_save.default.weight"],
)
def test_an_adapter_that_is_not_merged_is_refused(leaf: str, tiny: Path, tmp_path: Path) -> None:
    tensors = read_all(tiny)
    tensors[f"{DOWN}.base_layer.weight"] = tensors.pop(f"{DOWN}.weight")
    source = saved(tiny, tensors | {f"{DOWN}.{leaf}": torch.ones(4, 4)}, tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="adapter that is not merged"):
        convert(source, tmp_path / "out", WITHOUT_COLUMNS)


def test_weights_that_were_not_gathered_are_refused(tiny: Path, tmp_path: Path) -> None:
    source = saved(tiny, read_all(tiny) | {f"{DOWN}.weight": torch.empty(0)}, tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="without gathering its parts"):
        convert(source, tmp_path / "out", WITHOUT_COLUMNS)


def test_a_model_may_have_a_part_called_module_and_empty_tensors(tiny: Path, tmp_path: Path) -> None:
    more = {"module.scale.weight": torch.ones(8), "model.table": torch.empty(0, 8), "model.empty": torch.empty(0)}
    convert(saved(tiny, read_all(tiny) | more, tmp_path / "source"), tmp_path / "out", WITHOUT_COLUMNS)
    assert verified(tmp_path / "out", tmp_path / "source").passed


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_a_layer_with_a_bias_alone_is_left_to_the_loader(layout: LayoutName, tiny: Path, tmp_path: Path) -> None:
    tensors = read_all(tiny)
    tensors[f"{DOWN}.bias"] = tensors.pop(f"{DOWN}.weight")[:, 0].clone()
    options = ConvertOptions(outliers="none", smooth="none", layout=layout)
    convert(saved(tiny, tensors, tmp_path / "source"), tmp_path / "out", options)
    assert verified(tmp_path / "out", tmp_path / "source").passed


def test_only_a_layer_without_any_weight_counts() -> None:
    whole = (spec("h.0.fc1.weight", 8, 8), spec("h.0.fc1.bias", 8))
    normed = (spec("h.0.fc2.weight_g", 8, 1), spec("h.0.fc2.weight_v", 8, 8), spec("h.0.fc2.bias", 8))
    deep = (spec("h.0.fc3.parametrizations.weight.original0", 8, 1), spec("h.0.fc3.bias", 8))
    plan = plan_of(*whole, *normed, *deep, spec("h.0.norm.bias", 8), spec("h.0.fc4.bias", 8))
    assert [name for name in plan.absent if name.startswith("h.")] == ["h.0.fc4"]


@pytest.mark.parametrize(
    "module", ["v_head.summary", "v_head", "value_head", "pretrained_model.v_head.summary", "medusa_head.0.0.linear"]
)
def test_heads_that_other_programs_read_stay_floats(module: str, tiny: Path, tmp_path: Path) -> None:
    tensors = read_all(tiny) | {f"{module}.weight": torch.randn(1, 32), f"{module}.bias": torch.randn(1)}
    convert(saved(tiny, tensors, tmp_path / "source"), tmp_path / "out", WITHOUT_COLUMNS)
    assert read_all(tmp_path / "out")[f"{module}.weight"].is_floating_point()
    assert verified(tmp_path / "out", tmp_path / "source").passed


def test_scales_of_the_cache_alone_are_no_quantization(tiny: Path, tmp_path: Path) -> None:
    """As llm-compressor saves a model of which only the KV cache has a scheme."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    section = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme, "format": "dense"}
    config = read_json(tiny / "config.json") | {"quantization_config": section}
    scales = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("k_scale", "v_scale")}
    source = save_by_hand(tmp_path / "source", read_all(tiny) | scales, config)
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    assert verified(tmp_path / "out", source).passed
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
    save_by_hand(source, read_all(tiny), config | {"quantization_config": section | {"config_groups": groups}})
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        convert(source, tmp_path / "other", WITHOUT_COLUMNS)


def test_a_variant_alone_is_named_with_the_way_to_convert_it(tiny: Path, tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", read_all(tiny), read_json(tiny / "config.json"))
    variant = (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=r"only a variant of the weights: model\.fp16\.safetensors"
    ) as error:
        convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    assert error.value.hint == "Give the path of that file."
    convert(variant, tmp_path / "out", WITHOUT_COLUMNS)
    assert verified(tmp_path / "out", variant).passed


def test_an_attention_layer_that_is_named_like_a_value_head_is_quantized() -> None:
    """Funnel's blocks have one."""
    name = "funnel.encoder.blocks.0.0.attention.v_head"
    plan = plan_of(spec(f"{name}.weight", 16, 16), config={"model_type": "funnel"})
    assert [each.module for each in plan.quantized] == [name]
