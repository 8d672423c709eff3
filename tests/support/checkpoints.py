"""Tiny checkpoints on disk, by transformers or by hand, and their conversion."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from int8cli import ConversionResult, ConvertOptions, convert
from int8cli.checkpoint.locate import opened_source
from int8cli.checkpoint.source import LocalFile
from int8cli.commands.convert import settings_of
from int8cli.conversion.column_source import NoColumns, RunTask
from int8cli.conversion.convert import ConversionRun
from int8cli.conversion.convert import convert as convert_shards
from int8cli.planning.decisions import Decision, PlanOptions
from int8cli.planning.layouts import LAYOUTS
from int8cli.planning.output_files import sidecar_specs
from int8cli.planning.survey import Survey, survey_source
from int8cli.progress import SILENT
from int8cli.records.conversion import FROM_ACTIVATIONS
from int8cli.report.card import render_card
from int8cli.results.stored_columns import StoredColumn, StoredColumns

# What most tests convert with: stored columns have test_sidecars.py and test_outlier_conversion.py.
WITHOUT_COLUMNS = ConvertOptions(outliers="none")


@dataclass(frozen=True)
class Tiny:
    """How to make a small model: class and config by their names in transformers, and the config's arguments."""

    model: str
    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_LLAMA, "head_dim": 8}
_BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BART = {
    "vocab_size": 99,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 41,
    "max_position_embeddings": 64,
}
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
_OPT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "ffn_dim": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_WHISPER = {
    **_BART,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_WHISPER.pop("max_position_embeddings")
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_MOE = {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MAMBA = {"vocab_size": 99, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}

# The architectures that every change is tried on.
LISTED = {
    "bloom": Tiny("BloomForCausalLM", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": Tiny("OPTForCausalLM", "OPTConfig", _OPT),
    "opt-projected": Tiny("OPTForCausalLM", "OPTConfig", {**_OPT, "word_embed_proj_dim": 24}),
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": Tiny(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
    ),
    "gptj": Tiny("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "gpt_neo": Tiny(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama-tied": Tiny("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-biased": Tiny("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", _GQA),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", _GQA),
    "gemma2": Tiny("Gemma2ForCausalLM", "Gemma2Config", _GQA),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "mpt": Tiny(
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "bart": Tiny("BartForConditionalGeneration", "BartConfig", _BART),
    "bert": Tiny("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": Tiny("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "deberta-v2": Tiny(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False},
    ),
    "whisper": Tiny("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "vit": Tiny("ViTForImageClassification", "ViTConfig", _VIT),
    "mamba": Tiny("MambaForCausalLM", "MambaConfig", _MAMBA),
    "t5": Tiny("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "relu"}),
    "t5-gated": Tiny(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig", {**_GQA, "num_local_experts": 4}),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MOE),
    "deepseek_v3": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "falcon": Tiny(
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}

# Other heads and bare models of the same families.
HEADS = {
    "bert-base": Tiny("BertModel", "BertConfig", _BERT),
    "bert-classifier": Tiny("BertForSequenceClassification", "BertConfig", _BERT),
    "bert-pretraining": Tiny("BertForPreTraining", "BertConfig", _BERT),
    "bert-qa": Tiny("BertForQuestionAnswering", "BertConfig", _BERT),
    "roberta-classifier": Tiny("RobertaForSequenceClassification", "RobertaConfig", _BERT),
    "bloom-base": Tiny("BloomModel", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt2-base": Tiny("GPT2Model", "GPT2Config", _GPT2),
    "gpt2-classifier": Tiny("GPT2ForSequenceClassification", "GPT2Config", {**_GPT2, "pad_token_id": 0}),
    "llama-classifier": Tiny("LlamaForSequenceClassification", "LlamaConfig", _LLAMA),
    "llama-tokens": Tiny("LlamaForTokenClassification", "LlamaConfig", _LLAMA),
    "t5-encoder": Tiny("T5EncoderModel", "T5Config", _T5),
    "vit-base": Tiny("ViTModel", "ViTConfig", _VIT),
    "bart-classifier": Tiny("BartForSequenceClassification", "BartConfig", _BART),
}


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
_CLIP = {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 24}
_MARIAN = {**_BART, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_DISTIL = {"vocab_size": 99, "dim": 32, "hidden_dim": 37, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}

# Architectures without rules of their own in the plan.
OTHERS = {
    "stablelm": Tiny("StableLmForCausalLM", "StableLmConfig", _LLAMA),
    "cohere": Tiny("CohereForCausalLM", "CohereConfig", _LLAMA),
    "cohere2": Tiny("Cohere2ForCausalLM", "Cohere2Config", _LLAMA),
    "granite": Tiny("GraniteForCausalLM", "GraniteConfig", _LLAMA),
    "granitemoe": Tiny("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_LLAMA, "num_local_experts": 4}),
    "olmo2": Tiny("Olmo2ForCausalLM", "Olmo2Config", _LLAMA),
    "olmoe": Tiny("OlmoeForCausalLM", "OlmoeConfig", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": Tiny("GemmaForCausalLM", "GemmaConfig", _GQA),
    "gemma3": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", _GQA),
    "smollm3": Tiny("SmolLM3ForCausalLM", "SmolLM3Config", _LLAMA),
    "phi": Tiny("PhiForCausalLM", "PhiConfig", {**_LLAMA, "num_key_value_heads": 4}),
    "persimmon": Tiny("PersimmonForCausalLM", "PersimmonConfig", _LLAMA),
    "starcoder2": Tiny("Starcoder2ForCausalLM", "Starcoder2Config", _LLAMA),
    "glm4": Tiny("Glm4ForCausalLM", "Glm4Config", _GQA),
    "nemotron": Tiny("NemotronForCausalLM", "NemotronConfig", _GQA),
    "gpt_oss": Tiny("GptOssForCausalLM", "GptOssConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4_5": Tiny("Ernie4_5ForCausalLM", "Ernie4_5Config", _GQA),
    "xglm": Tiny(
        "XGLMForCausalLM",
        "XGLMConfig",
        {"vocab_size": 99, "d_model": 32, "ffn_dim": 37, "num_layers": 2, "attention_heads": 4},
    ),
    "biogpt": Tiny("BioGptForCausalLM", "BioGptConfig", _TEXT),
    "codegen": Tiny("CodeGenForCausalLM", "CodeGenConfig", {**_GPT2, "rotary_dim": 4}),
    "gpt_bigcode": Tiny("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2),
    "ctrl": Tiny("CTRLLMHeadModel", "CTRLConfig", {**_GPT2, "dff": 37}),
    "openai-gpt": Tiny("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT2),
    "rwkv": Tiny("RwkvForCausalLM", "RwkvConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}),
    "mamba2": Tiny(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "falcon_mamba": Tiny("FalconMambaForCausalLM", "FalconMambaConfig", _MAMBA),
    "jamba": Tiny(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_LLAMA,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
    ),
    "electra": Tiny("ElectraForMaskedLM", "ElectraConfig", {**_BERT, "embedding_size": 24}),
    "electra-discriminator": Tiny("ElectraForPreTraining", "ElectraConfig", {**_BERT, "embedding_size": 24}),
    "distilbert": Tiny("DistilBertForMaskedLM", "DistilBertConfig", _DISTIL),
    "distilbert-classifier": Tiny("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL),
    "albert": Tiny("AlbertForMaskedLM", "AlbertConfig", {**_BERT, "embedding_size": 24}),
    "xlm-roberta": Tiny("XLMRobertaForMaskedLM", "XLMRobertaConfig", _BERT),
    "mpnet": Tiny("MPNetForMaskedLM", "MPNetConfig", _BERT),
    "modernbert": Tiny("ModernBertForMaskedLM", "ModernBertConfig", {**_BERT, "pad_token_id": 0}),
    "longformer": Tiny("LongformerForMaskedLM", "LongformerConfig", {**_BERT, "attention_window": 4}),
    "deberta": Tiny("DebertaForMaskedLM", "DebertaConfig", _BERT),
    "xlnet": Tiny(
        "XLNetLMHeadModel", "XLNetConfig", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37}
    ),
    "pegasus": Tiny("PegasusForConditionalGeneration", "PegasusConfig", _BART),
    "mbart": Tiny("MBartForConditionalGeneration", "MBartConfig", _BART),
    "m2m_100": Tiny("M2M100ForConditionalGeneration", "M2M100Config", _BART),
    "marian": Tiny("MarianMTModel", "MarianConfig", _MARIAN),
    "mt5": Tiny("MT5ForConditionalGeneration", "MT5Config", _T5),
    "umt5": Tiny("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "clip": Tiny("CLIPModel", "CLIPConfig", _CLIP),
    "siglip": Tiny("SiglipModel", "SiglipConfig", {"text_config": _TEXT, "vision_config": _VISION}),
    "dinov2": Tiny("Dinov2Model", "Dinov2Config", _VISION),
    "swin": Tiny(
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "wav2vec2": Tiny(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_BERT,
            "conv_dim": [16, 16],
            "conv_kernel": [3, 3],
            "conv_stride": [2, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "blip": Tiny(
        "BlipForConditionalGeneration",
        "BlipConfig",
        {"text_config": {**_TEXT, "encoder_hidden_size": 32}, "vision_config": _VISION},
    ),
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**_LLAMA, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "image_token_id": 90,
        },
    ),
    "qwen2_vl": Tiny(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {
                **_LLAMA,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
        },
    ),
    "gemma3-vision": Tiny(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": _GQA, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "paligemma": Tiny(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {**_GQA, "model_type": "gemma"},
            "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
            "projection_dim": 32,
        },
    ),
}


def is_known(tiny: Tiny) -> bool:
    """Whether the installed transformers has the model."""
    import transformers

    return hasattr(transformers, tiny.config) and hasattr(transformers, tiny.model)


def build_tiny(tiny: Tiny, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """The model with random weights, biases and norms included: transformers' own start leaves many at 0 and 1."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, tiny.config)(**tiny.arguments)
    model = getattr(transformers, tiny.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype)


def save_tiny(architecture: str, directory: Path, dtype: torch.dtype = torch.bfloat16, **save_kwargs: Any) -> Path:
    """Save a tiny model of a LISTED or HEADS architecture as transformers does; returns the directory."""
    build_tiny((LISTED | HEADS)[architecture], dtype).save_pretrained(directory, **save_kwargs)
    return directory


def save_by_hand(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A single-file safetensors checkpoint of just these tensors; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def survey(model: Path, *, skip: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> Survey:
    with opened_source(str(model), revision=None, download_dir=model / "incoming") as source:
        return survey_source(source, PlanOptions(skip, only))


def some_columns(decision: Decision) -> StoredColumns:
    """Three columns of a linear, or all if it has fewer: the first, the last and one between; no reasons."""
    in_features = in_features_of(decision)
    return stored_at(decision, *sorted({0, (in_features - 1) * 2 // 3, in_features - 1}))


def stored_at(decision: Decision, *indices: int) -> StoredColumns:
    columns = tuple(StoredColumn(index) for index in indices)
    size_bytes = sum(spec.nbytes for spec in sidecar_specs(decision, len(columns)))
    return StoredColumns(FROM_ACTIVATIONS, columns, size_bytes)


def in_features_of(decision: Decision) -> int:
    return decision.spec.shape[0 if decision.transpose else 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenColumns(NoColumns):
    """A source of given columns, by tensor."""

    found: Survey
    stored: Mapping[str, StoredColumns]

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        contents = next(each for each in self.found.shards if each.file_name == shard)
        names = (each.spec.name for each in contents.tensors)
        return {name: self.stored[name] for name in names if name in self.stored}


def convert_storing(
    model: Path,
    output: Path,
    stored: Callable[[Decision], StoredColumns | None] | None,
    options: ConvertOptions = WITHOUT_COLUMNS,
    *,
    chosen_from: str = FROM_ACTIVATIONS,
    calibration: str = "",
) -> ConversionResult:
    """Convert with columns that are known beforehand: `stored` says which of a quantized tensor, if any."""
    if stored is None:
        return convert(model, output, options)
    settings = settings_of(options)
    with opened_source(str(model), revision=None, download_dir=output / "int8" / "incoming") as source:
        found = survey_source(source, PlanOptions(settings.skip, settings.only), LAYOUTS[settings.layout])
        chosen = {each.spec.name: own for each in found.plan.quantized if (own := stored(each)) is not None}
        counts = {name: len(own.columns) for name, own in chosen.items()}
        found, columns = replace(found, stored_counts=counts), GivenColumns(found=found, stored=chosen)
        most = max(counts.values(), default=0)
        settings = replace(settings, outliers=chosen_from, outlier_columns=most, calibration=calibration)
        run = ConversionRun(output, options.on_nonfinite, threads=options.threads or 2)
        report = convert_shards(source, found, settings, run, render_card, SILENT, columns)
        return ConversionResult(output, report, seconds=0.0, peak_memory_bytes=None)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, as the format's own reader gives it."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)


def read_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of all shards under a directory."""
    files = sorted(directory.rglob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def quantize_with_bitsandbytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 data (out, in) and float32 scales (out,) as bitsandbytes' own layer makes them of a weight (out, in)."""
    from bitsandbytes.nn import Int8Params

    made: Any = Int8Params(weight.clone(), requires_grad=False)
    quantized = made.to("cpu")
    return quantized.data, quantized.SCB


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())
