"""Differences between versions of transformers: the tables are complete, and a plan suits all versions at once."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import WITHOUT_COLUMNS, read_all, read_json, save_by_hand, save_tiny
from test_plan import llama, plan_of, spec

from int8cli import convert
from int8cli.loaders.transformers_versions import (
    FLOAT32,
    SKIP_RULES,
    SURVEYED,
    SkipRule,
    covers_by_name,
    release,
    skip_rule,
)
from int8cli.planning import absent_modules
from int8cli.planning import reasons as why
from int8cli.planning.decisions import Plan, PlanOptions
from int8cli.planning.layouts.skip_modules import skip_modules
from int8cli.planning.plan import make_plan

RULES = pytest.mark.parametrize("rule", SKIP_RULES.values(), ids=SKIP_RULES)


def covers_by_whole_parts(entry: str, module: str) -> bool:
    """vllm-bnb-plugin 0.0.3, `is_layer_skipped_bnb`: a part of the name, or all of its first parts."""
    return entry in module.split(".") or f"{module}.".startswith(f"{entry}.")


ALL_LOADERS = SKIP_RULES | {"vllm-bnb-plugin 0.0.3": covers_by_whole_parts}
ALL_RULES = pytest.mark.parametrize("rule", ALL_LOADERS.values(), ids=ALL_LOADERS)


def left_alone(plan: Plan, rule: SkipRule) -> set[str]:
    """The modules with a weight that a loader with this rule leaves alone, of those that the plan knows."""
    modules = {d.module for d in plan.decisions if d.spec.name.endswith(".weight")}
    entries = skip_modules(plan)
    return {module for module in modules for entry in entries if rule(entry, module)}


def test_every_fact_is_of_a_version_that_was_surveyed() -> None:
    assert list(SKIP_RULES) == list(SURVEYED)
    assert sorted(SURVEYED, key=release) == list(SURVEYED)
    assert {fact.since for fact in FLOAT32} <= set(SURVEYED)


def test_an_unsurveyed_version_has_the_rule_of_the_version_before_it() -> None:
    assert skip_rule("5.0.3") is SKIP_RULES["5.0.0"]
    assert skip_rule("5.25.0.dev0") is SKIP_RULES["5.24.0"]
    assert skip_rule("4.50.0") is SKIP_RULES["4.57.6"]


def test_the_rule_agrees_with_the_installed_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    if not hasattr(utils, "should_convert_module"):
        pytest.skip("transformers 4 has no function for it")
    rule = skip_rule(transformers.__version__)
    modules = [
        "lm_head",
        "lm_head.dense",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.gate_proj",
        "layers.11.fc",
        "fc",
    ]
    entries = [
        "lm_head",
        "gate",
        "mlp.gate",
        r".*\.mlp",
        "model.layers.1",
        "^fc$",
        "layers.1",
        r"^(?:\w+\.)?fc$",
        "model",
    ]
    for module in modules:
        for entry in entries:
            assert rule(entry, module) != utils.should_convert_module(module, [entry])


@ALL_RULES
@pytest.mark.parametrize("skip", [("*.q_proj",), ("*.layers.1.*",), ("model.layers.1.mlp.up_proj",), ("*",)])
def test_skipped_modules_are_not_quantized_by_any_loader(rule: SkipRule, skip: tuple[str, ...]) -> None:
    plan = plan_of(*llama(12), skip=skip)
    found = left_alone(plan, rule)
    assert {d.module for d in plan.copied if d.reason == why.SKIPPED} <= found
    assert not found & {d.module for d in plan.quantized}


@RULES
def test_the_head_of_modernbert_is_named_in_every_version(rule: SkipRule) -> None:
    linears = (spec(f"model.layers.{index}.mlp.{name}.weight", 8, 8) for index in range(2) for name in ("Wi", "Wo"))
    plan = plan_of(*linears, config={"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]})
    assert any(rule(entry, "decoder") for entry in skip_modules(plan))
    assert plan.quantized
    assert not left_alone(plan, rule) & {d.module for d in plan.quantized}


@RULES
@pytest.mark.parametrize("head", [head for head in absent_modules.TIED_HEADS if "." in head])
def test_the_tied_head_of_a_decoder_in_another_model_is_named_in_every_version(head: str, rule: SkipRule) -> None:
    """As in EncoderDecoderModel, whose decoder is a whole model: transformers 4.57 did not load a BERT there."""
    config = {"model_type": "encoder-decoder", "decoder": {"model_type": absent_modules.TIED_HEADS[head][0]}}
    plan = plan_of(*(spec(f"decoder.layer.{index}.key.weight", 8, 8) for index in range(2)), config=config)
    assert any(rule(entry, f"decoder.{head}") for entry in skip_modules(plan))
    assert len(plan.quantized) == 2
    assert not left_alone(plan, rule) & {d.module for d in plan.quantized}


@ALL_RULES
def test_linear_subclasses_are_skipped_because_older_versions_replace_them(rule: SkipRule) -> None:
    linear = spec("transformer.h.0.mlp.dense_h_to_4h.weight", 8, 8)
    plan = plan_of(linear, config={"model_type": "falcon"})
    assert [d.reason for d in plan.decisions] == [why.SUBCLASS]
    assert left_alone(plan, rule) == {"transformer.h.0.mlp.dense_h_to_4h"}


@RULES
def test_routers_are_named_but_never_one_by_one(rule: SkipRule) -> None:
    gates = [spec(f"model.layers.{index}.mlp.gate.weight", 4, 8) for index in range(50)]
    plan = plan_of(*llama(50), *gates, spec("model.layers.0.other.gate.weight", 8, 8), spec("b.gate.bias", 8))
    assert sum("gate" in entry for entry in skip_modules(plan)) < 3
    if rule is not covers_by_name:
        assert {d.module for d in plan.copied if d.reason == why.ROUTER} <= left_alone(plan, rule)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_router_that_some_version_loads_in_float32_is_written_in_float32(stored: torch.dtype, tmp_path: Path) -> None:
    save_tiny("deepseek_v3", tmp_path / "made", torch.bfloat16)
    tensors = read_all(tmp_path / "made")
    gate = next(name for name in tensors if name.endswith("mlp.gate.weight"))
    tensors[gate] = (tensors[gate].float() / 3).to(stored)
    source = save_by_hand(tmp_path / "source", tensors, read_json(tmp_path / "made" / "config.json"))
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    written = read_all(tmp_path / "output")[gate]
    assert written.dtype == torch.float32
    assert torch.equal(written, tensors[gate].float())


def test_a_linear_that_is_always_float32_is_quantized_as_loaders_do() -> None:
    specs = [spec("audio_tower.layers.0.mlp.fc1.weight", 8, 8), spec("audio_tower.layers.0.mlp.fc1.bias", 8)]
    plan = make_plan(specs, {"model_type": "nemo_speechlm", "dtype": "bfloat16"}, PlanOptions())
    assert [d.module for d in plan.quantized] == ["audio_tower.layers.0.mlp.fc1"]
