"""What a tensor's name says about its module, in general and by model family.

Owns the vocabulary of module names, and the exceptions for single model types and model classes. Has only tables:
`plan` applies them, `reasons` names what they say. Facts about single versions of transformers are in
`transformers_versions`. scripts/survey_architectures.py compares both with an installed transformers; add what it
reports.
"""

import re
from dataclasses import dataclass

from int8cli.planning.reasons import (
    EMBEDDING,
    EXPERT,
    FUSED,
    HEAD,
    LAST,
    LINEAR,
    OTHER_HEAD,
    READ,
    ROUTER,
    SUBCLASS,
    TIED,
)


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules whose name contains `pattern`, and why they are left alone (or `LINEAR` if they are linear layers).

    `biasless` rules apply only to modules that have no bias in the checkpoint.
    """

    pattern: re.Pattern[str]
    reason: str
    biasless: bool = False


def _leaf(names: str, reason: str, *, biasless: bool = False) -> Rule:
    """A rule on the last components of a module name. `names` are regular expressions separated by spaces."""
    return Rule(re.compile(rf"(?:^|\.)(?:{'|'.join(names.split())})$"), reason, biasless)


def _under(names: str, reason: str) -> Rule:
    """A rule on any component of a module name: it covers everything inside the modules with these names."""
    return Rule(re.compile(rf"(?:^|\.)(?:{'|'.join(names.split())})(?:\.|$)"), reason)


def _top(names: str, reason: str, *, biasless: bool = False) -> Rule:
    """A rule on whole module names."""
    return Rule(re.compile(rf"^(?:{'|'.join(names.split())})$"), reason, biasless)


# Names of output heads, with or without a prefix.
HEAD_NAMES = (
    "lm_head",
    "lm_head.decoder",
    "lm_head.out_proj",
    "embed_out",
    "output_projection",
    "cls.predictions.decoder",
    "predictions.decoder",
    "generator_lm_head",
    "vocab_projector",
    "pred_layer.proj",
    "logits_dense",
    "ctc_head",
    "lm_loss",
    "lm_head.linear",
)
# Names of output heads only as the whole name: inside a block they are ordinary layers.
TOP_HEAD_NAMES = ("proj_out", "unembedding_projection", "decoder", "output")

_EMBEDDING_NAMES = r"""
    (?!\w*(?:proj|dense))\w*[Ee]mbed\w*   (?!\w*proj)\w*_emb   wte   wpe   shared   codebook   relative_attention_bias
