"""The ways to choose stored columns in a conversion, with the time, memory and disk of each, before any weight is read.

Owns how much work a way is, and how measured rates become time. No torch. Downloads are counted in bytes, not in
time, because the speed of the network is not known.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from int8cli.estimate.units import units_of
from int8cli.llm_int8.limits import EXACT_STEPS, FINE_STEPS, Steps
from int8cli.machine.speed import Speed
from int8cli.model.sampling import Sampling
from int8cli.planning.survey import Survey
from int8cli.records.conversion import FROM_ACTIVATIONS

# Peak memory of a process beside buffers and blocks, with torch, and with transformers too. Measured: SmolLM2-135M took
# 274 MB without running it and 549 MB with; two layers of Llama-7B's shapes, 405 MB each, took 924 MB.
TORCH_BYTES = 260_000_000
TRANSFORMERS_BYTES = 520_000_000
# What Ray and its threads add to a process of a cluster. Measured in Ray 2.60, beside buffers: 302 MB to convert one
# shard or sixteen, 316 MB with a scan of the weights before; a run of the model 526 MB, smoothing in fine steps 559 MB.
RAY_BYTES = 65_000_000
# Measured in CPU time on SmolLM2-135M and on two layers of Llama-7B's shapes, 128 to 4,096 tokens: beside its product,
# each value that goes into a linear layer or comes out of it takes as long as quantizing 11 weights (statistics, norms,
# activation functions, attention), and each weight as long as quantizing 45 (its errors by column, and its layer
# run twice in int8 on 128 positions).
VALUE_WORK = 11.0
WEIGHT_WORK = 45.0
# To smooth, likewise in CPU time on weights of 576 x 576 to 2048 x 2048: the products of two choices on 128 positions
# take each weight as long as quantizing 16 to 25, the range of its exponents 34 to 53, its figures after that 28 to 37,
# and the descent of the exponents about 160; beside that, each input column takes as long as 320,000 weights, which is
# most of it in narrow models. And a block runs one sequence again for each of its folds, and once before.
SMOOTHING_WORK = 100.0
DESCENT_WORK = 160.0
DESCENT_COLUMN_WORK = 320_000.0
# By factors of 2 and then in quarter steps, the descent took 3.3 times as long on three blocks of SmolLM2-135M.
DESCENT_TIMES: Mapping[Steps, float] = {EXACT_STEPS: 1.0, FINE_STEPS: 3.3}
PROOF_RUNS = 5
# Reading, writing and flushing, beside the arithmetic: bytes of the source a second. 3.25 GB took 4 s.
DISK_BYTES_A_SECOND = 0.9e9
# Floats written from int8: SmolLM2-135M's 269 MB took 1.0 s of CPU time beside the import of torch, on one core.
_RESTORED_BYTES_A_SECOND = 0.27e9
_START_S = 3.0  # Python, torch, transformers


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to be estimated: its mode, the survey with the columns that it stores, and the disk that it needs."""

    mode: str
    survey: Survey
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Way:
    """One way. `tokens` is 0 where the model is not run; `seconds` None where the speed of the machine is not known.

    `memory_bytes` is the peak of the process, `disk_bytes` that of the output and the shards in flight.
    """

    outliers: str
    tokens: int
    seconds: float | None
    memory_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def way_of(candidate: Candidate, speed: Speed | None, sampling: Sampling, *, threads: int) -> Way:
    """`threads` are those of all workers together."""
    survey, runs = candidate.survey, candidate.mode == FROM_ACTIVATIONS
    seconds = None
    if speed is not None:
        seconds = conversion_s(survey.source_bytes, speed) + (calibration_s(survey, speed, sampling) if runs else 0.0)
    buffers = survey.buffer_bytes(threads)
    memory = (memory_to_run(survey, sampling) if runs else TORCH_BYTES) + buffers
    return Way(candidate.mode, sampling.tokens if runs else 0, seconds, memory, candidate.disk_bytes)


def conversion_s(source_bytes: int, speed: Speed, disk_bytes_a_second: float = DISK_BYTES_A_SECOND) -> float:
    """Seconds to read, quantize and write a source, with the start of the program."""
    return _START_S + source_bytes / speed.quantized_bytes + source_bytes / disk_bytes_a_second


def reading_s(size_bytes: int) -> float:
    """Seconds to read files once, from a disk."""
    return size_bytes / DISK_BYTES_A_SECOND


def restoring_s(size_bytes: int) -> float:
    """Seconds to write so many bytes of floats from int8."""
    return size_bytes / _RESTORED_BYTES_A_SECOND


def calibration_s(survey: Survey, speed: Speed, sampling: Sampling) -> float:
    """Seconds for one forward of all tokens, the statistics of each value, and the figures of each weight."""
    quantizing_s = 2.0 / speed.quantized_bytes  # one 16-bit weight
    seconds = 0.0
    for decision in survey.plan.quantized:
        rows, columns = decision.spec.shape
        weights = decision.spec.numel
        seconds += 2.0 * weights * sampling.tokens / speed.product(decision.spec.dtype)
        seconds += (rows + columns) * sampling.tokens * VALUE_WORK * quantizing_s
        seconds += weights * WEIGHT_WORK * quantizing_s
    return seconds + (smoothing_s(survey, speed, sampling, survey.smooth) if survey.smooth else 0.0)


def smoothing_s(survey: Survey, speed: Speed, sampling: Sampling, steps: Steps) -> float:
    """Seconds to find and prove the smoothing of every layer: what is computed of each weight, and runs of a block.

    `steps` of an exponent are a factor of 2.
    """
    quantizing_s, tokens = 2.0 / speed.quantized_bytes, min(sampling.sequence_length, sampling.tokens)
    seconds = 0.0
    for decision in survey.plan.quantized:
        weights, columns = decision.spec.numel, decision.computed_shape[1]
        descent = (weights * DESCENT_WORK + columns * DESCENT_COLUMN_WORK) * DESCENT_TIMES[steps]
        seconds += (weights * SMOOTHING_WORK + descent) * quantizing_s
        seconds += PROOF_RUNS * 2.0 * weights * tokens / speed.product(decision.spec.dtype)
    return seconds


def forwards_s(survey: Survey, speed: Speed, tokens: int, passes: int) -> float:
    """Seconds for all tokens to pass every linear layer `passes` times, with fewer statistics of each value."""
    seconds = 0.0
    for decision in survey.plan.quantized:
        rows, columns = decision.spec.shape
        product_s = 2.0 * decision.spec.numel * tokens / speed.product(decision.spec.dtype)
        seconds += product_s + (rows + columns) * tokens * VALUE_WORK / speed.quantized_bytes
    return passes * seconds


def memory_to_run(survey: Survey, sampling: Sampling) -> int:
    """The peak of a process that runs the model: a block's weights, and what one sequence takes in it."""
    blocks = [unit.decisions for unit in units_of(survey.plan.decisions) if unit.is_block]
    largest = max((sum(each.spec.nbytes for each in block) for block in blocks), default=0)
    widest = max((max(each.spec.shape) for block in blocks for each in block if each.spec.shape), default=0)
    whole_files = max((contents.file_bytes for contents in survey.shards if not contents.mappable), default=0)
    return TRANSFORMERS_BYTES + largest + 16 * widest * min(sampling.sequence_length, sampling.tokens) + whole_files
