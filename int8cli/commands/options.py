"""The options of each command, with the defaults of the command line. Needs only the standard library.

A field has the name of the command-line option, with _ for -.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LayoutName = Literal["bitsandbytes", "compressed-tensors"]
DeviceName = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert.

    - `revision`: branch, tag or commit of a model on the Hub; None is its main branch.
    - `layout`: which loaders can open the output.
    - `threshold`: llm_int8_threshold for the loader: inputs of this magnitude or more are multiplied in 16 bit.
    - `skip`, `only`: globs on module names. Modules that match `skip`, or do not match `only`, are not quantized.
    - `float32`: quantize float32 weights directly, or from float16 as bitsandbytes does.
    - `on_nonfinite`: a weight with NaN or an infinity stops the conversion, or stays in its source dtype.
    - `outliers`: how the columns to store exactly are chosen: "auto", "activations", "weights", "none", or the path of
      a statistics file of `inspect_outliers`.
    - `outlier_columns`: the most columns to store for each linear layer; None is the measured optimum, 8.
    - `text`: UTF-8 text to run the model on, None is the built-in sample. `tokens` is the total, in sequences of
      `sequence_length`; `seed` selects the pieces of a long text.
    - `workers`: processes, each converts one shard at a time; None chooses from cores and shards. `threads`: per
      process; None divides the cores.
    - `device`: where to quantize.
    - `figures`: measure the error of every layer.
    - `keep_source`: keep downloaded shards in the Hub cache.
    - `overwrite`: replace an earlier conversion.
    """

    revision: str | None = None
    layout: LayoutName = "bitsandbytes"
    threshold: float = 6.0
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    float32: Literal["direct", "float16"] = "direct"
    on_nonfinite: Literal["error", "keep"] = "error"
    outliers: str | Path = "auto"
    outlier_columns: int | None = None
    text: Path | None = None
    tokens: int = 4096
    sequence_length: int = 512
    seed: int = 0
    workers: int | None = None
    threads: int | None = None
    device: DeviceName = "cpu"
    figures: bool = True
    keep_source: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class EstimateOptions:
    """How the model will be used.

    - `revision`: branch, tag or commit of a model on the Hub; None is its main branch.
    - `context`: tokens in each sequence; None is the model's maximum, up to 8192. `batch`: sequences at once.
    - `kv_dtype`: dtype of the KV cache.
    - `gpu`: cards to check: names ("RTX 3090"), sizes ("24GiB"), several of one kind ("8x24GiB").
    - `layout`: output layout of the conversion.
    """

    revision: str | None = None
    context: int | None = None
    batch: int = 1
    kv_dtype: Literal["float32", "float16", "bfloat16", "float8"] = "float16"
    gpu: tuple[str, ...] = ()
    layout: LayoutName = "bitsandbytes"


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """How to look for outliers.

    - `evidence`: run the model ("activations"), or guess from its weights; None runs it if possible.
    - `revision`: branch, tag or commit of a model on the Hub; None is its main branch.
    - `text`: UTF-8 text to run the model on, None is the built-in sample. `tokens` is the total, in sequences of
      `sequence_length`; `seed` selects the pieces of a long text.
    - `threshold`: values of this magnitude or more are outliers.
    - `device`: where the model runs.
    - `work_dir`: directory for the state of an unfinished run; None is the user's cache.
    """

    evidence: Literal["activations", "weights"] | None = None
    revision: str | None = None
    text: Path | None = None
    tokens: int = 4096
    sequence_length: int = 512
    seed: int = 0
    threshold: float = 6.0
    device: DeviceName = "cpu"
    work_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to verify against.

    - `source`: convert this model again and compare; None checks only the output.
    - `revision`: branch, tag or commit of the source on the Hub; None is the one that was converted.
    - `device`: where to quantize, with a `source`.
    - `threads`: threads that read and convert; None chooses from the cores.
    """

    source: str | Path | None = None
    revision: str | None = None
    device: DeviceName = "cpu"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to evaluate, and on what.

    - `text`: UTF-8 text to run the model on, None is the built-in sample. `tokens` is the total, in sequences of
      `sequence_length`; `seed` selects the pieces of a long text.
    - `methods`: their names; empty means the main methods, "all" means every one.
    - `outlier_columns`: the most columns to store for each linear layer; None is the default of `convert`.
    - `outliers`: statistics file that chooses the columns; None calibrates on another text.
    - `source`: for a converted model, the 16- or 32-bit model it was made from.
    - `revision`: revision of the model on the Hub or, if the model is a local conversion, of its source.
    - `device`: where the model runs.
    - `work_dir`: directory for the state of an unfinished run; None is the user's cache.
    """

    text: Path | None = None
    tokens: int = 4096
    sequence_length: int = 512
    seed: int = 0
    methods: tuple[str, ...] = ()
    outlier_columns: int | None = None
    outliers: Path | None = None
    source: str | Path | None = None
    revision: str | None = None
    device: DeviceName = "cpu"
    work_dir: Path | None = None