"""

# What embeddings alone are called, in every class that was surveyed. Other names of `_EMBEDDING_NAMES` are those of
# linear layers here and there.
SURE_EMBEDDING = re.compile(
    r"""(?:^|\.)(?:
        wte | wpe | shared | embed_in | relative_attention_bias | rel_embeddings | rel_attn_embed | rel_pos_emb
      | \w*(?:token|tok|word|position|pos|type|segment|distance|speaker|language|entity|char|row|column)s?_\w*emb\w*
      | embed_(?:token|position)s\w* | (?:token|position)s_embed | embed_(?:text_|audio_)?tokens | embed_(?:char|global)
      | \w*(?:mask|point|class|label|cls|query|ngram|unit|pronunciation|shape|codec|freq|generation|value)_emb\w*
      | HashBucketCodepointEmbedder_\d | queries_embedder | (?:input|visual)_embed\w* | embed_timestep
      | num_speakers_embed | position_embeds_layer | encoder_hash_tok_embedding
    )$""",
    re.VERBOSE,
)
TOKEN_EMBEDDING = re.compile(r"(?:^|\.)(?:wte|shared|embed_in|\w*(?:tok|token|word)s?_\w*emb\w*|embed_tokens)(?:\.|$)")
# The fields of a config that say how many rows an output head has.
VOCABULARY_FIELD = re.compile(r"(?:(?!type)\w+_)?vocab(?:ulary)?_size")
# Output heads of published code, where a config does not say how large the vocabulary is: outside of numbered blocks.
HEAD_OUTSIDE_BLOCKS = re.compile(
    r"^(?:[A-Za-z_]+\.)*(?:output|output_layer|ff_out|output_head|lm_out|to_logits|vocab_head)$"
)

# Heads that trainers and speculative decoding add to a model: code that knows no int8 reads them from its file.
_HEADS_OF_OTHERS = "value_head critic_head reward_head medusa_head medusa_heads hydra_head"
# Outside of numbered blocks: each block of Funnel has a linear layer of this name in its attention.
_VALUE_HEAD = re.compile(r"^(?:[A-Za-z_]+\.)*v_head(?:\.|$)")

GENERAL_RULES: tuple[Rule, ...] = (
    _leaf(r"experts\.\d+\.\w+ experts\.\d+\.\w+\.\w+", EXPERT),
    _leaf(" ".join(re.escape(name) for name in HEAD_NAMES), HEAD),
    _top(" ".join(TOP_HEAD_NAMES), HEAD),
    _top("head", HEAD, biasless=True),
    _under(_HEADS_OF_OTHERS, OTHER_HEAD),
    Rule(_VALUE_HEAD, OTHER_HEAD),
    _leaf(r"gate router router\.gate router\.layer router\.classifier gate\.wg", ROUTER),
    _leaf(_EMBEDDING_NAMES, EMBEDDING, biasless=True),
    _top("score classifier text_projection", LAST, biasless=True),
)

# A matrix without a bias could be an embedding, so its name must be one that linear layers have.
LINEAR_NAME = re.compile(
    r"""(?:^|\.)(?:
        \w*proj(?:_\w+|\d*) | \w*projections? | \w*projector | proj\w*      # q_proj, kv_a_proj_with_mqa
      | \w*linear\w* | \w*dense\w* | fc\w* | ff\d | \w*_fc\d? | lin\w* | mlp\d?\.\d
      | [qkvogb]{1,4} | \w*to_\w+ | [qkv]_head
      | \w*(?:query|key|value|qkv)(?:_key_value|_global|_layer|_proj)?
      | w\d | w_(?:\d|out|in) | w[qkvoir]+(?:_\w+)? | W\w+                  # the names of research code
      | \w*out(?:put)?\w* | \w*gate\w* | \w*score | \w*classifier | \w*reduction | c_\w+
      | \w*_layer(?:_\d)? | \w+_mlp\.\d | \w*_coefs | receptance | patchifier | post | codec_head
    )(?:\.\d+)?$""",
    re.VERBOSE,
)

# Matrices of transformers' Conv1D, stored (in, out). The shape of the bias shows whether a module is one.
CONV1D_NAME = re.compile(r"(?:^|\.)(?:c_attn|q_attn|c_fc|c_proj)$")

_LINEAR_GATES = (_leaf(r"router\.gate router\.classifier router\.layer gateway\.gate gate\.wg", LINEAR),)
_LINEAR_PATCHES = (_leaf(r"patch_embedding", LINEAR),)
# Linear layers that do not run in int8, although transformers quantizes them on load: the model's own code computes
# with their weight, or casts their input to its dtype. scripts/survey_architectures.py finds them.
_READ_PATCHES = (_leaf(r"patch_embedding patch_embed\.proj", READ),)
_READ_REL_POS = (_leaf(r"rel_pos_bias rel_pos_[xy]_bias", READ),)
_READ_SPEECH_INPUT = (_leaf("input_linear", READ),)
_SHARED_BOXES = (_under(r"bbox_embed class_embed", TIED),)
_FUSED_QKV = (_leaf(r"attn\.w?_?qkv attn\.Wqkv mixer\.Wqkv", FUSED),)

# Exceptions by the model type of the config, or of any config inside it.
MODEL_TYPE_RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(
        ("afmoe", "hunyuan_v1_moe", "jetmoe", "longcat_flash", "nllb-moe", "switch_transformers"), _LINEAR_GATES
    ),
    **dict.fromkeys(("d_fine", "deimv2"), (*_LINEAR_GATES, *_SHARED_BOXES)),
    **dict.fromkeys(("deformable_detr", "grounding-dino", "mm-grounding-dino", "rt_detr_v2"), _SHARED_BOXES),
    **dict.fromkeys(("inkling2", "inkling2_vision"), _LINEAR_PATCHES),
    **dict.fromkeys(
        (
            *("cosmos3_edge", "cosmos3_edge_vision", "ernie4_5_vl_moe"),
            *("muse_glimmer", "muse_glimmer_vision", "muse_spark", "muse_spark_vision"),
        ),
        _READ_PATCHES,
    ),
    **dict.fromkeys(("layoutlmv2", "layoutlmv3", "pp_doclayout_v2"), _READ_REL_POS),
    **dict.fromkeys(("granite_speech5_ctc", "granite_speech5_encoder"), _READ_SPEECH_INPUT),
    **dict.fromkeys(
        (
            *("jina_embeddings_v3", "nemo_speechlm", "nomic_bert", "qianfan_ocr"),
            *("tipsv2", "tipsv2_dpt", "tipsv2_vision_model"),
        ),
        _FUSED_QKV,
    ),
    **dict.fromkeys(("molmo2", "molmo2_text"), (_leaf("ff_proj att_proj", FUSED),)),
    **dict.fromkeys(("nemotron_h_omni", "radio"), (*_FUSED_QKV, _leaf("embedder video_embedder", LINEAR))),
    **dict.fromkeys(
        ("falcon", "RefinedWeb", "RefinedWebModel"),
        (_leaf(r"self_attention\.(?:query_key_value|dense) mlp\.dense_(?:h_to_4h|4h_to_h)", SUBCLASS),),
    ),
    **dict.fromkeys(("zamba", "zamba2"), (_under("shared_transf shared_transformer", TIED),)),
    **dict.fromkeys(
        (
            *("data2vec-audio", "unispeech", "unispeech-sat", "wavlm"),
            *("wav2vec2", "wav2vec2-bert", "wav2vec2-conformer"),
        ),
        (_leaf(r"tdnn\.\d+\.kernel project_q", READ),),
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), (_leaf(r"altup\.(?:correction|prediction)_coefs", READ),)),
    "apertus1p5": (_leaf(r"quantize\.embedding", LINEAR),),
    "blip-2": (_top("text_projection vision_projection itm_head", READ),),
    "cohere_asr": (_leaf(r"log_softmax\.mlp\.layer0", HEAD),),
    "ctrl": (_leaf("w", EMBEDDING),),
    "dab-detr": (_under("bbox_predictor", TIED),),
    "deepseek_v4": (_leaf("wo_a", SUBCLASS),),
    "gradium_phonon_tts": (_leaf(r"self_attn\.in_proj", FUSED),),
    "graphormer": (_leaf("(?:in|out)_degree_encoder", EMBEDDING),),
    "gte": (_leaf("qkv_proj up_gate_proj", FUSED),),
    "hrm_text": (_leaf("gqkv_proj gate_up_proj", FUSED),),
    "ibert": (_leaf(r"layer\.\d+\.\S*\.(?:query|key|value|dense)", SUBCLASS),),
    "idefics": (_leaf(r"lm_head\.additional_fc", HEAD),),
    "kimi_k25": (_leaf("wqkv", FUSED),),
    "lara_mini": (_leaf(r"linear_attn\.in_proj", FUSED),),
    "mamba": (_leaf("dt_proj", READ),),
    "maskformer": (_leaf(r"pixel_level_module\.\S*\.(?:query|key|value|dense)", FUSED),),
    "minimax_m3_vl": (_leaf(r"shared_experts\.(?:gate|up)_proj", FUSED),),
    "mistral_large4": (_leaf(r"transformer\.layers\.\d+\.attention\.w[qk]", FUSED),),
    "pp_doclayout_v3": (_under("enc_bbox_head enc_score_head", TIED),),
    "reformer": (_leaf(r"self_attention\.(?:query_key|value)", READ),),
    "rf_detr": (_leaf(r"decoder\.layers\.\d+\.self_attn\.out_proj", LINEAR),),
    "sapiens2": (_leaf("w12", FUSED),),
    "sarvam_moe": (_leaf(r"attention\.query_key_value", FUSED),),
    "step3p7": (_leaf(r"transformer\.resblocks\.\d+\.attn\.out_proj", LINEAR),),
    "tipsv2_text_model": (_leaf("out_proj", LINEAR),),
    "videomae": (_leaf(r"attention\.attention\.(?:query|key|value)", READ),),  # before transformers 5.24
    "unlimited_ocr": (_leaf(r"transformer\.layers\.\d+\.self_attn\.qkv_proj projector\.layers", FUSED),),
}

# Exceptions by the class named in config.json's "architectures", as a regular expression. Most name the last layer of
# that class, if it has no bias: the loader leaves the module of the last parameter alone.
ARCHITECTURE_RULES: tuple[tuple[str, tuple[Rule, ...]], ...] = (
    (r"\w+ForCTC", (_top("lm_head", LINEAR),)),
    (r"\w+VisionModelWithProjection", (_top("visual_projection", LAST),)),
    ("BarkModel", (_leaf("lm_head", LINEAR),)),
    (r"\w+ForRNNT", (_leaf(r"joint\.head", LINEAR),)),
    ("FlavaForPreTraining", (_leaf("decoder", LINEAR),)),
    ("ClvpModelForConditionalGeneration", (_leaf("lm_head", LINEAR), _leaf(r"speech_encoder_model\.projection", LAST))),
    ("EmbeddingGemma2(?:Text)?Model", (_leaf("embedding_projection", LAST),)),
    ("GradiumPhononTTSModel", (_top("duration_delta_proj", LAST),)),
    ("GraniteSpeech5ForCTC", (_leaf(r"encoder\.out", TIED),)),
    ("Inkling2(?:Vision)?Model", (_leaf(r"merger\.linear_2", LAST),)),
    ("LayoutLMv3Model", (_leaf("rel_pos_y_bias", LAST),)),
    ("MuseGlimmerModel", (_top("vision_projection", LAST),)),
    ("NemotronH_Omni_Reasoning_V3", (_leaf("lm_head", LINEAR), _leaf(r"mlp1\.3", LAST))),
    ("NeoMMEForMaskedLM", (_leaf(r"embed_tokens\.embedding_projection", TIED),)),
    ("PeAudioModel", (_leaf(r"audio_head\.proj text_audio_head\.proj", LAST),)),
    ("PocketTTSModel", (_top("audio_latent_proj", LAST),)),
    (r"Qwen2_5Omni\w*", (_leaf(r"thinker\.lm_head", LINEAR),)),
    ("Qwen3ASREncoder", (_top("conv_out", LAST),)),
    ("Sam3LiteTextTextModel", (_top("projection", LAST),)),
    (r"SplinterFor\w+", (_leaf(r"splinter_qass\.end_classifier", LAST),)),
    ("Step3p7Model", (_top("multi_modal_projector", LAST),)),
    ("TimesFm2_5ModelForPrediction", (_leaf(r"output_projection_quantiles\.residual_layer", LAST),)),
    ("Voxtral(?:Realtime)?Model", (_leaf(r"multi_modal_projector\.linear_2", LAST),)),
    ("XCLIPModel", (_top("text_projection", LINEAR),)),
)
