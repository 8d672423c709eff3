"""Who hears how a calibration goes. Needs no torch: a process that only may calibrate does without."""


class CalibrationObserver:
    """Hears how a calibration goes. Every method may be overridden; here none does anything."""

    def started(self, blocks: int, finished: int, block_bytes: int, tokens: int) -> None:
        """`blocks` are to be run, of which `finished` are on disk from an earlier run."""

    def block_started(self, name: str, weight_bytes: int) -> None: ...

    def sequence_done(self, name: str, sequence: int, sequences: int) -> None: ...

    def block_finished(self, name: str) -> None: ...

    def noted(self, message: str) -> None: ...
