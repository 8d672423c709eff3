"""Weights that transformers computes from others as it opens a model in compressed-tensors, and where that fails.

Owns which models its quantizer for this format fails with (5.24: quantizers/base.py, `update_weight_conversions`). For
each rule that computes weights from weights, it collects their scales as well, and drops a float that has none. With
transformers 5.24, 36 classes of 18 model types were built without weights, and failed. A test compares the tables with
the rules of the installed transformers.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# Model types of classes with a rule that splits a weight. With scales it has many sources and many targets, which
# transformers refuses as it builds the rule, whether or not the checkpoint has such a weight.
SPLITS = frozenset(
    {
        "dinov2",
        "dinov2_with_registers",
        "ernie4_5_vl_moe",
        "gradium_phonon_tts",
        "hrm_text",
        "inkling_mm_model",
        "molmo2_text",
        "nemo_speechlm",
        "qianfan_ocr",
        "sapiens2",
        "tipsv2_vision_model",
        "unlimited_ocr_vision_encoder",
    }
)
# Model types of classes with a rule that cuts the rows of padding off their output head, which stays a float.
CUT_HEADS = frozenset({"inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text"})
_HEAD = "lm_head.weight"
# Floats that a rule merges into one: the convolutions of OLMo Hybrid, Kimi Linear and others, embeddings in pieces, and
# the fused experts of Step 3.7.
MERGED = re.compile(r"(?:^|\.)(?:[qkv]_conv1d|ngram_embedding\.shard_\d+|moe\.(?:gate|up)_proj)\.weight$")


def fails_on_load(float_names: Collection[str], config: Mapping[str, Any]) -> str | None:
    """What transformers fails with in compressed-tensors, to stand after "such as"; None if it opens the model.

    `float_names` are the tensors that stay floats.
    """
    model_types = frozenset(_model_types(config))
    cuts_head = not CUT_HEADS.isdisjoint(model_types)
    for name in float_names:
        if MERGED.search(name) or (cuts_head and name.endswith(_HEAD)):
            return name
    splits = min(SPLITS & model_types, default=None)
    return None if splits is None else f"those of {splits}"


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The model types of a config and of those inside it."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _model_types(value)
