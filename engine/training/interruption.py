"""Ctrl-C and SIGTERM end a run after the step in progress, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

EXIT_CODES = {signal.SIGINT: 0, signal.SIGTERM: 128 + signal.SIGTERM}
"""Of the process: a person who presses Ctrl-C got what they asked for; a scheduler expects 143."""


class Interruption:
    """A context that turns the first signal into `requested`; a second Ctrl-C interrupts as usual."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """0 too on a rank that stopped because another one was asked to."""
        return 0 if self.signal is None else EXIT_CODES[self.signal]

    def __enter__(self) -> Interruption:
        self._previous = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)
