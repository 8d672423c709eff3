"""A process that has vLLM: opens one model for each line of standard input, answers with one line on standard output.

    {"model": DIRECTORY, "sequences": [[1, 2, …], …], "dtype": "float32", "every_token": true, "experts": FILE or null,
     "picture": FILE or null}
    {"logprobs": [[…], …], "layers": {NAME: CLASS}, "ids": [[1, 2, …], …]} or {"error": TEXT}

Without sequences, the model is loaded and does not run. With a picture, the sequences are texts, each with a mark for
it; `ids` are the tokens that come of them.

The model is vLLM's own, loaded by its own loader. Some parts of its CPU build are replaced, so that every machine
computes the same, and every architecture can run:

- Int8 experts need AMX there, one activation and sizes of 32. Here torch computes them from the parameters that vLLM
  has registered and loaded (`ReferenceExperts`).
- Int8 linears on AMX take inputs of three dimensions only (`_apply_weights_sgl` of
  kernels/linear/scaled_mm/cpu.py), which gpt_neox, olmo2, starcoder2, phi and others do not have. Here all go through
  oneDNN.
- Packed weights with 16-bit inputs run there with 4 bits only (kernels/linear/mixed_precision/cpu.py). Here torch
  unpacks them (`ReferenceWeightsOnly`).
- Multi-head latent attention wants the weight of `kv_b_proj` back, which oneDNN has packed (`whole_weight`).
"""

