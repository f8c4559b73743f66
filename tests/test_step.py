"""One optimisation step over real ranks and micro-batches equals one over the whole batch."""

import pytest
import torch
from torch import nn

from config.config import OptimizationConfig, Phase
from data.prompt_embeddings import Batch
from distillation.objective import Objective
from distillation.objectives import velocity
from distillation.trained import Trained
from distributed.process_group import Ranks
from tests.ranks import run_ranks
from tests.test_sharding import ALONE, STEPS, go
from train_distillation import optimization_step

DATA = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
NAMES = ("other", "student")


class TwoNetworks(Objective):
    """A student and another network, each pulled towards the sum of its input."""

    def __init__(self) -> None:
        self.wrapped = {}

    def use(self, wrapped):
        self.wrapped = wrapped

    def schedule(self, step):
        return NAMES

    def loss(self, network, batch, noise):
        x = batch.prompt_embeds
        return (self.wrapped[network](x)[:, 0] - x.sum(1)).square().mean(), {}


def step(ranks: Ranks, micro_batches: int) -> dict:
    """A step on this rank's share of DATA: the gradients' norms, the loss and the weights after it."""
    phase = Phase("toy", 1, 0.1, "constant", 0, {})
    trained = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        trained[name] = Trained(nn.Linear(3, 1), OptimizationConfig(), phase, ranks)
    objective = TwoNetworks()
    objective.use({name: network.wrapped for name, network in trained.items()})
    mine = DATA.chunk(ranks.world_size)[ranks.rank].chunk(micro_batches)
    batches = [Batch(list(range(len(x))), x, None) for x in mine]
    figures, _ = optimization_step(objective, trained, batches, 0, 0, (1,), ranks)
    weights = {name: network.network.weight.detach().tolist() for name, network in trained.items()}
    return {name: value.item() for name, value in figures.items()} | weights


@pytest.fixture(scope="module")
def whole() -> dict:
    return step(Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False), 1)


def test_accumulated_equals_whole(whole):
    got = step(Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False), 4)
    assert got.keys() == whole.keys() == {"loss", "grad_norm", "other_loss", "other_grad_norm", *NAMES}
    for name in ("loss", "grad_norm", "other_loss", "other_grad_norm"):
        assert got[name] == pytest.approx(whole[name], rel=1e-5)
    for name in NAMES:
        assert got[name][0] == pytest.approx(whole[name][0], rel=1e-5)


def test_two_ranks_equal_one_and_each_other(whole):
    first, second = run_ranks(step, 2, 2)
    for name in NAMES:
        assert first[name] == second[name], "every network's gradients travel, the student's and the others'"
        assert first[name][0] == pytest.approx(whole[name][0], rel=1e-5)
    for name in ("grad_norm", "other_grad_norm"):
        assert first[name] == second[name] == pytest.approx(whole[name], rel=1e-5)
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(whole["loss"], rel=1e-5)


def test_an_objective_may_look_at_all_micro_batches_of_a_step_with_noise_of_their_own(
    random_pipeline_dir, tmp_path, monkeypatch
):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fish\n")
    seen, learnt, loss = [], [], velocity.Objective.loss

    def look(self, step, batches, mean):
        seen.append([(batch, noise.latents(1)) for batch, noise in batches])

    def recorded(self, network, batch, noise):
        learnt.append(batch)
        return loss(self, network, batch, noise)

    monkeypatch.setattr(velocity.Objective, "look", look)
    monkeypatch.setattr(velocity.Objective, "loss", recorded)
    flags = ["--objective", "velocity", "--gradient_accumulation_steps", "2", "--no_save_samples"]
    go(ALONE, random_pipeline_dir, tmp_path, "out", *flags)
    assert len(seen) == STEPS and [batch for step in seen for batch, _ in step] == learnt
    noises = torch.stack([noise for step in seen for _, noise in step]).flatten(1)
    assert len(noises.unique(dim=0)) == 2 * STEPS
