"""The options of each command, with the defaults of the command line. Needs only the standard library.

A field has the name of the command-line option, with _ for -.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LayoutName = Literal["bitsandbytes", "compressed-tensors"]
InputsName = Literal["absmax", "zeropoint", "none"]
DeviceName = Literal["cpu", "cuda"]
# The scales of a smoothing: powers of two, which change no bit, or steps of 2^(1/4), which round what takes them.
ScalesName = Literal["exact", "fine"]
# On SmolLM2-135M, columns chosen on 512, 1,024, 2,048 and 4,096 tokens leave a mean output error of 0.01055, 0.01056,
# 0.01055 and 0.01053, and a divergence of 0.0082, 0.0078, 0.0081 and 0.0080 nats from 16 bit. More tokens only take
# longer: eight times the arithmetic for nothing.
CONVERT_TOKENS = 512
# How long downloads that fail without progress are tried again, in seconds. A conversion from the Hub may take days.
RETRY_FOR_S = 3 * 3600.0


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert.

    - `revision`: branch, tag or commit of a model on the Hub; None is its main branch.
    - `layout`: which loaders can open the output.
    - `inputs`: how loaders of compressed-tensors quantize the inputs of a layer: around zero, which all of them do,
      with a zero point, which is more accurate in vLLM and transformers, and which others ignore, or not at all.
    - `threshold`: llm_int8_threshold for the loader: inputs of this magnitude or more are multiplied in 16 bit.
    - `skip`, `only`: globs on module names. Modules that match `skip`, or do not match `only`, are not quantized.
    - `float32`: quantize float32 weights directly, or from float16 as bitsandbytes does.
    - `on_nonfinite`: a weight with NaN or an infinity stops the conversion, or stays a float, in the model's dtype.
    - `outliers`: how the columns to store exactly are chosen: "auto", "activations", "weights", "none", or the path of
      a statistics file of `inspect_outliers`.
    - `outlier_columns`: the most columns to store for each linear layer; None is the measured optimum, 8.
    - `outlier_budget`: instead of a number for each layer, what the columns of all layers take together, as a share of
      the output's bytes: 0.01 is 1 %. They go where they save most. Takes statistics of the whole model, from a file or
      from a run of a model on disk before the first shard is converted.
    - `smooth`: move what is hard to round from inputs into weights. "exact" does it by powers of two, where a run of
      the model or its statistics prove that it computes the same bits; "auto" is the same if the model can be run, else
      nothing. "fine" does it in steps of 2^(1/4), for which norms are rounded to their dtype: int8 loses less, and the
      rounding a little. "none" does nothing, and the path of a statistics file of `inspect_outliers` what that has.
      None is "auto" in the layout compressed-tensors, else "none".
    - `text`: UTF-8 text to run the model on, None is the built-in sample. `tokens` is the total, in sequences of
      `sequence_length`; `seed` selects the pieces of a long text.
    - `workers`: processes, each converts one shard at a time; None chooses from cores and shards. `threads`: per
      process; None divides the cores.
    - `device`: where to quantize.
    - `figures`: measure the error of every layer.
    - `keep_source`: keep downloaded shards in the Hub cache.
    - `retry_for`: seconds for which a download or an upload that fails without progress is tried again.
    - `overwrite`: replace an earlier conversion.
    - `push_to_hub`: repository on the Hub, as "name/model", that gets each shard as it is finished and, at the end, all
      files in one commit. `private`, `push_revision` and `commit_message` are those of `PushOptions`.
    - `push_to`: instead of a repository, an address in an object store, as "s3://bucket/model".
    - `keep_output`: False removes each shard from the directory once it is where it is pushed to.
    - `part`: convert part K of N, as (K, N), K from 1 on: the shards are divided between N processes, which may run on
      several machines that see the same directory. The part that finds all shards converted writes the other files.
    - `finish`: convert nothing, and write the files that describe the whole after all parts.
    - `ray`: convert the shards on a Ray cluster: its address, "auto" for the one that runs on this machine (or in
      RAY_ADDRESS), "local" for a new one, "here" for that of "auto" if there is one, else a new one. All its machines
      must see the output under the same path.
    """

    revision: str | None = None
    layout: LayoutName = "bitsandbytes"
    inputs: InputsName = "absmax"
    threshold: float = 6.0
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    float32: Literal["direct", "float16"] = "direct"
    on_nonfinite: Literal["error", "keep"] = "error"
    outliers: str | Path = "auto"
    outlier_columns: int | None = None
    outlier_budget: float | None = None
    smooth: str | Path | None = None
    text: Path | None = None
    tokens: int = CONVERT_TOKENS
    sequence_length: int = 512
    seed: int = 0
    workers: int | None = None
    threads: int | None = None
    device: DeviceName = "cpu"
    figures: bool = True
    keep_source: bool = False
    retry_for: float = RETRY_FOR_S
    overwrite: bool = False
    push_to_hub: str | None = None
    push_to: str | None = None
    private: bool = False
    push_revision: str | None = None
    commit_message: str | None = None
    keep_output: bool = True
    part: tuple[int, int] | None = None
    finish: bool = False
    ray: str | None = None


