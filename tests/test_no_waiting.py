"""The host queues a step's work and goes on: nothing in it needs a number that a GPU would still be computing."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import train_distillation
from data.batches import Batches
from data.sampler import PromptSampler
from distillation.objective import Noise
from models.flow import per_sample
from tests.test_sharding import ALONE, OBJECTIVES, go

ASK = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2")
ON_THE_HOST = {"consistency on its own pictures": {"nonzero"}}  # of times drawn there, which choose the expert
FROM_HOST = ("lift_fresh",)  # a tensor made of Python's numbers, which a GPU would get by a copy that is waited for


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait, if the tensors were a GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in ASK or name in FROM_HOST or by_mask:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def test_operations_that_wait_are_seen():
    with Waits() as waits:
        x = torch.arange(3.0)
        x[x > 1], bool(x.sum()), torch.tensor(2.0)
    assert set(waits.seen) == {"index", "_local_scalar_dense", "lift_fresh"}


def on_host(draw):
    """What is drawn on the host, with a generator of its own: `Waits` does not look at it."""

    def unseen(*args):
        with _disable_current_modes():
            return draw(*args)

    return unseen


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_step_waits_for_the_gpu(name, random_pipeline_dir, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fish\n")
    waits, steps = Waits(), 0
    step_itself = train_distillation.optimization_step

    def step(*args):
        nonlocal steps
        steps += 1
        if steps == 1:  # grids travel to the device once
            return step_itself(*args)
        with waits:
            return step_itself(*args)

    monkeypatch.setattr(train_distillation, "optimization_step", step)
    for choice in ("choice_alike", "spread_over"):
        monkeypatch.setattr(Noise, choice, on_host(getattr(Noise, choice)))
    own = ["--objective", name.split()[0], *OBJECTIVES[name].split(), "--no_save_samples"]
    go(ALONE, random_pipeline_dir, tmp_path, "out", *own)
    assert steps == 5 and not set(waits.seen) - ON_THE_HOST.get(name, set())


def test_plain_numbers_become_tensors_where_they_are_needed():
    like = torch.zeros(2, 3, 1, 1, dtype=torch.float64)
    with Waits() as waits:
        t = per_sample(0.3, like)
    assert t.shape == (1, 1, 1, 1) and t.dtype == like.dtype and t.item() == 0.3 and not waits.seen
    assert per_sample(torch.tensor([0.1, 0.2]), like).shape == (2, 1, 1, 1)


class Text:
    """Embeddings that tell when they are read."""

    def __init__(self) -> None:
        self.read = []

    def batch(self, indices):
        self.read.append(indices)
        return indices


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_are_read_ahead_in_order_and_training_stands_where_it_stood(ahead):
    text, prompts, plain = Text(), PromptSampler(7, 2, 1, 2, seed=3), PromptSampler(7, 2, 1, 2, seed=3)
    batches = Batches(text, prompts, ahead)
    for count in range(1, 9):
        assert next(batches) == next(plain) and prompts.state_dict() == plain.state_dict()
        batches._reader.submit(int).result()  # what was asked for is read by now, without anybody waiting for it
        assert len(text.read) == count + ahead


def test_a_batch_that_cannot_be_read_is_told_when_it_is_asked_for():
    class Broken(Text):
        def batch(self, indices):
            if self.read:
                raise OSError("disk gone")
            return super().batch(indices)

    batches = Batches(Broken(), PromptSampler(4, 2, 0, 1, seed=0))
    next(batches)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_what_was_read_ahead_is_dropped_where_the_prompts_go_on_elsewhere():
    prompts, plain = PromptSampler(7, 2, 0, 1, seed=3), PromptSampler(7, 2, 0, 1, seed=3)
    batches = Batches(Text(), prompts, ahead=2)
    next(batches)
    prompts.load_state_dict({"consumed": 10, "num_prompts": 7})
    plain.load_state_dict({"consumed": 10, "num_prompts": 7})
    assert [next(batches) for _ in range(4)] == [next(plain) for _ in range(4)]
