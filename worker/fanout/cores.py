"""Keeps a worker off the core that its sender is on.

The kernel wakes a real-time process on the core where it ran last, and is slow to move whom it preempts there. On two
cores a worker was stopped by its own sender for as long as it ran itself, while others had the second core; so in a
storm it could not catch up with its pace. Now and then the kernel does move the sender: then the worker goes where it
was.

Source: sched(7), sched_setaffinity(2).
"""

from __future__ import annotations

import os

from shared.logs import get_logger
from shared.text import in_words


class Cores:
    """The cores that this process may use, and one of them that it does not.

    Of the thread that makes it and calls it; what that starts inherits its cores.

    Args:
        workers: on this host. Where fewer cores than that would be left, each worker would share one with another's
            sender, and none could be moved: there the kernel decides.
    """

    def __init__(self, workers: int) -> None:
        self._all = os.sched_getaffinity(0)
        self._chooses = len(self._all) > workers
        self._avoided: int | None = None

    def keep_off(self, core: int) -> None:
        """Leave a core to others."""
        if core != self._avoided and self._chooses and core in self._all:
            self._use(core)

    def use_all(self) -> None:
        """Where nobody has to be kept off, and before a process is started that has a choice of its own."""
        if self._avoided is not None:
            self._use(None)

    def _use(self, avoided: int | None) -> None:
        try:
            os.sched_setaffinity(0, self._all - {avoided})
            self._avoided = avoided
        except OSError as error:  # it is forbidden, or this process was given other cores meanwhile
            get_logger().warning("cores.not_chosen", error=in_words(error))
            self._chooses, self._avoided = False, None