@dataclass(frozen=True, slots=True)
class EstimateOptions:
    """How the model will be used.

    - `revision`: branch, tag or commit of a model on the Hub; None is its main branch.
    - `context`: tokens in each sequence; None is the model's maximum, up to 8192. `batch`: sequences at once.
    - `kv_dtype`: dtype of the KV cache.
    - `gpu`: machines to check, each by its cards: names ("RTX 3090"), sizes ("24GiB"), several of one kind ("8x24GiB"),
      several kinds ("2x RTX 3090, T4").
    - `layout`: output layout of the conversion.
    - `machines`: numbers of machines to convert on, each with one part. `network`: what each machine gets of the source
      in bytes a second; None leaves transfers out.
    """

    revision: str | None = None
    context: int | None = None
    batch: int = 1
    kv_dtype: Literal["float32", "float16", "bfloat16", "float8"] = "float16"
    gpu: tuple[str, ...] = ()
    layout: LayoutName = "bitsandbytes"
    machines: tuple[int, ...] = ()
    network: float | None = None


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """How to look for outliers.

    - `evidence`: run the model ("activations"), or guess from its weights; None runs it if possible.
    - `revision`: branch, tag or commit of a model on the Hub; None is its main branch.
    - `text`: UTF-8 text to run the model on, None is the built-in sample. `tokens` is the total, in sequences of
      `sequence_length`; `seed` selects the pieces of a long text.
    - `threshold`: values of this magnitude or more are outliers.
    - `smooth`: also find and prove what `convert` can smooth, which takes about as long as the rest: by "exact" powers
      of two (or True), or in "fine" steps of 2^(1/4). None or False looks for nothing.
    - `device`: where the model runs.
    - `work_dir`: directory for the state of an unfinished run; None is the user's cache.
    - `retry_for`: seconds for which a download that fails without progress is tried again.
    """

    evidence: Literal["activations", "weights"] | None = None
    revision: str | None = None
    text: Path | None = None
    tokens: int = 4096
    sequence_length: int = 512
    seed: int = 0
    threshold: float = 6.0
    smooth: ScalesName | bool | None = None
    device: DeviceName = "cpu"
    work_dir: Path | None = None
    retry_for: float = RETRY_FOR_S


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to verify against.

    - `source`: convert this model again and compare; None checks only the output.
    - `revision`: branch, tag or commit of the source on the Hub; None is the one that was converted.
    - `device`: where to quantize, with a `source`.
    - `threads`: how many read and convert; None chooses from the cores.
    - `retry_for`: seconds for which a download that fails without progress is tried again.
    """

    source: str | Path | None = None
    revision: str | None = None
    device: DeviceName = "cpu"
    threads: int | None = None
    retry_for: float = RETRY_FOR_S


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What to say, and where to run.

    - `raw`: continue the prompt as it is, without the tokenizer's chat template.
    - `max_new_tokens`: most tokens to generate.
    - `temperature`: of sampling; 0 takes the likeliest token each time. `seed`: of sampling.
    - `inputs`: how inputs become int8.
    - `device`: where to run; None is the GPU if there is one.
    - `max_memory`: most memory for weights, as "cpu=8GB" or, for the GPU, "0=10GB"; what does not fit is read from the
      disk for each token. Empty: four fifths of what is free.
    - `compare`: the 16-bit model to run on the same prompt, a directory or a Hub id.
    """

    raw: bool = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    inputs: Literal["zeropoint", "absmax"] = "zeropoint"
    device: DeviceName | None = None
    max_memory: tuple[str, ...] = ()
    compare: str | Path | None = None


@dataclass(frozen=True, slots=True)
class DequantizeOptions:
    """What to write.

    - `dtype`: of all floats; None is the dtype that each tensor had in the source.
    """

    dtype: Literal["float32", "float16", "bfloat16"] | None = None


@dataclass(frozen=True, slots=True)
class PushOptions:
    """How to push.

    - `private`: a new repository is private, and one that is public is refused.
    - `revision`: branch to write to, created if there is none; None is the main branch.
    - `commit_message`: of the one commit; None names the model.
    - `retry_for`: seconds for which an upload that fails without progress is tried again.
    """

    private: bool = False
    revision: str | None = None
    commit_message: str | None = None
    retry_for: float = RETRY_FOR_S


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to evaluate, and on what.

    - `text`: UTF-8 text to run the model on, None is the built-in sample. `tokens` is the total, in sequences of
      `sequence_length`; `seed` selects the pieces of a long text.
    - `methods`: their names; empty means the main methods, "all" means every one.
    - `outlier_columns`: the most columns to store for each linear layer; None is the default of `convert`.
    - `outliers`: statistics file that chooses the columns and what to smooth; None calibrates on another text.
    - `smooth`: the scales of the smoothed methods, "exact" powers of two or "fine" steps of 2^(1/4); None is as the
      statistics file has them, or exact.
    - `source`: for a converted model, the 16- or 32-bit model it was made from.
    - `revision`: revision of the model on the Hub or, if the model is a local conversion, of its source.
    - `device`: where the model runs.
    - `work_dir`: directory for the state of an unfinished run; None is the user's cache.
    - `retry_for`: seconds for which a download that fails without progress is tried again.
    """

    text: Path | None = None
    tokens: int = 4096
    sequence_length: int = 512
    seed: int = 0
    methods: tuple[str, ...] = ()
    outlier_columns: int | None = None
    outliers: Path | None = None
    smooth: ScalesName | None = None
    source: str | Path | None = None
    revision: str | None = None
    device: DeviceName = "cpu"
    work_dir: Path | None = None
    retry_for: float = RETRY_FOR_S
