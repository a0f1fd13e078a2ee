"""What ends a command with a message of its own."""

from __future__ import annotations

import signal


class UserError(ValueError):
    """A mistake in what the user gave: the message names the file, record, field or layer, the value found
    and what to do. The command line prints it alone and exits with 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a loss that is not finite, no memory): the command line prints the message
    alone and exits with 1."""


class Stopped(Exception):
    """A run was asked to stop by a signal and has saved a checkpoint; the command line exits with 128 + signum."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
