"""Some of the rows that pass by: evenly spaced over all of them, however many there are."""

import torch
from torch import Tensor


class SampledRows:
    """Keeps between half of `most` and `most` rows, if there are so many. The same rows in give the same rows out."""

    def __init__(self, most: int) -> None:
        self._most, self._stride, self._seen = most, 1, 0
        self._kept: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Rows (count, features), which follow those that were added before. Copies what it keeps."""
        first = -self._seen % self._stride
        self._kept.append(rows[first :: self._stride].clone())
        self._seen += len(rows)
        while sum(map(len, self._kept)) > self._most:
            self._kept = [self.rows()[::2].clone()]
            self._stride *= 2

    def rows(self) -> Tensor:
        """The rows that are kept, in their order. There must have been some."""
        return self._kept[0] if len(self._kept) == 1 else torch.cat(self._kept)
