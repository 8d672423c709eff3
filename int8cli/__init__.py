"""int8cli: LLM.int8() checkpoints, by streaming. One function for each command, and `load_model`."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from int8cli.commands.convert import ConversionPlan as ConversionPlan
    from int8cli.commands.convert import ConversionResult as ConversionResult
    from int8cli.commands.convert import convert as convert
    from int8cli.commands.convert import plan_conversion as plan_conversion
    from int8cli.commands.dequantize import dequantize as dequantize
    from int8cli.commands.estimate_memory import estimate_memory as estimate_memory
    from int8cli.commands.evaluate import evaluate as evaluate
    from int8cli.commands.generate import chat as chat
    from int8cli.commands.generate import generate as generate
    from int8cli.commands.inspect_outliers import inspect_outliers as inspect_outliers
    from int8cli.commands.options import ConvertOptions as ConvertOptions
    from int8cli.commands.options import DequantizeOptions as DequantizeOptions
    from int8cli.commands.options import EstimateOptions as EstimateOptions
    from int8cli.commands.options import EvaluateOptions as EvaluateOptions
    from int8cli.commands.options import GenerateOptions as GenerateOptions
    from int8cli.commands.options import InspectOptions as InspectOptions
    from int8cli.commands.options import PushOptions as PushOptions
    from int8cli.commands.options import VerifyOptions as VerifyOptions
    from int8cli.commands.push import push as push
    from int8cli.commands.report import read_report as read_report
    from int8cli.commands.report import write_report as write_report
    from int8cli.commands.status import status as status
    from int8cli.commands.verify import verify as verify
    from int8cli.errors import Int8cliError as Int8cliError
    from int8cli.progress import Progress as Progress
    from int8cli.progress import SilentProgress as SilentProgress
    from int8cli.runtime.load import load_model as load_model

# The package uses torch without numpy; torch warns about that in every process that imports it.
warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)

__version__ = "0.1.0"

# Where each name is defined. Each is imported on first use: most need torch, which takes a second to import.
_HOME = {
    "ConversionPlan": "int8cli.commands.convert",
    "ConversionResult": "int8cli.commands.convert",
    "ConvertOptions": "int8cli.commands.options",
    "DequantizeOptions": "int8cli.commands.options",
    "EstimateOptions": "int8cli.commands.options",
    "EvaluateOptions": "int8cli.commands.options",
    "GenerateOptions": "int8cli.commands.options",
    "InspectOptions": "int8cli.commands.options",
    "Int8cliError": "int8cli.errors",
    "Progress": "int8cli.progress",
    "PushOptions": "int8cli.commands.options",
    "SilentProgress": "int8cli.progress",
    "VerifyOptions": "int8cli.commands.options",
    "chat": "int8cli.commands.generate",
    "convert": "int8cli.commands.convert",
    "dequantize": "int8cli.commands.dequantize",
    "estimate_memory": "int8cli.commands.estimate_memory",
    "evaluate": "int8cli.commands.evaluate",
    "generate": "int8cli.commands.generate",
    "inspect_outliers": "int8cli.commands.inspect_outliers",
    "load_model": "int8cli.runtime.load",
    "plan_conversion": "int8cli.commands.convert",
    "push": "int8cli.commands.push",
    "read_report": "int8cli.commands.report",
    "status": "int8cli.commands.status",
    "verify": "int8cli.commands.verify",
    "write_report": "int8cli.commands.report",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
