"""Updates that were left out because a gradient was not finite. Whether one was is known on the GPU. The host asks when
it has queued the step behind, so that the GPU always has work; it is never more than a step ahead."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distillation.progress import Progress
from distributed.process_group import gather_objects

PROMPTS_NAMED = 4  # of a step that was skipped


class Skipped(NamedTuple):
    """An update that was left out: its network, and the numbers of this rank's prompts whose loss was not finite."""

    network: str
    prompts: list[int]


class Outcome:
    """What became of a step's updates: on its way to the host."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._prompts: list[list[list[int]]] = []  # of an update's micro-batches
        self._flags: list[Tensor] = []

    def add(self, network: str, updated: Tensor, losses: list[tuple[list[int], Tensor]]) -> None:
        """
        Args:
            updated: scalar, whether the network's weights were changed.
            losses: of each micro-batch its prompts' numbers and its loss, a scalar.
        """
        self._names.append(network)
        self._prompts.append([prompts for prompts, _ in losses])
        self._flags.append(torch.stack([updated, *(loss.isfinite() for _, loss in losses)]))

    def send(self) -> Callable[[], list[Skipped]]:
        """Start the way to the host. Returns what waits for the end of it, and tells which updates were left out."""
        flags, sent = torch.cat(self._flags), None
        if flags.is_cuda:
            flags = flags.to("cpu", non_blocking=True)
            sent = torch.cuda.current_stream().record_event()

        def skipped() -> list[Skipped]:
            if sent:
                sent.synchronize()
            told, found = iter(flags.tolist()), []
            for name, prompts in zip(self._names, self._prompts, strict=True):
                updated, bad = next(told), [i for part in prompts if not next(told) for i in part]
                found += [] if updated else [Skipped(name, bad)]
            return found

        return skipped


class NonFinite:
    """Says and counts the steps that were skipped, and ends the run where there are too many in a row.

    Args:
        prompts: all that there are, to name some.
        limit: --max_nonfinite_steps.
    """

    def __init__(self, prompts: list[str], limit: int, progress: Progress) -> None:
        self.prompts, self.limit, self.progress = prompts, limit, progress
        self._step, self._skipped, self._in_a_row = 0, None, 0

    def add(self, step: int, outcome: Outcome) -> None:
        """Look at what became of the step before this one, which the GPU still works on. All ranks."""
        sent = outcome.send()
        self.look()
        self._step, self._skipped = step, sent

    def look(self) -> None:
        """Look at the latest step. All ranks: where one has something to say, all have.

        Raises RuntimeError, on all ranks, where too many were skipped in a row.
        """
        if not self._skipped:
            return
        skipped, self._skipped = self._skipped(), None
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self.progress.nonfinite_steps += 1
        bad = sorted({i for other in gather_objects([i for s in skipped for i in s.prompts]) for i in other})
        prompts = "; ".join(repr(self.prompts[i]) for i in bad[:PROMPTS_NAMED]) or "their losses are finite"
        names = ", ".join(dict.fromkeys(s.network for s in skipped))
        words = f"step {self._step}: the gradient of {names} is not finite; update skipped. Its prompts: {prompts}"
        more = f" and {len(bad) - PROMPTS_NAMED} more" if len(bad) > PROMPTS_NAMED else ""
        self.progress.say(words + more)
        if self._in_a_row >= self.limit:
            raise RuntimeError(
                f"{self.limit} steps in a row up to step {self._step} had gradients that are not finite "
                "(--max_nonfinite_steps): the learning rate may be too high, or a weight is not finite; the last "
                "checkpoint is from before that"
            )
