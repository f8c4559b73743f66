"""A rank's micro-batches, each read from disk while those before it are learnt from."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from data.prompt_embeddings import Batch, PromptEmbeddings
from data.sampler import PromptSampler


class Batches(Iterator[Batch]):
    """What `prompts` draws, as `Batch`es.

    Reading ahead draws nothing: `prompts` is always where training is.

    Args:
        ahead: how many are read before they are asked for.
    """

    def __init__(self, text: PromptEmbeddings, prompts: PromptSampler, ahead: int = 1) -> None:
        self.text, self.prompts, self.ahead = text, prompts, ahead
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming = deque()

    def __next__(self) -> Batch:
        indices = next(self.prompts)
        expected, coming = self._coming.popleft() if self._coming else (None, None)
        if expected != indices:  # nothing was read ahead, or `prompts` has been set elsewhere since
            self._coming.clear()
            coming = self._reader.submit(self.text.batch, indices)
        batch = coming.result()
        for i in range(len(self._coming), self.ahead):
            further = self.prompts.peek(i)
            self._coming.append((further, self._reader.submit(self.text.batch, further)))
        return batch
