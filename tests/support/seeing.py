"""Tiny models that see, with processors, and a picture. Needs torchvision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.checkpoints import Tiny
from support.in_vllm import HEADS, LLAMA, saved
from support.processors import (
    GRID,
    IMAGE,
    PATCH,
    SIZE,
    VOCABULARY,
    gemma3,
    idefics3,
    internvl,
    llava,
    llava_next,
    mistral3,
    paligemma,
    qwen,
)

_LLAMA = {**LLAMA, "vocab_size": VOCABULARY, "max_position_embeddings": 1024}
_HEADS = {**HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 1024}
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_CLIP = {**_TOWER, "model_type": "clip_vision_model"}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
_QWEN_TOWER = {
    "depth": 2,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
_QWEN3_MROPE = {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_interleaved": True}}
_QWEN_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}
_QWEN3_TOWER = {
    **_QWEN_TOWER,
    "hidden_size": 64,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_QWEN3_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}


@dataclass(frozen=True)
class Seeing:
    """A tiny model, how its processor is made, and what stands for a picture in a prompt.

    `alike`: in floats, vLLM's CPU build answers as transformers does. `dtype` is what it computes in.
    """

    tiny: Tiny
    processor: Callable[[], Any]
    picture: str
    alike: bool
    dtype: str


def picture() -> Image.Image:
    """Colours that change along both sides, 48 by 40."""
    image = Image.new("RGB", (48, 40))
    image.putdata([(5 * x, 6 * y, 3 * (x + y)) for y in range(40) for x in range(48)])
    return image


def save_seeing(seeing: Seeing, directory: Path) -> Path:
    """The model in float32, with its processor."""
    saved(seeing.tiny, directory)
    seeing.processor().save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = dict(as_published(name, tensor, seeing.tiny) for name, tensor in load_file(file).items())
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def as_published(name: str, tensor: Tensor, tiny: Tiny) -> tuple[str, Tensor]:
    """A tensor as the checkpoints on the Hub have it. vLLM 0.32 does not read what transformers 5 makes of these."""
    if tiny.arguments["vision_config"] in (_CLIP, _SIGLIP):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if tiny.model == "Qwen3VLMoeForConditionalGeneration" and tensor.dim() == 3 and ".experts." in name:
        tensor = tensor.transpose(1, 2).contiguous()
    return name, tensor


_QWEN2 = partial(qwen, "Qwen2VLProcessor", "Qwen2VLVideoProcessor")
_QWEN3 = partial(qwen, "Qwen3VLProcessor", "Qwen3VLVideoProcessor")


def _seeing(
    model: str,
    config: str,
    processor: Callable[[], Any],
    in_prompt: str,
    *,
    alike: bool = True,
    dtype: str = "float32",
    **arguments: Any,
) -> Seeing:
    return Seeing(Tiny(model, config, arguments), processor, in_prompt, alike, dtype)


def _qwen_seeing(model: str, config: str, processor: Callable[[], Any], **arguments: Any) -> Seeing:
    return _seeing(model, config, processor, "<|vision_start|><|image_pad|><|vision_end|>", **_QWEN_IDS, **arguments)


SEEING: Mapping[str, Seeing] = {
    "llava": _seeing(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        llava,
        "<image>",
        text_config={**_LLAMA, "model_type": "llama"},
        vision_config=_CLIP,
        image_token_index=IMAGE,
    ),
    "llava_next": _seeing(
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        llava_next,
        "<image>",
        text_config={**_LLAMA, "model_type": "llama"},
        vision_config=_CLIP,
        image_grid_pinpoints=GRID,
        image_token_index=IMAGE,
    ),
    "paligemma": _seeing(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        paligemma,
        "",
        alike=False,  # every token of the prompt sees all others in transformers, and those before it in vLLM
        text_config={**_HEADS, "model_type": "gemma", "vocab_size": 1600},  # its processor adds 1,152 tokens
        vision_config=_SIGLIP,
        image_token_index=IMAGE,
        projection_dim=128,
    ),
    "gemma3": _seeing(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        gemma3,
        "<boi>",
        alike=False,  # likewise the tokens of a picture
        text_config={**_HEADS, "model_type": "gemma3_text"},
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
    ),
    "idefics3": _seeing(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        idefics3,
        "<image>",
        text_config={**_LLAMA, "model_type": "llama"},
        vision_config=_TOWER,
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=0,
    ),
    "mistral3": _seeing(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        mistral3,
        "[IMG]",
        text_config={**_HEADS, "model_type": "mistral"},
        vision_config={**_TOWER, "model_type": "pixtral", "head_dim": 32, "image_size": 2 * SIZE},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    "internvl": _seeing(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        internvl,
        "<IMG_CONTEXT>",
        text_config={**_LLAMA, "model_type": "qwen2"},
        vision_config={**_TOWER, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]},
        image_token_id=IMAGE,
        image_seq_length=4,
    ),
    "qwen2_vl": _qwen_seeing(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        _QWEN2,
        text_config={**_LLAMA, **_MROPE},
        vision_config={**_QWEN_TOWER, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": _qwen_seeing(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        partial(qwen, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
        text_config={**_LLAMA, **_MROPE},
        vision_config={
            **_QWEN_TOWER,
            "hidden_size": 64,
            "out_hidden_size": 128,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": _qwen_seeing(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        _QWEN3,
        text_config={**_HEADS, **_QWEN3_MROPE},
        vision_config=_QWEN3_TOWER,
    ),
    "qwen3_vl_moe": _qwen_seeing(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        _QWEN3,
        text_config={**_HEADS, **_QWEN3_MROPE, **_QWEN3_EXPERTS},
        vision_config=_QWEN3_TOWER,
    ),
    "qwen3_5_moe": _qwen_seeing(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        _QWEN3,
        alike=False,
        dtype="bfloat16",  # vLLM's CPU build has linear attention in no other
        text_config={
            **_HEADS,
            **_QWEN3_EXPERTS,
            "rope_parameters": {
                **_QWEN3_MROPE["rope_parameters"],
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.25,
            },
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": ["linear_attention", "full_attention"],
        },
        vision_config={key: value for key, value in _QWEN3_TOWER.items() if key != "deepstack_visual_indexes"},
    ),
}
