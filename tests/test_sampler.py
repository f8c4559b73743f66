import itertools

import pytest

from config.errors import UserError
from data.sampler import PromptSampler


def draw(batches, num_prompts=10, batch_size=2, world_size=1, seed=0, state=None):
    """The stream as all ranks together draw it: global batches, one after the other."""
    samplers = [PromptSampler(num_prompts, batch_size, rank, world_size, seed) for rank in range(world_size)]
    for sampler in samplers:
        if state is not None:
            sampler.load_state_dict(state)
    stream = [index for _ in range(batches) for sampler in samplers for index in next(sampler)]
    assert all(sampler.state_dict() == samplers[0].state_dict() for sampler in samplers)
    return stream, samplers[0].state_dict()


@pytest.mark.parametrize(
    ("num_prompts", "batch_size", "world_size"), [(10, 2, 1), (10, 3, 2), (7, 2, 3), (3, 4, 4), (1, 2, 2)]
)
def test_every_epoch_is_a_permutation_whatever_the_split(num_prompts, batch_size, world_size):
    stream, _ = draw(4 * num_prompts, num_prompts, batch_size, world_size)
    epochs = [stream[i : i + num_prompts] for i in range(0, len(stream) - num_prompts + 1, num_prompts)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)
    assert stream == draw(len(stream), num_prompts, 1, 1)[0]


def test_epochs_and_seeds_differ():
    stream, _ = draw(40, num_prompts=40)
    assert stream[:40] != stream[40:]
    assert stream[:40] != list(range(40))
    assert stream != draw(40, num_prompts=40, seed=1)[0]
    assert draw(40, num_prompts=40, seed=-1)[0] not in (stream, draw(40, num_prompts=40, seed=1)[0])


def test_order_stays_as_it_is():
    """Resuming on another machine or with another NumPy goes on in the same order."""
    assert list(itertools.chain(*itertools.islice(PromptSampler(6, 3, 0, 1, seed=42), 4))) == STREAM


STREAM = [4, 1, 3, 0, 2, 5, 1, 2, 5, 3, 0, 4]


@pytest.mark.parametrize(("batch_size", "world_size"), [(2, 2), (1, 3), (4, 1), (5, 4)])
def test_resumes_on_another_number_of_ranks(batch_size, world_size):
    whole, _ = draw(60, num_prompts=11, batch_size=1)
    first, state = draw(4, num_prompts=11, batch_size=2, world_size=2)
    rest, _ = draw(2, num_prompts=11, batch_size=batch_size, world_size=world_size, state=state)
    assert first + rest == whole[: len(first) + len(rest)]


def test_resume_with_other_prompts_is_refused():
    _, state = draw(1, num_prompts=11)
    with pytest.raises(UserError, match="11 prompts and there are 12 now"):
        PromptSampler(12, 2, 0, 1, 0).load_state_dict(state)


@pytest.mark.parametrize("arguments", [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 1, 1)])
def test_impossible_arguments(arguments):
    with pytest.raises(ValueError, match="num_prompts="):
        PromptSampler(*arguments, seed=0)
