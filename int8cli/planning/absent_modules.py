"""Modules that a loader makes although the checkpoint has no tensor of their name, by model family.

They are tied to other modules, made from a weight that is split on load, or new in the class that is loaded. Those that
stay floats must be named in `llm_int8_skip_modules`. Has only tables: `plan` and `skip_modules` apply them.
"""

# Output heads that are not called lm_head, by model type. A tied head is not in the file, but `llm_int8_skip_modules`
# must still name it.
TIED_HEADS: dict[str, tuple[str, ...]] = {
    "cls.predictions.decoder": (
        *("bert", "big_bird", "blip", "deberta", "deberta-v2", "encoder-decoder", "ernie", "fnet", "layoutlm"),
        *("lxmert", "megatron-bert", "mobilebert", "mra", "nezha", "nomic_bert", "nystromformer", "rembert"),
        *("roc_bert", "roformer", "squeezebert", "tapas", "visual_bert", "yoso"),
    ),
    "lm_head.decoder": (
        *("bert-generation", "camembert", "data2vec-text", "esm", "gte", "ibert", "jina_embeddings_v3", "longformer"),
        *("luke", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    ),
    "lm_head.out_proj": ("t5gemma", "t5gemma2"),
    "proj_out": ("canary", "cohere_asr", "moonshine", "moonshine_streaming", "whisper"),
    "output_projection": ("biogpt", "fsmt", "trocr"),
    "generator_lm_head": ("convbert", "electra"),
    "^decoder$": ("modernbert", "modernbert-decoder"),
    "pred_layer.proj": ("flaubert", "xlm"),
    "predictions.decoder": ("albert",),
    "vocab_projector": ("distilbert",),
    "embed_out": ("gpt_neox", "gpt_neox_japanese"),
    "ctc_head": ("granite_speech5_ctc",),
    "entity_predictions.decoder": ("luke",),
    "head.decoder": ("ultrabert",),
    "mlm_head": ("mega",),
    "lm_loss": ("xlnet",),
    "unembedding_projection": ("neomme",),
    "^head$": ("rwkv",),
    "^output$": ("git",),
}

# Heads of other tasks. A class of the same family creates one that the checkpoint lacks. The loader supports that only
# for plain linear layers.
TASK_HEADS = ("score", "classifier", "qa_outputs", "classification_head")

# Layers of other tasks' classes under further names, and the families that have them: found by building every class of
# transformers 5.24's tables of tasks. A checkpoint of another task has none of them.
FAMILY_TASK_HEADS: dict[str, tuple[str, ...]] = {
    "cls.seq_relationship": ("bert", "big_bird", "ernie", "fnet", "megatron-bert", "mobilebert", "visual_bert"),
    "pre_classifier": ("distilbert", "mra", "nystromformer", "yoso"),
    "sequence_summary": ("convbert", "electra", "flaubert", "roformer", "xlm", "xlnet"),
    "logits_proj": ("flaubert", "xlm", "xlnet"),
    "qa_classifier": ("big_bird",),
    "answer_head": ("lxmert",),
    "splinter_qass": ("splinter",),
    "head.dense": ("modernbert",),
    "pooler.dense": ("deberta", "deberta-v2"),
    "dense": ("eurobert",),
    "cls_classifier": ("deit",),
    "distillation_classifier": ("deit",),
    "classifier_distill": ("levit",),
    "dist_head": ("swiftformer",),
    **dict.fromkeys(
        ("projector", "tdnn", "feature_extractor"),
        ("data2vec-audio", "unispeech-sat", "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "wavlm"),
    ),
}
FAMILY_TASK_HEADS["projector"] += ("hubert", "sew", "sew-d", "unispeech", "whisper")

# The same of masked language models. Sentence encoders name their classes in config.json, and have none of their heads
# (all-mpnet-base-v2).
FAMILY_TASK_HEADS |= {
    "cls.predictions.transform.dense": TIED_HEADS["cls.predictions.decoder"],
    "lm_head.dense": TIED_HEADS["lm_head.decoder"],
    "generator_predictions.dense": TIED_HEADS["generator_lm_head"],
    "predictions.dense": TIED_HEADS["predictions.decoder"],
    "vocab_transform": TIED_HEADS["vocab_projector"],
}

# Families whose base class has a pooler that checkpoints of the masked language model lack. The loader creates it, but
# only as a plain linear layer.
POOLED = frozenset(TIED_HEADS["cls.predictions.decoder"] + TIED_HEADS["lm_head.decoder"])
POOLER = "pooler.dense"

# Other linear layers that transformers leaves alone, whose own names are not in the file: they are tied to others, or
# made from a weight that is split on load. Entries for `llm_int8_skip_modules`, by model type.
_SELF_ATTENTION = (r".*\.self_attn\.[qkv]_proj",)
ABSENT_LINEARS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("d_fine", "deimv2", "rt_detr_v2"), ("class_embed", "bbox_embed")),
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino"), ("bbox_embed", r".*\.bbox_embed")),
    **dict.fromkeys(("jina_embeddings_v3", "nemo_speechlm", "nomic_bert", "tipsv2_text_model"), _SELF_ATTENTION),
    **dict.fromkeys(
        ("molmo2", "molmo2_text"),
        (r"(?:.*language_model\.)?layers\.\d+\.(?:self_attn\.[qkv]|mlp\.(?:gate|up))_proj",),
    ),
    **dict.fromkeys(("radio", "tipsv2", "tipsv2_dpt", "tipsv2_vision_model"), (r".*\.attention\.[qkv]_proj",)),
    **dict.fromkeys(("zamba", "zamba2"), (r".*\.shared_transf(?:ormer)?",)),
    "bark": (r"fine_acoustics\.lm_heads", "lm_heads"),
    "blip": ("text_decoder.cls.predictions.decoder",),
    "dab-detr": (r"(?:.*\.)?decoder\.bbox_embed",),
    "deepseek_v4": (r".*\.compressor\.(?:indexer\.)?(?:gate|kv)_proj",),
    "deformable_detr": (r"(?:.*\.)?bbox_embed", r"(?:.*\.)?class_embed"),
    "gradium_phonon_tts": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gte": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    "hrm_text": (r".*\.self_attn\.(?:q|k|v|gate)_proj", r".*\.mlp\.(?:gate|up)_proj"),
    "jev": ("^proj$",),
    "kimi_k25": (r".*\.attn\.[qkv]_proj",),
    "lara_mini": ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
    "mistral_large4": (r".*vision_tower\.transformer\.layers\.\d+\.attention\.[qk]_proj",),
    "nemotron_h_omni": (r".*\.attention\.[qkv]_proj", "multi_modal_projector.linear_2"),
    "pp_doclayout_v3": (r"(?:.*\.)?decoder\.bbox_embed", r"(?:.*\.)?decoder\.class_embed"),
    "qianfan_ocr": (r".*vision_tower\.layers\.\d+\.attention\.[qkv]_proj",),
    "rf_detr": (r".*decoder\.layers\.\d+\.self_attn\.[qkv]_proj",),
    "sapiens2": (r".*\.mlp\.(?:gate|up)_proj",),
    "sarvam_moe": (r".*\.self_attn\.[qkv]_proj", r"layers\.\d+\.self_attn\.[qkv]_proj"),
    "step3p7": (r".*vision_model\.layers\.\d+\.self_attn\.[qkv]_proj",),
    "transfo-xl": ("crit.out_layers",),
    "unlimited_ocr": ("multi_modal_projector", r".*vision_encoder\.encoder\.layers\.\d+\.self_attn\.[qkv]_proj"),
}
