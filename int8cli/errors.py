"""The errors that a user can cause or act on, in one tree. Each says what is wrong, where, and what to do next.

Library code raises them; the command line shows them as `error: …` and `hint: …`. Any other exception is a bug and is
shown with its traceback.
"""


class Int8cliError(Exception):
    """Base of all errors a user can act on. `hint` is the next step, as one sentence.

    `usual_hint` is that of the errors of a class which name none.
    """

    usual_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.usual_hint


class OptionError(Int8cliError):
    """An option has an invalid value. `option` is its name, as a field of the command's options."""

    def __init__(self, message: str, *, option: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.option = option


class CannotRunInPartsError(OptionError):
    """The outlier columns are to come from a run of the model, which no part of a conversion makes."""


class NoStatisticsYetError(OptionError):
    """What is asked for needs statistics of the whole model before the first shard, and there are none."""


class SourceError(Int8cliError):
    """The model cannot be read from the place the user named."""


class ModelNotFoundError(SourceError):
    """No such repository, revision, directory or file."""

    usual_hint = "MODEL is a Hub id (org/name), a directory, or one checkpoint file."


class AccessDeniedError(SourceError):
    """The repository is gated or private, and the token, if any, gives no access."""


class TransferError(SourceError):
    """The Hub cannot be reached, or every retry failed."""


class ReferenceModelError(SourceError):
    """The 16-bit model of a conversion is missing, cannot be used, or is not the one that was converted."""


class CheckpointError(Int8cliError):
    """The checkpoint itself is wrong."""


class CorruptShardError(CheckpointError):
    """A shard is truncated, does not match its own header, or differs from the published file."""

    usual_hint = "Get another copy of the file, and run the same command again."


class DigestMismatchError(CorruptShardError):
    """A file differs from the published one, or changed after its header was read. A fresh copy may be correct."""


class IndexFileError(CheckpointError):
    """A weight_map names something that is missing or not allowed."""

    usual_hint = "Get the index again, or correct it."


class UnsafePickleError(CheckpointError):
    """A .bin file contains more than tensors, so it is not unpickled."""


class NonFiniteError(CheckpointError):
    """A weight contains NaN or an infinity and cannot be quantized."""


class NonFiniteRunError(NonFiniteError):
    """Running the model on text produces NaN or an infinity."""


class StatisticsFileError(CheckpointError):
    """A file does not contain outlier statistics, or what it contains contradicts itself."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is complete but cannot be converted: it is already quantized, an adapter, or has no weights."""


class AlreadyQuantizedError(UnsupportedModelError):
    """The weights are already quantized."""


class AlreadyConvertedError(AlreadyQuantizedError):
    """The weights are int8 already, and int8cli wrote them."""

    usual_hint = "Give the 16- or 32-bit model that was converted."


class CannotRunError(UnsupportedModelError):
    """The model cannot be run on text, because of its class, its config.json or its tokenizer."""


class UnsupportedOperationError(UnsupportedModelError):
    """A loaded int8 model cannot do this: be saved, or have its weights changed."""


class NothingToQuantizeError(UnsupportedModelError):
    """No linear layer is left to quantize."""


class NoSuspectsError(UnsupportedModelError):
    """Suspects cannot be found: no layer is recognised by its name."""


class WorkerLostError(Int8cliError):
    """A worker process ended without a result."""


class OutputError(Int8cliError):
    """The output cannot be written as requested."""


class PlaceError(OutputError):
    """The output cannot be written where it was asked for, but perhaps elsewhere."""


class OutputInUseError(OutputError):
    """Another process is using the output directory."""


class CannotLockError(PlaceError):
    """The disk of the output directory has no locks."""


class UnfinishedPartsError(OutputError):
    """Parts of a conversion are not finished, so it cannot be concluded."""


class VersionMismatchError(OutputError):
    """Several versions of int8cli are to work on one conversion."""


class SettingsMismatchError(PlaceError):
    """The output directory holds a conversion of another model, or one with other settings."""


class InexactSmoothingError(CheckpointError):
    """A value of a tensor cannot be multiplied by the scale of a smoothing without losing too many digits."""


class SavedStateError(Int8cliError):
    """The state that an interrupted run saved cannot be read back."""


class StatisticsChangedError(Int8cliError):
    """A file of outlier statistics was replaced while it was read."""


class StatisticsMismatchError(Int8cliError):
    """Outlier statistics were made from another model or revision, or lack the smoothing that is asked for."""


class DiskSpaceError(PlaceError):
    """There is not enough free disk space."""


class CacheSpaceError(DiskSpaceError):
    """The disk of the Hub cache has not enough free space for the source, which is to be kept there."""


class ShardsRemovedError(OutputError):
    """Shards of a conversion were uploaded and then removed from its directory."""


class DestinationError(Int8cliError):
    """The repository that a conversion is pushed to cannot take it."""


class MissingExtraError(Int8cliError):
    """A feature needs packages of an extra that is not installed."""


class MissingRayError(MissingExtraError):
    """Converting on a cluster needs Ray, which is not installed."""


class ClusterError(Int8cliError):
    """A Ray cluster cannot be reached, or cannot run the work."""


class MissingTransformersError(MissingExtraError):
    """Running a model needs packages that are not installed."""


class TextError(Int8cliError):
    """The text to run the model on cannot be used."""


class ShortTextError(TextError):
    """The text is too short for one sequence, or a sequence for any text."""


class SystemRefusalError(Int8cliError):
    """The operating system refused a request, and no more specific error applies."""


class NotEnoughMemoryError(Int8cliError):
    """This machine, or its GPU, has too little memory for what must be loaded at once."""


class NotEnoughGpuMemoryError(NotEnoughMemoryError):
    """The GPU has too little memory for what must be loaded at once."""


class MemoryRefusedError(NotEnoughMemoryError):
    """The system does not give this process the memory that it asks for."""


class UnknownMethodError(Int8cliError):
    """There is no int8 method with that name."""


# Errors that stop a calibration of a valid checkpoint: another strategy can still choose the columns.
CANNOT_CALIBRATE = (MissingExtraError, UnsupportedModelError, NotEnoughMemoryError)
