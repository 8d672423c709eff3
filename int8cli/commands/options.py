"""The options of each command, with the defaults that the command line has. Needs nothing but the standard library.

A field is named as the command's option is, with _ for -.
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
    - `layout`: for which loaders to write.
    - `threshold`: llm_int8_threshold for the loader: inputs from here on go through 16 bit.
    - `skip`, `only`: globs on module names, to leave modules alone and to quantize no others.
    - `float32`: float32 weights as they are, or through float16 as bitsandbytes does.
    - `on_nonfinite`: a weight with NaN or an infinity stops the conversion, or stays in its source dtype.
    - `outliers`: how the columns to store exactly are chosen: "auto", "activations", "weights", "none", or the path of
      statistics that `inspect_outliers` found.
    - `outlier_columns`: how many of each linear layer are stored at most; None is the number measured to be best.
    - `text`: UTF-8 text to run the model over, None the sample that comes along; `tokens` of it in all, in sequences of
      `sequence_length`, chosen by `seed`.
    - `workers`: processes, one shard each; None goes by cores and shards. `threads`: of each process; None shares the
      cores out.
    - `device`: where to quantize.
    - `figures`: measure the error of every layer.
    - `keep_source`: keep downloaded shards, in the Hub cache.
    - `overwrite`: start anew over an earlier conversion.
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
    """How the model is to be used.

    - `revision`: branch, tag or commit of a model on the Hub; None is its main branch.
    - `context`: tokens in each sequence; None is the model's own length, up to 8192. `batch`: sequences at once.
    - `kv_dtype`: dtype of the KV cache.
    - `gpu`: cards that may hold it: names ("RTX 3090"), sizes ("24GiB"), several of one kind ("8x24GiB").
    - `layout`: that of the conversion.
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

    - `evidence`: run the model ("activations"), or guess from its weights; None runs it if it can be run.
    - `revision`: branch, tag or commit of a model on the Hub; None is its main branch.
    - `text`: UTF-8 text to run the model over, None the sample that comes along; `tokens` of it in all, in sequences of
      `sequence_length`, chosen by `seed`.
    - `threshold`: the magnitude from which a value is an outlier.
    - `device`: where the model runs.
    - `work_dir`: where the state between blocks is saved while it runs; None is the user's cache.
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

    - `source`: convert this model once more and compare; None checks the output alone.
    - `revision`: of the source on the Hub; None is the one that was converted.
    - `device`: where to quantize again.
    - `threads`: that read and convert; None goes by the cores.
    """

    source: str | Path | None = None
    revision: str | None = None
    device: DeviceName = "cpu"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to evaluate, and on what.

    - `text`: UTF-8 text to run the model over, None the sample that comes along; `tokens` of it in all, in sequences of
      `sequence_length`, chosen by `seed`.
    - `methods`: by name; none are those of the default table, "all" stands for every one.
    - `outlier_columns`: how many each layer stores at most; None is what `convert` stores.
    - `outliers`: statistics to choose them by; None calibrates on another sample.
    - `source`: beside a converted model, the 16- or 32-bit one that it was made from.
    - `revision`: of the model on the Hub; beside a converted one in a directory, of the source.
    - `device`: where the model runs.
    - `work_dir`: where the state between blocks is saved while it runs; None is the user's cache.
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
