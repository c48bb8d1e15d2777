"""Work in a child of ``fork()``, as in a web server that loads its application first."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Child(Generic[T]):
    """A process that runs ``work`` and ends; ``result`` waits for it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # from 3.12 on: a fork while threads run
            self.pid = os.fork()
        if self.pid == 0:
            try:
                done: tuple[bool, object] = True, work()
            except BaseException:  # noqa: BLE001 - the parent raises it
                done = False, traceback.format_exc()
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(done, pipe)
            os._exit(0)
        os.close(write)

    def result(self) -> T:
        """The result of the work; fails with its traceback."""
        with os.fdopen(self._read, "rb") as pipe:
            well, value = pickle.load(pipe)  # noqa: S301 - our own
        os.waitpid(self.pid, 0)
        assert well, value
        return value  # type: ignore[no-any-return] # it came through a pipe
