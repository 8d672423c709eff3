"""The errors a user can cause or run into, in one tree. Each says what, where, and what to do next.

Owns no behaviour: library code raises these, the command line shows them as `error: …` and `hint: …`. Any other
exception is a bug and keeps its traceback.
"""


class Int8cliError(Exception):
    """Base of all errors a user can act on. `hint` is the next step, as one sentence."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class OptionError(Int8cliError):
    """An option has an invalid value. `option` is its name, as a field of the command's options."""

    def __init__(self, message: str, *, option: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.option = option


class SourceError(Int8cliError):
    """The model cannot be read from the place the user named."""


class ModelNotFoundError(SourceError):
    """No such repository, revision, directory or file."""


class AccessDeniedError(SourceError):
    """The repository is gated or private, and the token, if any, gives no access."""


class TransferError(SourceError):
    """The Hub could not be reached, or kept failing after every retry."""


class ReferenceModelError(SourceError):
    """The 16-bit model of a conversion is missing, cannot be used, or is not the one that was converted."""


class CheckpointError(Int8cliError):
    """The checkpoint itself is wrong."""


class CorruptShardError(CheckpointError):
    """A shard is truncated, contradicts its own header, or differs from what was published."""


class DigestMismatchError(CorruptShardError):
    """A file differs from what was published, or changed since its header was read. Another copy may be right."""


class IndexFileError(CheckpointError):
    """A weight_map names something that is missing or not allowed."""


class UnsafePickleError(CheckpointError):
    """A .bin file contains more than tensors, so it is not unpickled."""


class NonFiniteError(CheckpointError):
    """A weight contains NaN or an infinity and cannot be quantized."""


class NonFiniteRunError(NonFiniteError):
    """Running the model on text produces NaN or an infinity."""


class StatisticsFileError(CheckpointError):
    """A file does not contain outlier statistics."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is complete but cannot be converted: it is already quantized, an adapter, or has no weights."""


class AlreadyQuantizedError(UnsupportedModelError):
    """The weights are already quantized."""


class AlreadyConvertedError(AlreadyQuantizedError):
    """The weights are int8 already, and int8cli wrote them."""


class CannotRunError(UnsupportedModelError):
    """The model cannot be run on text, because of its class, its config.json or its tokenizer."""


class NothingToQuantizeError(UnsupportedModelError):
    """No linear layer is left to quantize."""


class NoSuspectsError(UnsupportedModelError):
    """No layers are recognised by name from whose weights suspects could be found."""


class WorkerLostError(Int8cliError):
    """A worker process ended without a result."""


class OutputError(Int8cliError):
    """The output cannot be written as requested."""


class OutputInUseError(OutputError):
    """Another process is using the output directory."""


class SettingsMismatchError(OutputError):
    """The output directory has a conversion of another model, or one with other settings."""


class SavedStateError(Int8cliError):
    """The state that an interrupted run saved cannot be read back."""


class StatisticsMismatchError(Int8cliError):
    """Outlier statistics were made from another model, or from another revision of it."""


class DiskSpaceError(OutputError):
    """There is not enough free disk space."""


class MissingExtraError(Int8cliError):
    """A feature needs packages of an extra that is not installed."""


class MissingTransformersError(MissingExtraError):
    """Running a model needs packages that are not installed."""


class TextError(Int8cliError):
    """The text to run the model on cannot be used."""


class SystemRefusalError(Int8cliError):
    """The operating system refused what it was asked for, where nothing more is known of it."""


class NotEnoughMemoryError(Int8cliError):
    """This machine, or its GPU, has too little memory for what must be loaded at once."""


class UnknownMethodError(Int8cliError):
    """There is no int8 method with that name."""


# Errors that stop a calibration although the checkpoint is fine: the columns can still be chosen by another strategy.
CANNOT_CALIBRATE = (MissingExtraError, UnsupportedModelError, NotEnoughMemoryError)
