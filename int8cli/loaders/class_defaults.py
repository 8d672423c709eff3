"""What transformers' configuration classes put in the place of a field that config.json leaves out.

Owns these facts, read from 5.24.0 (`CONFIG_MAPPING[model_type]()`). Where a class is not listed nothing is known of it.
"""

from collections.abc import Mapping
from typing import Any


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Output head and input embedding are one weight, unless the config says otherwise.
TIED = _types(
    """
    albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip blip_text_model
    bloom camembert canary cohere cohere2 cohere2_moe cohere2_vision convbert cpmant ctrl data2vec-text deberta
    deberta-v2 deepseek_vl deepseek_vl_hybrid distilbert electra ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe esm falcon
    falcon_mamba flaubert florence2 fnet fun_asr_nano funnel gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4
    gemma4_text gemma4_unified gemma4_unified_text glmasr got_ocr2 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese
    granite_docling granite_speech granite_speech_plus granite_swa gte hunyuan_vl ibert internvl janus jetmoe
    jina_embeddings_v3 kosmos-2 kosmos-2.5 layoutlm led lfm2 lfm2_vl lfm3 lfm3_vl lighton_ocr longformer longt5 luke
    m2m_100 mamba marian mbart megatron-bert minicpm3 mistral3 mobilebert modernbert modernbert-decoder moonshine mpnet
    mpt mra mt5 mvp nllb-moe nystromformer openai-gpt opt ovis2 paddleocr_vl paligemma pegasus pegasus_x plbart
    pop2piano pp_chart2table prophetnet qwen2_5_omni_text qwen3 qwen3_asr recurrent_gemma roberta roberta-prelayernorm
    roc_bert roformer seamless_m4t seamless_m4t_v2 shieldgemma2 smollm3 speech_to_text squeezebert starcoder2
    switch_transformers t5 t5gemma t5gemma2 tapas trocr udop umt5 vaultgemma visual_bert voxtral_realtime whisper xglm
    xlm
    """
)

# Families with a width of heads of their own, which is not hidden_size / heads.
_HEAD_WIDTHS = {
    **dict.fromkeys(("gpt_oss",), 64),
    **dict.fromkeys(
        (
            *("ernie4_5", "glm", "glm4", "helium", "hy_v3", "jetmoe", "mellum", "minimax_m2", "paddleocr_vl_text"),
            *("qwen3", "seed_oss", "solar_open", "step3p5"),
        ),
        128,
    ),
    **dict.fromkeys(
        (
            *("gemma", "gemma2", "gemma3_text", "gemma3n_text", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
            *("t5_gemma_module", "t5gemma2_text", "vaultgemma"),
        ),
        256,
    ),
}


def ties_head(config: Mapping[str, Any], language_config: Mapping[str, Any]) -> bool:
    """Whether the output head shares the embedding's weight: as a config says, its language model's, or its class."""
    for each in (config, language_config):
        stated = each.get("tie_word_embeddings")
        if isinstance(stated, bool):
            return stated
    return config.get("model_type") in TIED


def head_width(model_type: str) -> int | None:
    """What the class has for a head_dim that its config leaves out; None where that is hidden_size / heads."""
    return _HEAD_WIDTHS.get(model_type)
