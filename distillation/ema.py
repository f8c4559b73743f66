"""An exponential moving average of a network's weights, kept beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """ema ← d·ema + (1 − d)·weights, with d rising to `decay` as (1 + n) / (10 + n) over the first n updates."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._live = [p for p in network.parameters() if p.requires_grad]  # whole, or a slice each
        self.weights = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.weights, [p.detach() for p in self._live], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network holds the averaged weights; the trained ones come back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # In place: a sharded network gathers its weights from where they are.
        for live, average in zip(self._live, self.weights, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "weights": self.weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for average, weights in zip(self.weights, state["weights"], strict=True):
            average.copy_(weights)
