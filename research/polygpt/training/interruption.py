"""SIGTERM and SIGINT ask a run to save and end."""

import signal
import sys
import threading


class Interruption:
    """While entered, the first SIGTERM or SIGINT sets `requested`; a second SIGINT interrupts at once.

    Signals reach the main thread alone: elsewhere this does nothing.
    """

    def __init__(self):
        self.requested = False
        self._before = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, _) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
