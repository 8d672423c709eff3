"""What transformers' configuration classes put in the place of a field that config.json leaves out.

Owns these facts, read from 5.24.0 (`CONFIG_MAPPING[model_type]()`). Where a class is not listed nothing is known of it.
"""

from collections.abc import Iterable, Mapping
from typing import Any


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


WIDTHS, HEADS, KINDS = "widths", "heads", "kinds"
_TIES = "tie_word_embeddings"

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

# Classes around a language model that tie their head where only its config says so. In the others their own config
# counts from transformers 5 on; 4.57 asked the language model's alone.
_TIED_AS_WITHIN = _types(
    """
    fast_vlm glm4v glm4v_moe glm_ocr hunyuan_vl llava llava_next_video llava_onevision minimax_m3_vl paddleocr_vl
    qwen2_5_vl qwen2_vl vibevoice video_llama_3
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

# Families whose silence is understood, by what it is on; scripts/survey_class_defaults.py finds them by taking each
# field out of each class's config. Widths: heads are as wide as `head_width` says, else hidden_size / heads. Heads:
# there is a key-value head for each query head. Kinds: layers alternate as in estimate.layer_kinds.
_SILENCE = {
    "widths and heads and kinds": """
        aimv2 aimv2_text_model align align_text_model altclip altclip_text_model apertus apertus1p5
        apertus1p5_text arcee aria aria_text audio-spectrogram-transformer audioflamingo3_encoder autoformer
        axk1 axk2 aya_vision bamba bart bert-generation bigbird_pegasus biogpt blenderbot blenderbot-small
        blip_2_qformer blip_text_model bloom blt_global_transformer blt_local_decoder blt_local_encoder
        bridgetower bridgetower_text_model bros chinese_clip chinese_clip_text_model clap clap_audio_model
        clap_text_model clip_text_model clipseg clipseg_text_model clvp clvp_decoder clvp_encoder codegen cohere
        cohere2 cohere2_vision cohere_asr conditional_detr cosmos3_edge_vision ctrl d_fine dab-detr
        decision_transformer deepseek_v2 deepseek_v3 deepseek_v32 deepseek_vl deepseek_vl_hybrid deformable_detr
        detr diffllama dinat doge dots3_note_vision_encoder dpr edgetam_mask_decoder edgetam_video_mask_decoder
        encoder-decoder esmc falcon falcon_mamba flava flava_image_model flava_multimodal_model flava_text_model
        flex_olmo florence2 fsmt fun_asr_nano_encoder fuyu glm4_moe_lite glm_moe_dsa glmasr_encoder gpt-sw3 gpt2
        gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj gradium_phonon_tts granite granite4_vision
        granite4_vision_text granite_speech granite_speech_plus granitemoe granitemoehybrid granitemoeshared
        groupvit groupvit_text_model gte hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hunyuan_vl_text
        hunyuan_vl_vision hy_v4_vl_vision hyperclovax hyperclovax_vision_v2 idefics idefics3 imagegpt informer
        inkling2_vision inkling_vision instructblip instructblip_qformer instructblipvideo
        instructblipvideo_qformer jais2 janus kimi_k25 kimi_k25_vision led lilt llama llava llava_next
        llava_next_video m2m_100 mamba mamba2 marian markuplm mbart metaclip_2 metaclip_2_text_model minicpm3
        mixtral moonshine_streaming moss_transcribe_diarize_audio mpt musicgen musicgen_decoder musicgen_melody
        musicgen_melody_decoder mvp nanochat nemotron nemotron3_5_transcribe_asr_audio
        nemotron3_5_transcribe_word_timestamp nemotron3_diarization_audio nllb-moe olmo olmo2 olmo3 olmoe
        omdet-turbo omniasr opt ovis2_vision owlv2 owlv2_text_model owlvit owlvit_text_model patchtst pegasus
        pegasus_x perception_lm persimmon phi phi3 plbart pocket_tts pp_doclayout_v4 pp_formulanet
        pp_formulanet_text prophetnet rt_detr rt_detr_v2 rwkv sam2_mask_decoder sam2_video_mask_decoder sam3
        sam3_detr_decoder sam3_detr_encoder sam3_geometry_encoder sam3_lite_text sam3_lite_text_detr_decoder
        sam3_lite_text_detr_encoder sam3_lite_text_geometry_encoder sam3_lite_text_text_model
        sam3_tracker_mask_decoder sam3_tracker_video_mask_decoder sam_hq_mask_decoder sam_mask_decoder
        sarvam_mla siglip2_text_model siglip2_vision_model siglip_text_model smolvlm table-transformer
        time_series_transformer tipsv2 tipsv2_text_model tvp video_llama_3_vision video_llava videoprism
        videoprism_text_model vilt vipllava visual_bert vits vjepa2 voxtral_encoder whisper xclip
        xclip_text_model xglm youtu
        """,
    "widths and kinds": """
        EvollaModel audioflamingo3 bitnet chameleon csm csm_depth_decoder_model dbrx deepseek_ocr2
        deepseek_ocr2_encoder deepseek_ocr2_text emu3 emu3_text_model ernie4_5 ernie4_5_moe ernie4_5_vl_moe
        ernie4_5_vl_moe_text evolla exaone exaone4 exaone4_5 falcon_h1 fast_vlm fun_asr_nano gemma gemma2 gemma3
        gemma3_text glm glm4 glm46v glm4_moe glm4v glm4v_moe glm4v_moe_text glm4v_text glm_image glm_image_text
        glm_ocr glm_ocr_text glmasr glmga got_ocr2 gpt_oss granite_docling granite_docling_text helium hy_v3
        internvl jamba jetmoe jev lfm2 lfm2_moe lfm2_vl lightglue lighton_ocr llava_onevision minicpm_ocr
        minicpmv4_6 minicpmv4_7 minimax_m2 ministral mllama mllama_text_model moonshine_streaming_encoder
        moss_transcribe_diarize musicflamingo ovis2 paddleocr_vl paddleocr_vl_text paligemma phi4_multimodal
        phimoe pp_chart2table qianfan_ocr qwen2 qwen2_5_omni qwen2_5_omni_text qwen2_5_omni_thinker qwen2_5_vl
        qwen2_5_vl_text qwen2_audio qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
        qwen3_5_text qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_talker_text
        qwen3_omni_moe_text qwen3_omni_moe_thinker qwen3_vl_moe qwen3_vl_moe_text seed_oss shieldgemma2 smollm3
        solar_open stablelm starcoder2 step3p5 vaultgemma vibevoice vibevoice_asr video_llama_3
        """,
    "widths and heads": """
        blt_patcher cohere_compass cohere_compass_text granitemoe_swa idefics2 kyutai_speech_to_text mistral
        mistral3 modernbert-decoder moshi moshi_depth t5gemma ultrabert ultravbert
        """,
    "heads and kinds": """
        canary_decoder cohere2_moe dia_decoder hrm_text kosmos_2_5_vision_model longt5 mt5 pe_audio_encoder
        pe_audio_video_encoder pe_video_encoder pix2struct pix2struct_text_model pix2struct_vision_model
        pop2piano qwen2_5_omni_dit switch_transformers t5 timesfm udop umt5
        """,
    "widths": """
        dots1 exaone_moe gemma3n gemma3n_text granite_swa mellum t5_gemma_module t5gemma2_encoder t5gemma2_text
        voxtral_realtime_text
        """,
    "heads": """
        afmoe t5gemma2 voxtral_realtime_encoder
        """,
    "kinds": """
        cosmos3_edge cosmos3_edge_text cosmos3_omni dia_encoder gemma4_vision higgs_audio_v2 internlm3
        iquestcoder llama4 llama4_text ministral3 molmo2 molmo2_text muse_glimmer_assistant nemo_speechlm
        nemotron_h nemotron_h_omni neucodec qwen2_5_omni_talker qwen3_omni_moe_talker_code_predictor qwen3_vl
        qwen3_vl_text sarvam_moe step3p7 timesfm2_5 voxtral xcodec2 zamba zamba2
        """,
}
_UNDERSTOOD = {aspects: _types(names) for aspects, names in _SILENCE.items()}
# These have windows where the config does not speak of them.
_WINDOW_OF_CLASS = _types("idefics2 kyutai_speech_to_text mistral mistral3 moshi moshi_depth")
# Families with code on the Hub only, whose silence means the same, and those that only wrap a language model, which has
# a config and a model type of its own.
_OF_THE_HUB = _types(
    """
    aquila baichuan chatglm codeshell deepseek internlm internlm2 kimi_k2 orion phi-msft phi3_v qwen RefinedWeb
    RefinedWebModel stablelm_epoch xverse Yi
    NVLM_D deepseek_vl_v2 h2ovl_chat internvl_chat kimi_vl ovis skywork_chat
    """
)


def ties_head(config: Mapping[str, Any], language_config: Mapping[str, Any]) -> bool | None:
    """Whether the output head shares the embedding's weight: as a config says, or its class.

    `language_config` is that of the language model within, or `config` itself. Around a language model, both must say
    so: releases ask one or the other, and what is tied for one of them only is not counted as shared. None where the
    configs do not say and the class is not known.
    """
    own, within = _tied(config), _tied(language_config)
    if language_config is config:
        return own
    if language_config.get(_TIES) is True and config.get("model_type") in _TIED_AS_WITHIN:
        own = True
    if own is False or within is False:
        return False
    return own


def _tied(config: Mapping[str, Any]) -> bool | None:
    """What a config says, or else its class; None if that is not known."""
    stated, model_type = config.get(_TIES), config.get("model_type")
    if isinstance(stated, bool):
        return stated
    return model_type in TIED if model_type in TIED.union(*_UNDERSTOOD.values()) else None


def head_width(model_type: str) -> int | None:
    """What the class has for a head_dim that its config leaves out; None where that is hidden_size / heads."""
    return _HEAD_WIDTHS.get(model_type)


def understands(aspect: str, model_types: Iterable[str]) -> bool:
    """Whether it is known what the classes of these model types, one inside the other, have where a config is silent.

    `aspect` is WIDTHS, HEADS or KINDS: how wide heads are, how many share keys and values, which layers have windows.
    """
    known = _OF_THE_HUB.union(*(types for aspects, types in _UNDERSTOOD.items() if aspect in aspects))
    return known.issuperset(model_types)


def has_window_of_class(model_types: Iterable[str]) -> bool:
    """Whether the class of one of them has a sliding window of its own, unless the config names one or null."""
    return not _WINDOW_OF_CLASS.isdisjoint(model_types)
