"""Values that a process must not share with its parent: connections, locks and threads.

Invariant: a child of ``fork()`` uses no value that its parent made. It closes its copies of the
parent's descriptors, which does not affect the parent, and sends nothing over them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_inherited: list[object] = []
"""The parent's values, kept until this process ends.

Their finalizers would act on objects that the parent still uses. For example, libuv removes a
closed socket from the event queue that both processes share. A connection pool waits for locks that
no thread of this process holds.
"""


class PerProcess(Generic[T]):
    """One value per process, made at its first use there and shared by its threads.

    ``leave`` closes the descriptors of an inherited value. The process id tells processes apart at
    each use: programs that fork in C, such as uWSGI, do not run the hooks of
    ``os.register_at_fork``.
    """

    def __init__(self, make: Callable[[], T], leave: Callable[[T], None]) -> None:
        self._make = make
        self._leave = leave
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """This process's value; every thread gets the same one.

        If two threads make one at the same time, one of the two is dropped unused.
        """
        process = os.getpid()
        value = self._values.get(process)
        if value is None:
            value = self._values.setdefault(process, self._make())
            for other in [other for other in tuple(self._values) if other != process]:
                inherited = self._values.pop(other, None)
                if inherited is not None:
                    _inherited.append(inherited)
                    self._leave(inherited)
        return value
