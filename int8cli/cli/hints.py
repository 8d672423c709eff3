"""What the options of each command can do about an error, by its class: the library's own hints name no option.

Of an error, the hint of the nearest class in its command's table is shown after the error's own.
"""

from int8cli import errors
from int8cli.cli.errors import Hints

_MAKE_STATISTICS = "int8cli inspect-outliers MODEL --output FILE.safetensors makes them."
_BY_WEIGHTS = "--outliers weights chooses columns without running the model."
_FROM_WEIGHTS = "--from weights works without running the model."
_SMALLER_RUN = "--sequence-length N shortens the sequences, --device cpu needs no GPU."
_TEXT = "--text FILE and --sequence-length N choose what the model is run over."
_PLACES = "--output FILE and --work-dir DIR say where to write."

CONVERT: Hints = {
    errors.CannotRunError: _BY_WEIGHTS,
    errors.DiskSpaceError: "--output DIR may be on another disk.",
    errors.MissingTransformersError: _BY_WEIGHTS,
    errors.NonFiniteError: "--on-nonfinite keep leaves such tensors in their source dtype.",
    errors.NonFiniteRunError: _BY_WEIGHTS,
    errors.NotEnoughMemoryError: f"{_BY_WEIGHTS} --device cpu needs no GPU.",
    errors.NothingToQuantizeError: "--dry-run shows it.",
    errors.OutputError: "--output DIR names another directory.",
    errors.SettingsMismatchError: "--overwrite starts anew, --output DIR names another directory.",
    errors.StatisticsFileError: _MAKE_STATISTICS,
    errors.StatisticsMismatchError: _MAKE_STATISTICS,
    errors.TextError: "--text FILE chooses what the model is run over.",
    errors.WeightsTellNothingError: "--outliers activations runs the model, --outliers none stores no columns.",
    errors.WorkerLostError: "--workers N sets their number.",
}
ESTIMATE_MEMORY: Hints = {}
INSPECT_OUTLIERS: Hints = {
    errors.CannotRunError: _FROM_WEIGHTS,
    errors.MissingTransformersError: _FROM_WEIGHTS,
    errors.NonFiniteRunError: _FROM_WEIGHTS,
    errors.NotEnoughMemoryError: f"{_SMALLER_RUN} {_FROM_WEIGHTS}",
    errors.OutputError: _PLACES,
    errors.TextError: _TEXT,
    errors.WeightsTellNothingError: "--from activations runs the model.",
}
VERIFY: Hints = {}
EVALUATE: Hints = {
    errors.NotEnoughMemoryError: _SMALLER_RUN,
    errors.OutputError: _PLACES,
    errors.ReferenceModelError: "--source MODEL names the 16- or 32-bit model that was converted.",
    errors.StatisticsFileError: _MAKE_STATISTICS,
    errors.StatisticsMismatchError: _MAKE_STATISTICS,
    errors.TextError: _TEXT,
}
