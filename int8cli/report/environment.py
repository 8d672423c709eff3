"""The environment on the terminal, to be pasted into a bug report."""

from collections.abc import Iterator

from int8cli.report.terminal import stdout_console
from int8cli.report.text import printable
from int8cli.results.environment import Environment
from int8cli.results.units import human_bytes


def show_environment(found: Environment) -> None:
    """Print a name and a value on each line."""
    console = stdout_console()
    for name, value in _rows(found):
        console.print(printable(f"{name:22}  {value}"), markup=False, soft_wrap=True)


def _rows(found: Environment) -> Iterator[tuple[str, str]]:
    yield "int8cli", found.int8cli
    yield "python", found.python
    yield "system", found.system
    for package, version in found.packages.items():
        yield package, version or "not installed"
    yield "cpu", f"{found.cpu}, {found.cores} cores"
    memory = [found.memory_bytes, found.memory_available_bytes]
    total, free = (human_bytes(each) if each is not None else "unknown" for each in memory)
    yield "memory", f"{total}, {free} free"
    for name, size in found.gpus:
        yield "gpu", f"{name}, {human_bytes(size)}"
    if not found.gpus:
        yield "gpu", "none that nvidia-smi reports"
    for directory, free_bytes in found.disk_free_bytes.items():
        yield "disk free", f"{human_bytes(free_bytes)} in {directory}"
    for name, value in found.hub.items():
        yield f"hub {name}", value
    if found.speed is not None:
        rates = {name: rate / 1e9 for name, rate in found.speed.items()}
        yield (
            "measured speed",
            f"{rates['bfloat16']:.0f} GFLOP/s bfloat16, {rates['float16']:.0f} float16, "
            f"{rates['float32']:.0f} float32, quantizing {rates['quantized_bytes']:.1f} GB/s",
        )
