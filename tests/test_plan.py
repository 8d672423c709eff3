"""What becomes int8 and why, compared with what transformers' bitsandbytes path replaces on the meta device."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.loaders.transformers_versions import SKIP_RULES, release, skip_rule
from int8cli.planning import absent_modules
from int8cli.planning import reasons as why
from int8cli.planning.decisions import Decision, Plan, PlanOptions
from int8cli.planning.layouts.skip_modules import EXPERTS_PATTERN, covers, skip_modules
from int8cli.planning.plan import kind_of, make_plan

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from surveying.building import build, describe
from surveying.built_model import as_built_model
from surveying.comparing import differences, dtype_differences, plan_for, skip_differences


def spec(name: str, *shape: int, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def plan_of(
    *specs: TensorSpec,
    config: dict[str, Any] | None = None,
    skip: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> Plan:
    return make_plan(specs, config or {}, PlanOptions(skip, only))


def decide(*specs: TensorSpec, config: dict[str, Any] | None = None) -> Decision:
    """The decision on the first of the tensors."""
    return plan_of(*specs, config=config).decisions[0]


def llama(layers: int = 2, prefix: str = "model.") -> list[TensorSpec]:
    specs = [
        spec(f"{prefix}embed_tokens.weight", 96, 32),
        spec(f"{prefix}norm.weight", 32),
        spec("lm_head.weight", 96, 32),
    ]
    for layer in range(layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            specs.append(spec(f"{prefix}layers.{layer}.{name}.weight", 32, 32))
        specs.append(spec(f"{prefix}layers.{layer}.mlp.up_proj.weight", 64, 32))
        specs.append(spec(f"{prefix}layers.{layer}.mlp.down_proj.weight", 32, 64))
        specs.append(spec(f"{prefix}layers.{layer}.input_layernorm.weight", 32))
    return specs


# What a tensor is


def test_projections_become_int8_and_the_rest_has_reasons() -> None:
    reasons = {d.kind: d.reason for d in plan_of(*llama()).decisions}
    assert reasons["model.layers.*.mlp.up_proj.weight"] == why.LINEAR
    assert reasons["model.embed_tokens.weight"] == why.EMBEDDING
    assert reasons["lm_head.weight"] == why.HEAD
    assert reasons["model.norm.weight"] == why.NORM_OR_BIAS


def test_percent_counts_every_stored_element() -> None:
    plan = plan_of(spec("h.0.q_proj.weight", 8, 8), spec("wte.weight", 24, 8))
    assert (plan.parameters, plan.quantized_parameters, plan.percent_quantized) == (256, 64, 25.0)


def test_planning_needs_no_torch() -> None:
    code = "import sys, int8cli.planning.plan, int8cli.planning.layouts.skip_modules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plan_without_tensors_has_zero_percent() -> None:
    assert plan_of().percent_quantized == 0.0


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (1, 1), (3, 5)])
def test_tiny_and_odd_linears_become_int8(shape: tuple[int, int]) -> None:
    assert decide(spec("layers.0.mlp.gate_proj.weight", *shape)).quantize


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (spec("layers.0.q_proj.weight", 8, 8, dtype="I64"), why.NOT_FLOAT),
        (spec("layers.0.q_proj.weight", 8, 8, dtype="F64"), why.NOT_FLOAT),
        (spec("layers.0.q_proj.weight", 8, 8, dtype="F8_E4M3"), why.NOT_FLOAT),
        (spec("conv1.weight", 8, 3, 4, 4), why.NOT_A_MATRIX),
        (spec("mlp.experts.gate_up_proj", 4, 8, 8), why.NOT_A_MATRIX),
        (spec("attn.relative_position_bias_table", 9, 4), why.NOT_A_WEIGHT),
        (spec("layers.0.q_proj.weight", 0, 8), why.EMPTY),
        (spec("logit_scale"), why.NORM_OR_BIAS),
        (spec("mystery.weight", 8, 8), why.UNKNOWN),
    ],
)
def test_what_cannot_be_a_linear_is_copied(tensor: TensorSpec, reason: str) -> None:
    decision = decide(tensor)
    assert (decision.quantize, decision.transpose, decision.reason) == (False, False, reason)


def test_a_bias_distinguishes_a_linear_from_an_embedding() -> None:
    assert not decide(spec("patch_embed.weight", 8, 12)).quantize
    assert decide(spec("patch_embed.weight", 8, 12), spec("patch_embed.bias", 8)).quantize


def test_a_bias_of_another_length_does_not_mark_a_linear() -> None:
    assert decide(spec("mystery.weight", 8, 12), spec("mystery.bias", 5)).reason == why.UNKNOWN


def test_routers_and_experts_are_not_quantized() -> None:
    router = decide(spec("model.layers.0.mlp.gate.weight", 4, 8))
    expert = decide(spec("model.layers.0.mlp.experts.3.up_proj.weight", 8, 8))
    shared = decide(spec("model.layers.0.mlp.shared_experts.up_proj.weight", 8, 8))
    assert (router.reason, expert.reason, shared.reason) == (why.ROUTER, why.EXPERT, why.LINEAR)


def test_a_head_in_the_file_has_a_reason_if_it_is_tied() -> None:
    assert decide(spec("lm_head.weight", 96, 8), config={"tie_word_embeddings": True}).reason == why.TIED_HEAD


def test_the_wo_of_t5_is_not_quantized_but_that_of_other_models_is() -> None:
    wo = spec("encoder.block.0.layer.1.DenseReluDense.wo.weight", 8, 16)
    assert decide(wo, config={"model_type": "t5"}).reason == why.FLOAT32
    assert decide(wo, config={"model_type": "vision", "text_config": {"model_type": "umt5"}}).reason == why.FLOAT32
    assert decide(wo, config={"model_type": "longt5"}).quantize


def test_falcon_says_that_its_linears_are_its_own() -> None:
    weight = spec("transformer.h.0.mlp.dense_h_to_4h.weight", 16, 4)
    assert decide(weight, config={"model_type": "falcon"}).reason == why.SUBCLASS


def test_torch_attention_keeps_its_own_output_projection() -> None:
    out = (spec("head.attention.out_proj.weight", 8, 8), spec("head.attention.out_proj.bias", 8))
    assert decide(*out).quantize
    assert decide(*out, spec("head.attention.in_proj_weight", 24, 8)).reason == why.SUBCLASS


def test_a_square_conv1d_is_transposed_too() -> None:
    block = [
        spec("h.0.attn.c_proj.weight", 8, 8),
        spec("h.0.attn.c_proj.bias", 8),
        spec("h.0.attn.c_attn.weight", 8, 24),
        spec("h.0.attn.c_attn.bias", 24),
    ]
    assert [d.transpose for d in plan_of(*block).quantized] == [True, True]


def test_a_linear_with_the_name_of_a_conv1d_is_not_transposed() -> None:
    block = [
        spec("h.0.attn.c_proj.weight", 8, 8),
        spec("h.0.attn.c_proj.bias", 8),
        spec("h.0.attn.c_attn.weight", 12, 8),
        spec("h.0.attn.c_attn.bias", 12),
    ]
    assert [d.transpose for d in plan_of(*block).quantized] == [False, False]


def test_kinds_hide_every_index() -> None:
    assert kind_of("model.layers.11.mlp.experts.3.w1.weight") == "model.layers.*.mlp.experts.*.w1.weight"


# Options


def test_skipped_modules_are_not_quantized() -> None:
    plan = plan_of(*llama(), skip=("*.layers.1.*",))
    assert {d.reason for d in plan.copied if ".1." in d.spec.name} == {why.SKIPPED, why.NORM_OR_BIAS}
    assert len(plan.quantized) == 6


def test_only_narrows() -> None:
    plan = plan_of(*llama(), only=("*.q_proj",))
    assert {d.kind for d in plan.quantized} == {"model.layers.*.self_attn.q_proj.weight"}
    assert why.NOT_NAMED in {d.reason for d in plan.copied}


def test_only_cannot_make_an_embedding_a_linear() -> None:
    plan = plan_of(*llama(), only=("model.embed_tokens", "*.q_proj"))
    assert plan.decisions[0].reason == why.EMBEDDING
    assert plan.unmatched_patterns == ("model.embed_tokens",)


def test_patterns_are_case_sensitive_and_typos_give_a_warning() -> None:
    plan = plan_of(*llama(), skip=("*.Q_proj", "lm_head", "*.k_proj"))
    assert plan.unmatched_patterns == ("*.Q_proj",)


def test_non_finite_tensors_become_copies() -> None:
    plan = plan_of(*llama()).with_copied({"model.layers.0.mlp.up_proj.weight", "model.norm.weight"})
    assert [d.spec.name for d in plan.decisions if d.reason == why.NON_FINITE] == ["model.layers.0.mlp.up_proj.weight"]
    assert len(plan.quantized) == 11


# Llm_int8_skip_modules


def heads(*entries: str) -> list[str]:
    """These entries, and the heads that classes for other tasks would make anew."""
    return sorted((*entries, *absent_modules.TASK_HEADS))


def test_the_head_is_named_though_it_is_tied_and_absent() -> None:
    specs = [s for s in llama() if s.name != "lm_head.weight"]
    assert skip_modules(plan_of(*specs, config={"model_type": "llama"})) == heads("lm_head")
    assert skip_modules(plan_of(*specs, config={"model_type": "whisper"})) == heads("lm_head", "proj_out")


def test_without_a_model_type_every_known_head_is_named() -> None:
    plan = plan_of(*(s for s in llama() if s.name != "lm_head.weight"))
    entries = skip_modules(plan)
    assert {"lm_head", "proj_out", "cls.predictions.decoder", "lm_head.decoder"} <= set(entries)
    assert not any(covers(entry, d.module) for entry in entries for d in plan.quantized)


def test_a_plain_model_names_its_head_and_nothing_else() -> None:
    assert skip_modules(plan_of(*llama(), config={"model_type": "llama"})) == heads("lm_head")


def test_a_skip_entry_never_covers_a_quantized_module() -> None:
    dense = [spec("lm_head.dense.weight", 8, 8), spec("lm_head.dense.bias", 8), spec("lm_head.decoder.weight", 96, 8)]
    plan = plan_of(*dense)
    entries = skip_modules(plan)
    assert [d.module for d in plan.quantized] == ["lm_head.dense"]
    assert any(covers(entry, "lm_head.decoder") for entry in entries)
    assert not any(covers(entry, "lm_head.dense") for entry in entries)


def test_skipping_a_router_does_not_skip_the_gate_of_the_shared_expert() -> None:
    plan = plan_of(
        spec("model.layers.0.mlp.gate.weight", 4, 8), spec("model.layers.0.mlp.shared_expert_gate.weight", 1, 8)
    )
    assert "mlp.gate" in skip_modules(plan)
    assert "gate" not in skip_modules(plan)


def test_skipping_one_layer_does_not_skip_the_eleventh() -> None:
    plan = plan_of(*llama(12), skip=("*.layers.1.*",))
    entries = skip_modules(plan)
    for decision in plan.quantized:
        assert not any(covers(entry, decision.module) for entry in entries)
    for name in ("model.layers.1.mlp.up_proj", "layers.1.mlp.up_proj"):
        assert any(covers(entry, name) for entry in entries)


@pytest.mark.parametrize(("stored", "loaded"), [("model.", ""), ("", "model."), ("model.", "model.language_model.")])
def test_entries_hold_with_and_without_the_prefix(stored: str, loaded: str) -> None:
    entries = skip_modules(plan_of(*llama(prefix=stored), skip=("*layers.0.mlp.up_proj",)))
    assert any(covers(entry, f"{loaded}layers.0.mlp.up_proj") for entry in entries)
    assert not any(covers(entry, f"{loaded}layers.1.mlp.up_proj") for entry in entries)


def test_a_name_that_is_a_suffix_of_others_is_anchored() -> None:
    plan = plan_of(spec("proj.weight", 8, 8), spec("layers.0.proj.weight", 8, 8), skip=("proj",))
    entries = skip_modules(plan)
    assert any(covers(entry, "proj") for entry in entries)
    assert not any(covers(entry, "layers.0.proj") for entry in entries)


def test_unusual_names_are_escaped() -> None:
    plan = plan_of(spec("a(b.q_proj.weight", 8, 8), skip=("*",))
    assert any(covers(entry, "a(b.q_proj") for entry in skip_modules(plan))


def test_thousands_of_experts_are_one_entry() -> None:
    experts = [spec(f"model.layers.0.mlp.experts.{n}.up_proj.weight", 8, 8) for n in range(3000)]
    plan = plan_of(*llama(), *experts, config={"model_type": "qwen3_moe"})
    assert skip_modules(plan) == heads(EXPERTS_PATTERN, "lm_head")


def test_a_non_finite_tensor_that_was_copied_is_named() -> None:
    plan = plan_of(*llama()).with_copied({"model.layers.0.mlp.up_proj.weight"})
    assert any(covers(entry, "model.layers.0.mlp.up_proj") for entry in skip_modules(plan))


def test_every_entry_compiles_and_the_list_is_sorted() -> None:
    entries = skip_modules(plan_of(*llama(3), skip=("*.mlp.*",)))
    assert entries == sorted(set(entries))
    assert all(re.compile(entry) for entry in entries)


@pytest.mark.parametrize("module", ["decoder.layers.0.encoder_attn.attention_weights", "quantizer.weight_proj"])
def test_a_name_that_transformers_5_0_misreads_stays_a_float(module: str) -> None:
    plan = plan_of(*llama(), spec(f"{module}.weight", 16, 32), spec(f"{module}.bias", 16))
    (decision,) = (each for each in plan.decisions if each.module == module and each.spec.name.endswith("weight"))
    assert (decision.quantize, decision.reason) == (False, "named so that transformers 5.0 would not load it in int8")
    for rule in SKIP_RULES.values():
        assert any(rule(entry, module) for entry in skip_modules(plan))


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        *(("luke", "lm_head.decoder"), ("luke", "entity_predictions.decoder"), ("mega", "mlm_head")),
        *(("nezha", "cls.predictions.decoder"), ("rembert", "cls.predictions.decoder")),
        ("transfo-xl", "crit.out_layers.2"),
    ],
)
def test_a_tied_head_that_is_not_in_the_file_is_named_for_every_version(model_type: str, head: str) -> None:
    plan = plan_of(*llama(), config={"model_type": model_type})
    for rule in SKIP_RULES.values():
        assert any(rule(entry, head) for entry in skip_modules(plan))


def test_a_table_of_degrees_is_an_embedding() -> None:
    for side in ("in", "out"):
        table = spec(f"encoder.{side}_degree_encoder.weight", 64, 32)
        assert decide(table, config={"model_type": "graphormer"}).reason == why.MAYBE_EMBEDDING


# Against transformers

CLASSES = [
    ("bloom", "BloomForCausalLM", {}),
    ("bloom", "BloomForSequenceClassification", {}),
    ("opt", "OPTForCausalLM", {"word_embed_proj_dim": 256}),
    ("gpt2", "GPT2LMHeadModel", {}),
    ("gpt2", "GPT2ForTokenClassification", {}),
    ("gpt_neox", "GPTNeoXForCausalLM", {}),
    ("gptj", "GPTJForCausalLM", {}),
    ("gpt_neo", "GPTNeoForCausalLM", {}),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", {}),
    ("llama", "LlamaForCausalLM", {}),
    ("llama", "LlamaForSequenceClassification", {}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("llama", "LlamaForCausalLM", {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}),
    ("mistral", "MistralForCausalLM", {}),
    ("qwen2", "Qwen2ForCausalLM", {}),
    ("qwen3", "Qwen3ForCausalLM", {}),
    ("gemma2", "Gemma2ForCausalLM", {}),
    ("phi3", "Phi3ForCausalLM", {}),
    ("mpt", "MptForCausalLM", {}),
    ("bart", "BartForConditionalGeneration", {}),
    ("bert", "BertForMaskedLM", {}),
    ("bert", "BertForSequenceClassification", {}),
    ("bert", "BertModel", {}),
    ("roberta", "RobertaForMaskedLM", {}),
    ("roberta", "RobertaForTokenClassification", {}),
    ("deberta-v2", "DebertaV2ForMaskedLM", {}),
    ("whisper", "WhisperForConditionalGeneration", {}),
    ("vit", "ViTForImageClassification", {}),
    ("mamba", "MambaForCausalLM", {}),
    ("t5", "T5ForConditionalGeneration", {}),
    ("t5", "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("mixtral", "MixtralForCausalLM", {}),
    ("qwen3_moe", "Qwen3MoeForCausalLM", {}),
    ("deepseek_v3", "DeepseekV3ForCausalLM", {}),
    ("falcon", "FalconForCausalLM", {}),
    ("wav2vec2", "Wav2Vec2ForCTC", {}),
    ("clip", "CLIPModel", {}),
    ("gte", "GteForMaskedLM", {}),
    ("zamba", "ZambaForCausalLM", {}),
    ("gpt2", "GPT2LMHeadModel", {"add_cross_attention": True}),
    ("albert", "AlbertForMaskedLM", {}),
    ("esm", "EsmForMaskedLM", {}),
    ("xlnet", "XLNetLMHeadModel", {}),
]


# The first surveyed version in which the loader leaves alone what the plan does; those before it would quantize more.
FEWER_INT8_SINCE = {
    "falcon": "5.23.0",  # a linear class of the model's own
    "zamba": "5.23.0",  # layers that share one weight
}


@pytest.mark.parametrize(("model_type", "class_name", "config"), CLASSES)
def test_the_plan_equals_what_transformers_loads_in_int8(
    model_type: str, class_name: str, config: dict[str, Any]
) -> None:
    import transformers
    from transformers import CONFIG_MAPPING

    version = transformers.__version__
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version} does not know {model_type}")
    model = build(class_name, partial(CONFIG_MAPPING[model_type], **config), "")
    built = as_built_model(describe(model_type, class_name, model))
    plan = plan_for(built)
    assert plan.quantized or model_type == "falcon"
    found = list(differences(built, plan))
    if release(version) < release(FEWER_INT8_SINCE.get(model_type, "0")):
        assert {severity for severity, *_ in found} == {"missed"}
    else:
        assert found == []
    rule = skip_rule(version)
    assert [found for found in skip_differences(built, plan, rule) if found[0] == "FATAL"] == []
    assert [found for found in dtype_differences(built) if found[0] == "narrow"] == []
