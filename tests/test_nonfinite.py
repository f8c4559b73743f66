"""Gradients that are not finite: nothing learns from them, on any rank, and somebody is told."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config.config import OptimizationConfig, Phase
from data.prompt_embeddings import Batch
from distillation.objective import Objective
from distillation.trained import Trained
from distributed.process_group import Ranks
from tests.ranks import run_ranks
from train_distillation import Skipped, note_skipped, optimization_step

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False)


class Pull(Objective):
    """Pulls a network towards the sum of its input; `spoilt`: rank → prompt whose loss is not finite."""

    def __init__(self, rank: int, spoilt: dict[int, int]) -> None:
        self.rank, self.spoilt = rank, spoilt

    def use(self, wrapped):
        self.wrapped = wrapped

    def loss(self, network, batch, noise):
        x = torch.tensor(batch.prompt_indices, dtype=torch.float32)[:, None]
        loss = (self.wrapped(x) - x).square().mean()
        return loss * (torch.inf if self.spoilt.get(self.rank) in batch.prompt_indices else 1), {"extra": loss.detach()}


def steps(ranks: Ranks, spoilt: dict[int, int], count: int = 2) -> list[dict]:
    """The same network in `count` steps, the first of which is spoilt."""
    torch.manual_seed(0)
    trained = Trained(nn.Linear(1, 1), OptimizationConfig(), Phase("toy", 5, 0.1, "constant", 0, {}), ranks)
    batches = [Batch([10 * ranks.rank + i], None, None) for i in (1, 2)]
    seen = []
    for step in range(count):
        objective = Pull(ranks.rank, spoilt if step == 0 else {})
        objective.use(trained.wrapped)
        before = trained.network.weight.item()
        figures, skipped = optimization_step(objective, {"student": trained}, batches, 0, step, (1,), ranks)
        change = trained.network.weight.item() - before
        seen.append(
            {"figures": set(figures), "skipped": skipped, "change": change, "gradient": trained.network.weight.grad}
        )
    return seen


def test_a_step_is_skipped_whole_and_the_next_one_learns():
    first, second = steps(ALONE, {0: 2})
    assert first == {"figures": set(), "skipped": [Skipped("student", [2])], "change": 0.0, "gradient": None}
    assert second["figures"] == {"loss", "extra", "grad_norm"} and not second["skipped"] and second["change"]


def test_what_happens_on_one_rank_skips_the_step_on_all():
    (first, then), (other_first, other_then) = run_ranks(steps, 2, {1: 12})
    assert first["skipped"] == [Skipped("student", [])] and other_first["skipped"] == [Skipped("student", [12])]
    assert first["change"] == other_first["change"] == 0.0
    assert then["change"] == other_then["change"] != 0.0


def test_skipped_steps_are_told_counted_and_at_last_too_many():
    said = []
    run = SimpleNamespace(
        step=7,
        plan=SimpleNamespace(prompts=["a cat", "a dog"]),
        config=SimpleNamespace(optimization=OptimizationConfig(max_nonfinite_steps=3)),
        progress=SimpleNamespace(nonfinite_steps=0, say=said.append),
    )
    bad = [Skipped("student", [1])]
    in_a_row = note_skipped(run, bad, note_skipped(run, bad, 0))
    assert in_a_row == 2 and note_skipped(run, [], in_a_row) == 0
    assert "step 7" in said[0] and "'a dog'" in said[0] and "'a cat'" not in said[0] and len(said) == 2
    with pytest.raises(RuntimeError, match="3 steps in a row up to step 7 .*--max_nonfinite_steps"):
        note_skipped(run, bad, in_a_row)
    assert run.progress.nonfinite_steps == 3
