"""The errors a user can cause or meet, in one tree. Each says what, where, and what to do next.

Owns no behaviour: library code raises these, the command line shows them as `error: …` and `hint: …`. What is not
in this tree is a bug and keeps its traceback.
"""


class Int8cliError(Exception):
    """Base of everything a user can act on. `hint` is the next step, as one sentence."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class OptionError(Int8cliError):
    """An option has a value that cannot be used. `option` is its name, as a field of the command's options."""

    def __init__(self, message: str, *, option: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.option = option


class SourceError(Int8cliError):
    """The model cannot be read from where the user pointed."""


class ModelNotFoundError(SourceError):
    """No such repository, revision, directory or file."""


class AccessDeniedError(SourceError):
    """The repository is gated or private and the token, if any, does not open it."""


class TransferError(SourceError):
    """The Hub could not be reached, or kept failing after every retry."""


class ReferenceModelError(SourceError):
    """The 16-bit model beside a converted one is missing, of no use, or not the one that was converted."""


class CheckpointError(Int8cliError):
    """The checkpoint itself is wrong."""


class CorruptShardError(CheckpointError):
    """A shard is truncated, lies about itself, or is not what was published."""


class DigestMismatchError(CorruptShardError):
    """A file is not what was published, or no longer what its header was read from; another copy may be."""


class IndexFileError(CheckpointError):
    """A weight_map names what is not there, or what it must not name."""


class UnsafePickleError(CheckpointError):
    """A .bin file holds more than tensors; it is not unpickled."""


class NonFiniteError(CheckpointError):
    """A weight holds NaN or an infinity and cannot be quantized."""


class NonFiniteRunError(NonFiniteError):
    """Running the model over text meets NaN or an infinity."""


class StatisticsFileError(CheckpointError):
    """A file does not hold outlier statistics."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is whole, but there is nothing to do with it: already quantized, an adapter, no weights."""


class CannotRunError(UnsupportedModelError):
    """The model cannot be run over text: its class, its config.json or its tokenizer does not allow it."""


class NothingToQuantizeError(UnsupportedModelError):
    """No linear layer is left that becomes int8."""


class WeightsTellNothingError(UnsupportedModelError):
    """Nothing that suspects could be told from is recognised by its name."""


class WorkerLostError(Int8cliError):
    """A process that converted a shard is gone without a word."""


class OutputError(Int8cliError):
    """The output directory cannot be written as asked."""


class OutputInUseError(OutputError):
    """Another convert holds the output directory."""


class SettingsMismatchError(OutputError):
    """The output directory holds the records of a conversion of something else, or with other settings."""


class SavedStateError(Int8cliError):
    """What an interrupted run saved to be resumed from cannot be read back."""


class StatisticsMismatchError(Int8cliError):
    """Outlier statistics are of another model, or of another revision of it."""


class DiskSpaceError(OutputError):
    """There is not enough room on the disk."""


class MissingExtraError(Int8cliError):
    """What was asked for needs packages of an extra that is not installed."""


class MissingTransformersError(MissingExtraError):
    """Running a model needs packages that are not installed."""


class TextError(Int8cliError):
    """The text to run the model over cannot be used."""


class SystemRefusalError(Int8cliError):
    """The operating system refused what it was asked for, where nothing more is known of it."""


class NotEnoughMemoryError(Int8cliError):
    """This machine, or its GPU, does not hold what has to be in memory at once."""


class UnknownMethodError(Int8cliError):
    """There is no int8 method of that name."""


# What stops a calibration without being a fault of the checkpoint: columns can still be chosen in another way.
CANNOT_CALIBRATE = (MissingExtraError, UnsupportedModelError, NotEnoughMemoryError)