import gc
import json
import os
import sys
import traceback
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for work leave the cores to others
    "HF_HUB_OFFLINE": "1",
}
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM and its libraries write to standard output

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm import LLM, SamplingParams, TextPrompt, TokensPrompt  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel  # noqa: E402
from vllm.model_executor.kernels.linear.scaled_mm import cpu as linear_kernels  # noqa: E402
from vllm.model_executor.layers.attention import mla_attention  # noqa: E402
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E402
    compressed_tensors_moe_w8a8_int8 as int8_experts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (  # noqa: E402
    compressed_tensors_wNa16 as weights_only,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (  # noqa: E402
    get_and_maybe_dequant_weights as dequantized,
)
from vllm.model_executor.models import registry  # noqa: E402

PICTURE_TOKENS = 256
WITH_PICTURES = {"limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0}, "mm_processor_cache_gb": 0}


class ReferenceExperts:
    """What replaces methods of `CompressedTensorsW8A8Int8MoEMethod`: int8 experts in float32, by their definition."""

    @staticmethod
    def process_weights_after_loading(method: Any, layer: Any) -> None:
        """The parameters stay as they were loaded."""

    @staticmethod
    def apply(method: Any, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """(tokens, hidden) → (tokens, hidden); topk_weights and topk_ids are (tokens, k)."""
        result = torch.zeros(x.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            tokens, choice = (topk_ids == expert).nonzero(as_tuple=True)
            weights = topk_weights[tokens, choice, None].float()
            rows = x[tokens].float()
            if layer.apply_router_weight_on_input:
                rows = (rows * weights).to(x.dtype).float()
            output = _linear(layer, "w2", expert, _gated(layer, _linear(layer, "w13", expert, rows)))
            result.index_add_(0, tokens, output if layer.apply_router_weight_on_input else output * weights)
        return result.to(x.dtype)


def _linear(layer: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(layer, f"{name}_weight")[expert].float() * getattr(layer, f"{name}_weight_scale")[expert]
    steps = rows.abs().amax(dim=-1, keepdim=True) / 127
    steps = steps.where(steps > 0, 1.0)
    return (rows / steps).round() * steps @ weight.t()


def _gated(layer: Any, both: Tensor) -> Tensor:
    activation = str(getattr(layer.activation, "value", layer.activation))
    gate, up = both.chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "gelu":
        return torch.nn.functional.gelu(gate) * up
    raise ValueError(f"experts with the activation {activation}")


class ReferenceWeightsOnly(MPLinearKernel):
    """Products with packed 8-bit weights: four in an int32, the lowest byte first, 128 added to each."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return c.weight_type.size_bits == 8, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """The parameters stay as they were loaded: int32 (out, in / 4), scales (out, 1)."""

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed, scale, _ = self._get_weight_params(layer)
        values = packed.contiguous().view(torch.uint8).to(torch.float32) - 128
        return torch.nn.functional.linear(x, (values * scale).to(x.dtype), bias)


def whole_weight(layer: Any, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(out, in) of any linear layer; of one that oneDNN has packed, by what it makes of the unit matrix."""
    if layer.weight is not None:
        return dequantized(layer, out_dtype=out_dtype)
    unit = torch.eye(layer.input_size_per_partition, dtype=out_dtype)
    return layer.quant_method.apply(layer, unit, bias=None).to(out_dtype).t()


def look_at_classes_here() -> None:
    """vLLM asks a process of its own, which imports vLLM, about each class that it has not met: 13 seconds."""
    registry._run_in_subprocess = lambda look: look()


def replace_kernels() -> None:
    linear_kernels.check_cpu_sgl_kernel = lambda *_: False
    int8_experts.select_int8_moe_backend = lambda **_: (Int8MoeBackend.CPU, CPUExpertsInt8)
    weights_only.choose_mp_linear_kernel = lambda _: ReferenceWeightsOnly
    mla_attention.get_and_maybe_dequant_weights = whole_weight
    method = int8_experts.CompressedTensorsW8A8Int8MoEMethod
    method.process_weights_after_loading = lambda *all_: ReferenceExperts.process_weights_after_loading(*all_)
    method.apply = lambda *all_, **named: ReferenceExperts.apply(*all_, **named)


def collect_only_models() -> None:
    """What is imported is never garbage, and vLLM asks nine times for each model that it be looked through."""
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    sequences = asked["sequences"]
    picture = Image.open(asked["picture"]) if asked["picture"] else None
    longest = max(map(len, sequences), default=64) + (PICTURE_TOKENS if picture else 0)
    llm = LLM(
        model=asked["model"],
        skip_tokenizer_init=picture is None,  # the processor of pictures needs it
        enforce_eager=True,
        dtype=asked["dtype"],
        max_model_len=longest + 1,
        max_num_seqs=len(sequences) if sequences and longest < 100 else 1,
        kv_cache_memory_bytes=1 << 26,
        max_logprobs=-1,
        enable_prefix_caching=False,
        seed=0,
        **WITH_PICTURES if picture else {},
    )
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    layers = dict(_layers(model))
    if asked["experts"]:
        save_file(_experts(model), asked["experts"])
    every = asked["every_token"]
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1 if every else 0, temperature=0, detokenize=False)
    outputs = llm.generate([_prompt(each, picture) for each in sequences], sampling, use_tqdm=False)
    rows = []
    for output in outputs:
        for token, found in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            tokens = range(len(found)) if every else (token,)
            rows.append([found[each].logprob for each in tokens])
    return {"logprobs": rows, "layers": layers, "ids": [output.prompt_token_ids for output in outputs]}


def _prompt(sequence: Any, picture: Image.Image | None) -> Any:
    if picture is None:
        return TokensPrompt(prompt_token_ids=sequence)
    return TextPrompt(prompt=sequence, multi_modal_data={"image": picture})


def _layers(model: torch.nn.Module) -> Any:
    """Each layer that vLLM may quantize, and the class that computes it."""
    for name, module in model.named_modules():
        scheme = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
        if scheme is not None:
            yield name, type(scheme).__name__


def _experts(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2].removesuffix("_scale") in ("w13_weight", "w2_weight")
    }


def main() -> None:
    replace_kernels()
    look_at_classes_here()
    collect_only_models()
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # vLLM raises what it likes; the test that asked shows it
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
        print(json.dumps(found), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
