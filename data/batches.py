"""A rank's micro-batches, each read from disk while those before it are learnt from."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from data.prompt_embeddings import Batch, PromptEmbeddings
from data.sampler import PromptSampler


class Batches(Iterator[Batch]):
    """What `prompts` draws, as `Batch`es on the host, pinned where they go to a GPU.

    Reading ahead draws nothing: `prompts` is always where training is.

    Args:
        ahead: how many are read before they are asked for.
    """

    def __init__(self, text: PromptEmbeddings, prompts: PromptSampler, device: torch.device, ahead: int = 1) -> None:
        self.text, self.prompts, self.pinned, self.ahead = text, prompts, device.type == "cuda", ahead
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming = deque()

    def __next__(self) -> Batch:
        indices = next(self.prompts)
        batch = self._coming.popleft().result() if self._coming else self._read(indices)
        for i in range(len(self._coming), self.ahead):
            self._coming.append(self._reader.submit(self._read, self.prompts.peek(i)))
        return batch

    def _read(self, indices: list[int]) -> Batch:
        batch = self.text.batch(indices)
        if not self.pinned:
            return batch
        return Batch(batch.prompt_indices, batch.prompt_embeds.pin_memory(), batch.prompt_mask.pin_memory())
