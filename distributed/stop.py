"""Stopping when somebody asks for it: SIGTERM or SIGINT, to one rank or to all."""

import os
import signal
import sys
import time
from types import FrameType

import torch
import torch.distributed as dist

from distributed.failure import end_now, ended_beside
from distributed.process_group import tally

# torchrun hands Ctrl-C, which all processes of a terminal get, on to its ranks once more, at once.
SAME_SIGNAL_SECONDS = 2.0
ASKED = "ranks asked to stop"


class Stopped(Exception):
    """All ranks leave, having agreed on it. Raised alike on every rank."""


class StopSignal:
    """Remembers that this process was asked to stop; all ranks find out at the places where they look.

    A handler may run at any time, also inside a collective, so it only takes a note. The second SIGINT ends the process
    at once.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self._asked_at, self._told = 0.0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and ended_beside():  # torchrun ends what is left of a job that has failed
            end_now()
            return
        if self.name:
            if number == signal.SIGINT and time.monotonic() - self._asked_at > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)
            return
        self.name, self._asked_at = signal.Signals(number).name, time.monotonic()
        text = f"{self.name}: stopping after this step; a checkpoint follows (Ctrl-C once more: at once)\n"
        os.write(sys.stderr.fileno(), text.encode())  # print could find its own lock taken

    def seen(self) -> bool:
        """Whether any rank was asked to, as far as it has looked. Not a collective: ranks may answer differently."""
        try:
            if self.name and not self._told:
                self._told = True
                tally(ASKED, 1)
            return self._told or tally(ASKED) > 0
        except RuntimeError:  # a lost connection: `agreed` will tell
            return bool(self.name)

    def agreed(self) -> bool:
        """Whether any rank was asked to. Collective: the same answer on all."""
        if not dist.is_initialized():
            return bool(self.name)
        asked = torch.tensor(int(bool(self.name)))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def check(self) -> None:
        """Raises Stopped on all ranks where `agreed`. Collective."""
        if self.agreed():
            raise Stopped
