"""Another strategy for choosing columns, where the first one does not work for a model or a machine."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from int8cli.columns.choose import WITHOUT_SMOOTHING, falling_back
from int8cli.columns.wanted import ColumnStrategy
from int8cli.commands.conversion_words import fallback_to
from int8cli.errors import CANNOT_CALIBRATE

T = TypeVar("T")


def with_first_that_works(
    strategies: Iterator[ColumnStrategy], work: Callable[[ColumnStrategy], T], note: Callable[[str], None]
) -> T:
    """The result of `work` with the first of the strategies by which it can be done. Notes why another one is taken.

    Raises the error of the last one, if there is none after it.
    """
    strategy = next(strategies)
    while True:
        try:
            return work(strategy)
        except CANNOT_CALIBRATE as error:
            following = next(strategies, None)
            if following is None:
                raise
            note(falling_back(error, fallback_to(following) + (WITHOUT_SMOOTHING if strategy.survey.smooth else "")))
            strategy = following
