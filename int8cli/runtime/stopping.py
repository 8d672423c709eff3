"""Ends a forward pass of a model between two of its blocks, when asked.

Owns where a model can be stopped. With blocks that are read from the disk, a token can take minutes, so that asking
once for each token would be too seldom.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from int8cli.model.units import find_units

Stop = Callable[[], bool]


class ForwardStopped(Exception):  # noqa: N818  # no error
    """A forward pass was stopped before its end, since `stop` returned True."""


@contextmanager
def stoppable(model: Any, stop: Stop | None) -> Iterator[None]:
    """Ask `stop` before each forward pass of the model and before each of its blocks.

    Once it returns True, ForwardStopped is raised there. The model can run again afterwards.
    """

    def ask(*_: Any) -> None:
        if stop is not None and stop():
            raise ForwardStopped

    with ExitStack() as hooks:
        if stop is not None:
            blocks = [model.get_submodule(name) for name, stack, _ in find_units(model) if stack is not None]
            for module in (model, *blocks):  # first, before any hook that loads the weights of a block
                hooks.callback(module.register_forward_pre_hook(ask, prepend=True).remove)
        yield
