"""Endless, resumable, rank-sharded order of prompt indices."""

from collections.abc import Iterator

import numpy as np

from config.errors import UserError


class PromptSampler(Iterator[list[int]]):
    """Draws this rank's micro-batches of prompt indices, without end.

    All ranks walk one stream: a permutation of the prompts for each epoch, one after the other. Each global batch is
    the stream's next batch_size · world_size indices, and a rank takes its contiguous share. So no prompt is dropped,
    none is seen twice within an epoch, by whatever rank, and every rank always has work, however few prompts there are.
    No communication: the order is a function of (seed, epoch) alone.
    """

    def __init__(self, num_prompts: int, batch_size: int, rank: int, world_size: int, seed: int):
        """`batch_size` is one rank's micro-batch."""
        if num_prompts < 1 or batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"{num_prompts=}, {batch_size=}, {rank=}, {world_size=}")
        self.num_prompts, self.batch_size = num_prompts, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.consumed = 0  # prompts drawn so far by all ranks together
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __next__(self) -> list[int]:
        indices = self.peek()
        self.consumed += self.batch_size * self.world_size
        return indices

    def peek(self, further: int = 0) -> list[int]:
        """What the next call will draw, or the one `further` calls behind it."""
        return self._stream(self.consumed + (further * self.world_size + self.rank) * self.batch_size, self.batch_size)

    def _stream(self, start: int, count: int) -> list[int]:
        indices: list[int] = []
        while len(indices) < count:
            epoch, offset = divmod(start + len(indices), self.num_prompts)
            indices += self._order(epoch)[offset : offset + count - len(indices)].tolist()
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation. Sorts raw random bits: NumPy keeps those the same in all versions, shuffles not."""
        if self._cached[0] != epoch:
            seeds = np.random.SeedSequence([self.seed % 2**64, epoch])  # takes no negative numbers
            self._cached = epoch, np.argsort(np.random.PCG64(seeds).random_raw(self.num_prompts), kind="stable")
        return self._cached[1]

    def state_dict(self) -> dict[str, int]:
        """The same on all ranks, and good for another number of ranks or another batch size."""
        return {"consumed": self.consumed, "num_prompts": self.num_prompts}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was taken. Raises UserError when the number of prompts has changed since."""
        if state["num_prompts"] != self.num_prompts:
            raise UserError(
                f"the checkpoint was trained on {state['num_prompts']} prompts and there are {self.num_prompts} now; "
                "resume with the prompt file of the first run"
            )
        self.consumed = state["consumed"]
