"""Gradients that are not finite: nothing learns from them, on any rank, and somebody is told."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config.config import OptimizationConfig, Phase
from data.prompt_embeddings import Batch
from distillation.nonfinite import NonFinite, Skipped
from distillation.objective import Objective
from distillation.progress import Progress
from distillation.trained import Trained
from distributed.process_group import Ranks
from tests.ranks import run_ranks
from train_distillation import optimization_step

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
        figures, outcome = optimization_step(objective, {"student": trained}, batches, 0, step, (1,), ranks)
        told, skipped = {key for key, value in figures.items() if not value.isnan()}, outcome.send()()
        change = trained.network.weight.item() - before
        seen.append({"figures": told, "skipped": skipped, "change": change, "gradient": trained.network.weight.grad})
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


class Said(SimpleNamespace):
    """An outcome that has arrived already."""

    def send(self):
        return lambda: self.skipped


def test_skipped_steps_are_told_counted_and_at_last_too_many():
    said = []
    progress = SimpleNamespace(nonfinite_steps=0, say=said.append)
    nonfinite = NonFinite(["a cat", "a dog"], 3, progress)
    good, bad = Said(skipped=[]), Said(skipped=[Skipped("student", [1])])
    for step, outcome in enumerate([bad, bad, good, bad, bad, bad], 7):
        nonfinite.add(step, outcome)
        assert progress.nonfinite_steps == [0, 1, 2, 2, 3, 4][step - 7]  # of a step one hears with the next
    assert "step 7:" in said[0] and "'a dog'" in said[0] and "'a cat'" not in said[0] and len(said) == 4
    with pytest.raises(RuntimeError, match="3 steps in a row up to step 12 .*--max_nonfinite_steps"):
        nonfinite.look()
    assert progress.nonfinite_steps == 5


def test_weights_and_moments_stay_where_a_step_is_left_out():
    """Also AdamW's count of its steps, which corrects the moments' bias."""
    trained = Trained(nn.Linear(2, 1), OptimizationConfig(), Phase("toy", 5, 0.1, "constant", 0, {}), ALONE)
    trained.network(torch.ones(1, 2)).sum().backward()
    trained.step()
    before = [t.clone() for t in (*trained.parameters, *tensors(trained.optimizer))]
    (trained.network(torch.ones(1, 2)).sum() * torch.nan).backward()
    norm, updated = trained.step()
    assert not updated and norm.isnan()
    after = [*trained.parameters, *tensors(trained.optimizer)]
    assert len(before) == 2 + 3 * 2 and all(map(torch.equal, before, after))


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [t for state in optimizer.state.values() for t in state.values()]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # within the norm, about it, far beyond
def test_steps_are_those_of_clipped_gradients(scale):
    """Against torch's own clipping and plain AdamW."""
    settings, phase = OptimizationConfig(max_grad_norm=0.5), Phase("toy", 5, 0.1, "constant", 0, {})
    torch.manual_seed(0)
    network, x = nn.Linear(4, 3), scale * torch.randn(5, 4)
    other = copy.deepcopy(network)
    trained = Trained(network, settings, phase, ALONE)
    adamw = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.01, fused=False)
    for _ in range(4):
        network(x).square().sum().backward()
        other(x).square().sum().backward()
        norm, updated = trained.step()
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(other.parameters(), 0.5).item()) and updated
        adamw.step()
        adamw.zero_grad()
        assert all(map(torch.allclose, network.parameters(), other.parameters()))


def test_a_checkpoint_of_another_machine_goes_on_with_this_one_s_adamw():
    """Where it was made, AdamW may not have been the fused one, which knows how to leave out a step."""
    phase = Phase("toy", 5, 0.1, "constant", 0, {})
    there, here = (Trained(nn.Linear(2, 1), OptimizationConfig(), phase, ALONE) for _ in range(2))
    there.network(torch.ones(1, 2)).sum().backward()
    there.step()
    state = copy.deepcopy(there.state_dict(with_weights=True))
    state["param_groups"] = [group | {"fused": None} for group in state["param_groups"]]
    here.load_state_dict(state)
    for trained in (there, here):
        trained.network(torch.ones(1, 2)).sum().backward()
        trained.step()
    assert all(map(torch.equal, here.network.parameters(), there.network.parameters()))


def test_figures_of_skipped_updates_do_not_break_the_row_after_a_resume(tmp_path):
    """The fake score's update was skipped; after the resume another one's turn has come."""

    def progress(folder):
        trackers = SimpleNamespace(log=lambda step, row: None)
        return Progress(folder / "metrics.jsonl", 4, 2, 8, ALONE, trackers)

    before, after = progress(tmp_path), progress(tmp_path)
    one = {"student": SimpleNamespace(learning_rate=0.1)}
    skipped = {"loss": torch.tensor(1.0), "fake_loss": torch.tensor(torch.nan)}
    before.advance(1, 1, 1, "dmd", skipped, one, ends_phase=False)
    after.load_state_dict(before.state_dict(), 1)
    after.advance(2, 1, 1, "dmd", {"loss": torch.tensor(3.0)}, one, ends_phase=False)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["loss"] == 2.0 and "fake_loss" not in row
