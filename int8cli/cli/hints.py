"""For each command, hints that name its options, by the class of the error. Hints in the library name no options.

The hint of the nearest class in the command's table is added to the error's own hint.
"""

from int8cli import errors
from int8cli.cli.errors import Hints

_MAKE_STATISTICS = (
    "int8cli inspect-outliers MODEL --output FILE.safetensors writes them; with --smooth, what to smooth too."
)
_BY_WEIGHTS = "--outliers weights chooses the columns without running the model."
_FROM_WEIGHTS = "--from weights works without running the model."
_SHORTER = "--sequence-length N uses shorter sequences."
_NO_GPU = "--device cpu needs no GPU."
_TEXT = "--text FILE selects the text to run."
_TEXT_AND_LENGTH = "--text FILE and --sequence-length N select the text to run."
_PLACES = "--output FILE and --work-dir DIR set where to write."
_OTHER_DIRECTORY = "--output DIR names another directory."

CONVERT: Hints = {
    errors.AlreadyConvertedError: "To check a conversion: int8cli verify DIR.",
    errors.CacheSpaceError: "Without --keep-source, each downloaded shard is removed once it is converted.",
    errors.CannotRunError: _BY_WEIGHTS,
    errors.CannotRunInPartsError: f"{_MAKE_STATISTICS} --outliers FILE.safetensors, weights or none works in parts.",
    errors.DiskSpaceError: "--output DIR can be on another disk.",
    errors.InexactSmoothingError: "--smooth none converts the model as it is.",
    errors.MemoryRefusedError: "",
    errors.MissingTransformersError: _BY_WEIGHTS,
    errors.NonFiniteError: "--on-nonfinite keep leaves such weights as floats.",
    errors.NonFiniteRunError: _BY_WEIGHTS,
    errors.NoStatisticsYetError: f"{_MAKE_STATISTICS} --outliers FILE.safetensors chooses by it.",
    errors.NotEnoughGpuMemoryError: f"{_BY_WEIGHTS} {_NO_GPU}",
    errors.NotEnoughMemoryError: _BY_WEIGHTS,
    errors.NothingToQuantizeError: "--dry-run shows the plan.",
    errors.OutputInUseError: _OTHER_DIRECTORY,
    errors.PlaceError: _OTHER_DIRECTORY,
    errors.SavedStateError: "--overwrite starts over.",
    errors.SettingsMismatchError: "--overwrite starts over, --output DIR names another directory.",
    errors.ShardsRemovedError: "--push-to-hub or --push-to resumes there, --overwrite starts over.",
    errors.ShortTextError: "--text FILE and --tokens N select the text to run.",
    errors.StatisticsFileError: _MAKE_STATISTICS,
    errors.StatisticsMismatchError: _MAKE_STATISTICS,
    errors.TextError: _TEXT,
    errors.NoSuspectsError: "--outliers activations runs the model, --outliers none stores no columns.",
    errors.UnfinishedPartsError: "int8cli status DIR shows the parts.",
    errors.VersionMismatchError: "int8cli env shows it.",
    errors.WorkerLostError: "--workers N sets their number.",
}
DEQUANTIZE: Hints = {
    errors.DiskSpaceError: "--output OUT can be on another disk.",
    errors.PlaceError: "--output OUT names another directory.",
}
ESTIMATE_MEMORY: Hints = {}
INSPECT_OUTLIERS: Hints = {
    errors.CannotRunError: _FROM_WEIGHTS,
    errors.MissingTransformersError: _FROM_WEIGHTS,
    errors.NonFiniteRunError: _FROM_WEIGHTS,
    errors.NotEnoughGpuMemoryError: f"{_SHORTER} {_NO_GPU} {_FROM_WEIGHTS}",
    errors.NotEnoughMemoryError: f"{_SHORTER} {_FROM_WEIGHTS}",
    errors.OutputInUseError: "--work-dir DIR sets where the run saves its state.",
    errors.PlaceError: _PLACES,
    errors.ShortTextError: _TEXT_AND_LENGTH,
    errors.TextError: _TEXT,
    errors.NoSuspectsError: "--from activations runs the model.",
}
PUSH: Hints = {}
VERIFY: Hints = {}
STATUS: Hints = {}
REPORT: Hints = {}
ENV: Hints = {}
GENERATE: Hints = {
    errors.NotEnoughGpuMemoryError: f"--max-memory 0=SIZE sets what weights may take there. {_NO_GPU}",
    errors.NotEnoughMemoryError: "--max-memory cpu=SIZE sets what weights may take.",
    errors.ReferenceModelError: "--compare SOURCE names the model that was converted.",
}
EVALUATE: Hints = {
    errors.NotEnoughGpuMemoryError: f"{_SHORTER} {_NO_GPU}",
    errors.NotEnoughMemoryError: _SHORTER,
    errors.OutputInUseError: "--work-dir DIR sets where the run saves its state.",
    errors.PlaceError: _PLACES,
    errors.ReferenceModelError: "--source MODEL names the 16- or 32-bit model that was converted.",
    errors.ShortTextError: _TEXT_AND_LENGTH,
    errors.StatisticsFileError: _MAKE_STATISTICS,
    errors.StatisticsMismatchError: _MAKE_STATISTICS,
    errors.TextError: _TEXT,
}
