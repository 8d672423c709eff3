"""One method of `benchmark_inference.py`, in a process of its own, which may run in another virtual environment.

    python scripts/inference_subject.py METHOD DIRECTORY DEVICE THREADS

Loads the model, writes `{"weights_bytes": …}`, and then answers each line of stdin, `["prefill", tokens]` or
`["decode", batch]`, with `{"seconds": …, "peak_bytes": …}`: the time of one run, and the most resident memory (of the
GPU, on a GPU) so far. Times are of the process's CPU on a processor, which other work does not add to, and of the clock
on a GPU.
"""

import inspect
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch

CONTEXT = 32
VLLM_STEPS = 8  # a decode step of vLLM is the difference of two runs, divided by their difference in steps
METHODS = (
    "16 bit",
    "bitsandbytes",
    "bitsandbytes, threshold 0",
    "zeropoint",
    "absmax",
    "torchao",
    "vllm",
)


class Subject(Protocol):
    """A loaded model. Each function runs once and returns seconds."""

    weights_bytes: int

    def prefill(self, tokens: int) -> float: ...

    def decode(self, batch: int) -> float: ...


def token_ids(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocabulary - 1, (batch, length), generator=generator)


def timed(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def size_bytes(tensor: Any) -> int:
    """What a tensor takes, or the tensors that it is made of: torchao's have the dtype that they stand for."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nelement() * tensor.element_size())
    return sum(size_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


class TransformersModel:
    """A model of transformers. A decode step follows `CONTEXT` tokens, and the cache grows by it."""

    def __init__(self, model: Any, device: str) -> None:
        self._model, self._device = model.eval(), device
        self.weights_bytes = sum(map(size_bytes, (*model.parameters(), *model.buffers())))
        self._steps: dict[int, Callable[[], object]] = {}

    def prefill(self, tokens: int) -> float:
        ids = self._ids(1, tokens)
        with torch.inference_mode():
            return timed(lambda: self._model(ids, use_cache=False), self._device)

    def decode(self, batch: int) -> float:
        with torch.inference_mode():
            if batch not in self._steps:
                self._steps = {batch: self._step(batch)}
            return timed(self._steps[batch], self._device)

    def _step(self, batch: int) -> Callable[[], object]:
        ids = self._ids(batch, CONTEXT)
        cache = self._model(ids, use_cache=True).past_key_values
        name = "cache" if "cache" in inspect.signature(self._model.forward).parameters else "past_key_values"
        return lambda: self._model(ids[:, -1:], use_cache=True, **{name: cache})

    def _ids(self, batch: int, length: int) -> torch.Tensor:
        return token_ids(batch, length, self._model.config.vocab_size).to(self._model.device)


class VllmModel:
    """vLLM's engine in this process, from token ids to a token: its scheduler and sampler are part of what is timed."""

    def __init__(self, directory: str, device: str) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        self._vllm: Any = import_module("vllm")
        self._device = device
        self._llm = self._vllm.LLM(
            directory,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        )
        self._vocabulary = int(self._llm.llm_engine.model_config.get_vocab_size())
        self.weights_bytes = 0  # vLLM does not say; its peak has a cache of 1 GB

    def prefill(self, tokens: int) -> float:
        return self._generate(1, tokens, 1)

    def decode(self, batch: int) -> float:
        longer, shorter = (self._generate(batch, CONTEXT, 1 + steps) for steps in (VLLM_STEPS, 0))
        return (longer - shorter) / VLLM_STEPS

    def _generate(self, batch: int, length: int, new_tokens: int) -> float:
        prompts = [{"prompt_token_ids": ids} for ids in token_ids(batch, length, self._vocabulary).tolist()]
        options = self._vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        return timed(lambda: self._llm.generate(prompts, options, use_tqdm=False), self._device)


def load(method: str, directory: str, device: str) -> Subject:
    if method == "vllm":
        return VllmModel(directory, device)
    return TransformersModel(transformers_model(method, directory, device), device)


def transformers_model(method: str, directory: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if method in ("zeropoint", "absmax"):
        import int8cli

        inputs: Any = method
        return int8cli.load_model(directory, inputs=inputs, device=device)
    options: dict[str, Any] = {}
    if method == "bitsandbytes, threshold 0":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, device_map={"": device}, dtype="auto", **options)
    if method == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model.model, Int8DynamicActivationInt8WeightConfig())  # all linears but the head, as in the others
    return model


def peak_bytes(device: str) -> int:
    if device != "cpu":
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    method, directory, device, threads = sys.argv[1:5]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(int(threads))
    subject = load(method, directory, device)
    print(json.dumps({"weights_bytes": subject.weights_bytes}), file=answers)
    for line in sys.stdin:
        what, size = json.loads(line)
        seconds = subject.prefill(size) if what == "prefill" else subject.decode(size)
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(device)}), file=answers)


if __name__ == "__main__":
    main()
