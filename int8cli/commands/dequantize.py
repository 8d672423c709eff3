"""Write a conversion as 16-bit floats again, for loaders that know no int8."""

from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.commands.checks import check_dequantize
from int8cli.commands.first_words import announce_duration
from int8cli.commands.options import DequantizeOptions
from int8cli.commands.places import output_directory
from int8cli.estimate.ways import restoring_s
from int8cli.progress import SILENT, Progress
from int8cli.results.dequantization import Dequantization
from int8cli.results.units import human_bytes
from int8cli.verification import conversion_in
from int8cli.workers.torch_start import start_torch, torch_threads_restored

_DEFAULTS = DequantizeOptions()
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@system_errors()
def dequantize(
    directory: str | Path,
    output: str | Path,
    options: DequantizeOptions = _DEFAULTS,
    *,
    progress: Progress = SILENT,
) -> Dequantization:
    """Write the model in a directory that `convert` wrote into `output`, its int8 weights as floats.

    Streams shard by shard, a block of a tensor in memory. A weight becomes the one that `load_model` computes with: its
    stored columns are those of the source, exactly. After an interruption, the same call resumes with the next shard.
    Raises OutputError for a directory without a finished conversion and for an output that holds something else,
    DiskSpaceError, CheckpointError.
    """
    check_dequantize(options)
    directory, output = Path(directory), output_directory(output)
    conversion = conversion_in(directory)
    size_bytes = sum(shard.size_bytes for shard in conversion.shards)
    announce_duration(f"writing {human_bytes(size_bytes)}", restoring_s(size_bytes), progress)
    with torch_threads_restored():
        start_torch()
        from int8cli.conversion.dequantize import dequantize as write_floats

        dtype = None if options.dtype is None else _DTYPES[options.dtype]
        return write_floats(directory, conversion, output, dtype, progress)
