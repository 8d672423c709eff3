"""More tiny models for the table of versions: hybrids, mixtures, speech, vision, and heads that the others lack."""

from typing import Any

from support.checkpoints import _BERT, _GQA, _LLAMA, _OPT, _T5, _TEXT, _VISION, LISTED, OTHERS, Tiny

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
_SHARED_MOE = {
    **_LLAMA,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_WAV2VEC2 = OTHERS["wav2vec2"].arguments
_ENCODER_DECODER = {
    "encoder": {**_BERT, "model_type": "bert"},
    "decoder": {**_BERT, "model_type": "bert", "is_decoder": True, "add_cross_attention": True},
}
_WITHOUT_SIZE: dict[str, Any] = {name: value for name, value in _VISION.items() if name != "image_size"}

FURTHER = {
    "git": Tiny("GitForCausalLM", "GitConfig", {**_BERT, "vision_config": _VISION}),
    "encoder-decoder": Tiny("EncoderDecoderModel", "EncoderDecoderConfig", _ENCODER_DECODER),
    "olmo": Tiny("OlmoForCausalLM", "OlmoConfig", _LLAMA),
    "exaone4": Tiny("Exaone4ForCausalLM", "Exaone4Config", _GQA),
    "helium": Tiny("HeliumForCausalLM", "HeliumConfig", _GQA),
    "glm": Tiny("GlmForCausalLM", "GlmConfig", _GQA),
    "seed_oss": Tiny("SeedOssForCausalLM", "SeedOssConfig", _GQA),
    "arcee": Tiny("ArceeForCausalLM", "ArceeConfig", _LLAMA),
    "lfm2": Tiny("Lfm2ForCausalLM", "Lfm2Config", {**_LLAMA, "layer_types": ["conv", "full_attention"]}),
    "hunyuan": Tiny("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", _GQA),
    "deepseek_v2": Tiny("DeepseekV2ForCausalLM", "DeepseekV2Config", LISTED["deepseek_v3"].arguments),
    "qwen2_moe": Tiny("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _SHARED_MOE),
    "minimax": Tiny("MiniMaxForCausalLM", "MiniMaxConfig", {**_GQA, "num_local_experts": 4}),
    "recurrent_gemma": Tiny(
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {**_LLAMA, "lru_width": 32, "num_hidden_layers": 3}
    ),
    "zamba": Tiny(
        "ZambaForCausalLM",
        "ZambaConfig",
        {
            **_GQA,
            "num_key_value_heads": 4,
            "num_hidden_layers": 6,
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
            "attention_head_dim": 16,
        },
    ),
    "zamba2": Tiny(
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 4,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "num_mem_blocks": 1,
        },
    ),
    "bamba": Tiny(
        "BambaForCausalLM", "BambaConfig", {**_LLAMA, **_MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1]}
    ),
    "falcon_h1": Tiny("FalconH1ForCausalLM", "FalconH1Config", {**_GQA, **_MAMBA2, "mamba_d_ssm": 64}),
    "qwen3_next": Tiny(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_GQA,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "jetmoe": Tiny(
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 24,
            "num_local_experts": 4,
        },
    ),
    "glm4_moe": Tiny(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **_GQA,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "dots1": Tiny(
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            **_GQA,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
    ),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {**_GQA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    "xlm": Tiny("XLMWithLMHeadModel", "XLMConfig", {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    "funnel": Tiny(
        "FunnelForMaskedLM",
        "FunnelConfig",
        {
            "vocab_size": 99,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 37,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
    ),
    "mobilebert": Tiny(
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        {**_BERT, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    ),
    "roformer": Tiny("RoFormerForMaskedLM", "RoFormerConfig", _BERT),
    "convbert": Tiny("ConvBertForMaskedLM", "ConvBertConfig", {**_BERT, "embedding_size": 32}),
    "rembert": Tiny(
        "RemBertForMaskedLM", "RemBertConfig", {**_BERT, "input_embedding_size": 16, "output_embedding_size": 48}
    ),
    "luke": Tiny("LukeForMaskedLM", "LukeConfig", {**_BERT, "entity_vocab_size": 20, "entity_emb_size": 16}),
    "data2vec-text": Tiny("Data2VecTextForMaskedLM", "Data2VecTextConfig", _BERT),
    "xmod": Tiny("XmodForMaskedLM", "XmodConfig", {**_BERT, "languages": ["en_XX"], "default_language": "en_XX"}),
    "prophetnet": Tiny(
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
    ),
    "longt5": Tiny("LongT5ForConditionalGeneration", "LongT5Config", _T5),
    "switch": Tiny(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "fsmt": Tiny(
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        {
            "src_vocab_size": 99,
            "tgt_vocab_size": 99,
            "langs": ["en", "de"],
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "bos_token_id": 0,
        },
    ),
    "hubert": Tiny("HubertForCTC", "HubertConfig", _WAV2VEC2),
    "wavlm": Tiny("WavLMForCTC", "WavLMConfig", _WAV2VEC2),
    "wav2vec2-layers": Tiny(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", {**_WAV2VEC2, "use_weighted_layer_sum": True}
    ),
    "wav2vec2-xvector": Tiny("Wav2Vec2ForXVector", "Wav2Vec2Config", _WAV2VEC2),
    "beit": Tiny("BeitForImageClassification", "BeitConfig", _VISION),
    "segformer": Tiny(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
    ),
    "yolos": Tiny(
        "YolosForObjectDetection", "YolosConfig", {**_VISION, "num_detection_tokens": 4, "image_size": [16, 16]}
    ),
    "siglip2": Tiny(
        "Siglip2Model", "Siglip2Config", {"text_config": _TEXT, "vision_config": {**_WITHOUT_SIZE, "num_patches": 16}}
    ),
    "idefics3": Tiny(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {"text_config": {**_GQA, "model_type": "llama"}, "vision_config": _VISION, "scale_factor": 1},
    ),
    "qwen2_5_vl": Tiny(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "num_heads": 4,
                "intermediate_size": 37,
                "patch_size": 4,
            },
        },
    ),
    "blip-2": Tiny(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {
            "vision_config": _VISION,
            "qformer_config": {**_BERT, "encoder_hidden_size": 32},
            "text_config": {**_OPT, "model_type": "opt"},
            "num_query_tokens": 4,
        },
    ),
    "shieldgemma2": Tiny(
        "ShieldGemma2ForImageClassification",
        "ShieldGemma2Config",
        {"text_config": _GQA, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "speecht5": Tiny(
        "SpeechT5ForTextToSpeech",
        "SpeechT5Config",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 37,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 37,
            "speech_decoder_prenet_units": 16,
            "speech_decoder_postnet_units": 16,
            "num_mel_bins": 8,
        },
    ),
    "xlnet-classifier": Tiny(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37},
    ),
    "t5-classifier": Tiny("T5ForSequenceClassification", "T5Config", _T5),
    "wav2vec2-pretraining": Tiny(
        "Wav2Vec2ForPreTraining",
        "Wav2Vec2Config",
        {**_WAV2VEC2, "codevector_dim": 32, "proj_codevector_dim": 16, "num_codevectors_per_group": 8},
    ),
}
