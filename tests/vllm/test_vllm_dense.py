"""Dense models: vLLM loads them, computes every linear layer in int8, and answers what torch computes."""

from pathlib import Path

import pytest
from support.checkpoints import Tiny, is_known
from support.in_vllm import (
    HEADS,
    LLAMA,
    LOST,
    OWN_HEADS,
    SAME,
    SEQUENCES,
    VOCABULARY,
    Vllm,
    converted,
    in_torch,
    relative_error,
    saved,
)

from int8cli.commands.options import InputsName

# vLLM's ALiBi rounds elsewhere than transformers': floats too differ by 1e-4, which the rounding to int8 magnifies.
ALIBI = 0.01
FLOAT = "UnquantizedLinearMethod"
SCHEMES: dict[InputsName, str] = {
    "absmax": "CompressedTensorsW8A8Int8",
    "zeropoint": "CompressedTensorsW8A8Int8",
    "none": "CompressedTensorsWNA16",
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 2, "n_head": 4}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 128, "state_size": 16, "num_hidden_layers": 2}
_EXAONE = {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]}
ARCHITECTURES = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-biased": Tiny("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": Tiny("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", HEADS),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "gemma": Tiny("GemmaForCausalLM", "GemmaConfig", HEADS),
    "gemma2": Tiny("Gemma2ForCausalLM", "Gemma2Config", HEADS),
    "gemma3": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "opt": Tiny("OPTForCausalLM", "OPTConfig", _OPT),
    "bloom": Tiny("BloomForCausalLM", "BloomConfig", _BLOOM),
    "gpt_neox": Tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", OWN_HEADS),
    "gptj": Tiny("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 16}),
    "gpt_bigcode": Tiny("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "olmo2": Tiny("Olmo2ForCausalLM", "Olmo2Config", LLAMA),
    "starcoder2": Tiny("Starcoder2ForCausalLM", "Starcoder2Config", LLAMA),
    "phi": Tiny("PhiForCausalLM", "PhiConfig", {**LLAMA, "num_key_value_heads": 4}),
    "granite": Tiny("GraniteForCausalLM", "GraniteConfig", LLAMA),
    "cohere": Tiny("CohereForCausalLM", "CohereConfig", LLAMA),
    "stablelm": Tiny("StableLmForCausalLM", "StableLmConfig", LLAMA),
    "glm4": Tiny("Glm4ForCausalLM", "Glm4Config", HEADS),
    "nemotron": Tiny("NemotronForCausalLM", "NemotronConfig", HEADS),
    "smollm3": Tiny("SmolLM3ForCausalLM", "SmolLM3Config", LLAMA),
    "exaone4": Tiny("Exaone4ForCausalLM", "Exaone4Config", {**HEADS, **_EXAONE}),
    "mamba2": Tiny("Mamba2ForCausalLM", "Mamba2Config", {**_MAMBA, "num_heads": 8, "head_dim": 32, "n_groups": 1}),
    "ernie4_5": Tiny("Ernie4_5ForCausalLM", "Ernie4_5Config", HEADS),
}


# Of these, vLLM has all layers in floats only.
FIRST_MAMBAS = {
    "mamba": Tiny("MambaForCausalLM", "MambaConfig", _MAMBA),
    "falcon_mamba": Tiny("FalconMambaForCausalLM", "FalconMambaConfig", _MAMBA),
}
# Where the inputs are also quantized with a zero point, or not at all: with biases, without, and fused in the file.
WITH_OTHER_INPUTS = ("llama", "llama-biased", "opt", "gpt_neox", "phi3", "qwen3")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllm_computes_every_linear_layer_in_int8(architecture: str, vllm: Vllm, tmp_path: Path) -> None:
    tiny = ARCHITECTURES[architecture]
    if not is_known(tiny):
        pytest.skip(f"this transformers has no {tiny.model}")
    source = saved(tiny, tmp_path / "source")
    floats = vllm.open(source, SEQUENCES)
    linears = {name for name, kind in floats.layers.items() if kind == FLOAT and not name.endswith(".conv1d")}
    assert linears
    for inputs, scheme in SCHEMES.items():
        if inputs != "absmax" and architecture not in WITH_OTHER_INPUTS:
            continue
        output = converted(source, tmp_path / inputs, inputs)
        found = vllm.open(output, SEQUENCES)
        assert linears == {name for name, kind in found.layers.items() if kind == scheme}
        error = relative_error(found.logprobs, in_torch(output, inputs))
        lost = relative_error(found.logprobs, floats.logprobs)
        print(f"{architecture}, {inputs}: {error} from torch, {lost} from floats")
        assert error.median < (ALIBI if architecture == "bloom" else SAME)
        assert lost.median < LOST


@pytest.mark.parametrize("architecture", FIRST_MAMBAS)
def test_vllm_opens_no_int8_of_mambas_first_version(architecture: str, vllm: Vllm, tmp_path: Path) -> None:
    """As `convert` warns. Once this fails, the warning can go."""
    source = saved(FIRST_MAMBAS[architecture], tmp_path / "source")
    output = converted(source, tmp_path / "int8")
    assert vllm.open(source, ()).layers
    with pytest.raises(RuntimeError, match="object has no attribute 'data'"):
        vllm.open(output, ())
