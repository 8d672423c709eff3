"""Processors of models that see, with small pictures and a tokenizer of bytes. Needs torchvision."""

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 384
IMAGE = 3 + 256  # the token that stands for a part of a picture: the first after all bytes
SIZE, PATCH = 32, 8
GRID = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_SQUARE = {"height": SIZE, "width": SIZE}


def _tokenizer(*image_tokens: str, **named: str) -> Any:
    """Three marks, then every byte, then what stands for pictures: `named` tokens are attributes too."""
    vocabulary = ("<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=named or None,
    )
    made.add_special_tokens({"additional_special_tokens": [*image_tokens]})
    made.add_tokens(["\n", "\n\n", "\n\n\n", "\n\n\n\n"])  # vLLM looks for them in the vocabulary of a Gemma
    return made


# Of LLaVA's processors: CLIP's tower, whose first token is left out.
_AS_LLAVA: Any = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def llava() -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=_SQUARE)
    return transformers.LlavaProcessor(images, _tokenizer("<image>"), **_AS_LLAVA)


def llava_next() -> Any:
    size: Any = {"size": {"shortest_edge": SIZE}, "crop_size": _SQUARE, "image_grid_pinpoints": GRID}
    images = transformers.LlavaNextImageProcessor(**size)
    return transformers.LlavaNextProcessor(images, _tokenizer("<image>"), **_AS_LLAVA)


def paligemma() -> Any:
    images: Any = transformers.SiglipImageProcessor(size=_SQUARE)
    images.image_seq_length = (SIZE // PATCH) ** 2
    return transformers.PaliGemmaProcessor(images, _tokenizer(image_token="<image>"))


def gemma3() -> Any:
    marks = _tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    return transformers.Gemma3Processor(transformers.Gemma3ImageProcessor(size=_SQUARE), marks, image_seq_length=4)


def idefics3() -> Any:
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE})
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = _tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows)
    return transformers.Idefics3Processor(images, marks, image_seq_len=4)


def mistral3() -> Any:
    images = transformers.PixtralImageProcessor(
        size={"longest_edge": 2 * SIZE}, patch_size={"height": PATCH, "width": PATCH}
    )
    marks = _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return transformers.PixtralProcessor(images, marks, patch_size=PATCH, spatial_merge_size=2)


def internvl() -> Any:
    marks = _tokenizer(
        context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
    )
    images = transformers.GotOcr2ImageProcessor(size=_SQUARE, max_patches=2)
    return transformers.InternVLProcessor(images, marks, transformers.InternVLVideoProcessor(), image_seq_length=4)


def qwen(processor: str, video_processor: str) -> Any:
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": 1024, "longest_edge": 4096},
        "patch_size": PATCH,
        "merge_size": 2,
    }
    images = transformers.Qwen2VLImageProcessor(**sizes)
    videos = getattr(transformers, video_processor)(**sizes)
    return getattr(transformers, processor)(images, _tokenizer(*QWEN_TOKENS), videos)
