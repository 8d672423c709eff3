"""How the calibration within a conversion goes, told to the conversion's own progress."""

import time

from int8cli.cli.inspect_progress import beginning
from int8cli.cli.progress import ProgressObserver
from int8cli.model.observer import CalibrationObserver


class CalibrationProgress(CalibrationObserver):
    """Counts a calibration in bytes of weights that the model was run with, every block as large as the largest."""

    def __init__(self, observer: ProgressObserver) -> None:
        self._observer = observer
        self._blocks, self._done, self._block_bytes, self._begun_s = 0, 0, 0, 0.0

    def started(self, blocks: int, finished: int, block_bytes: int, tokens: int) -> None:
        for line in beginning(blocks, finished, block_bytes, tokens):
            self._observer.noted(line)
        self._blocks, self._done, self._block_bytes = blocks, finished, block_bytes
        self._observer.calibration_started(blocks * block_bytes, finished * block_bytes)

    def block_started(self, name: str, weight_bytes: int) -> None:
        self._begun_s = time.monotonic()

    def sequence_done(self, name: str, sequence: int, sequences: int) -> None:
        done = self._done + sequence / sequences
        self._observer.calibrated(f"run {self._done + 1}/{self._blocks} {name}", int(done * self._block_bytes))

    def block_finished(self, name: str) -> None:
        self._done += 1
        took_s = time.monotonic() - self._begun_s
        self._observer.block_calibrated(f"block {self._done}/{self._blocks} {name} in {took_s:.1f} s")

    def noted(self, message: str) -> None:
        self._observer.noted(message)
