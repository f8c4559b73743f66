"""The objectives' pairs and jumps against rollouts written out in the test, in float64."""

import math
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import distillation.objectives
from config.errors import UserError
from data.prompt_embeddings import Batch
from distillation.objective import (
    Deck,
    Noise,
    Setup,
    build_objective,
    check_objective,
    distance,
    mix_seeds,
    objective_names,
    settings_of,
    work,
)
from models.flow import few_step_grid
from models.teacher import Expert, Teacher

SHIFT, NUM_STEPS, SUBSTEPS, BATCH, LATENT = 3.0, 4, 3, 3, (2, 1, 2, 2)
GRID = few_step_grid(NUM_STEPS, SHIFT)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def meaning(prompt_embeds: torch.Tensor) -> torch.Tensor:
    """What the toy networks read of a text: its first number, (B, 1, 1, 1, 1)."""
    return prompt_embeds[:, 0, 0].double().view(-1, 1, 1, 1, 1)


class ToyTeacher(nn.Module):
    """A nonlinear velocity that depends on everything, of an unfrozen network, so that a leaking gradient shows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.calls = 0

    def forward(self, x_t, t, prompt_embeds):
        self.calls += len(x_t)
        t = torch.as_tensor(t).reshape(-1, 1, 1, 1, 1)
        return self.scale * torch.tanh(x_t + meaning(prompt_embeds)) - x_t * t + t**2


class RecordingStudent(nn.Module):
    """Answers with noise of its own, and keeps what it was asked and its answer, whose gradient gives the target."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.asked = []

    def forward(self, x_t, t, prompt_embeds):
        v = self.weight * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(len(self.asked)))
        v.retain_grad()
        self.asked.append((x_t, t, meaning(prompt_embeds).flatten(), v))
        return v

    def targets(self, k: int) -> torch.Tensor:
        """From d/dv mean((v − target)²) = 2·(v − target) / n."""
        v = self.asked[k][3]
        return (v - v.grad * v.numel() / 2).detach()


@pytest.fixture
def teacher() -> ToyTeacher:
    return ToyTeacher()


@pytest.fixture
def student() -> RecordingStudent:
    return RecordingStudent()


@pytest.fixture
def batch() -> Batch:
    embeds = torch.arange(1.0, 1 + BATCH).mul(0.25).view(BATCH, 1, 1).expand(BATCH, 4, 5)
    lengths = torch.tensor([[4], [1], [2]])
    return Batch(list(range(BATCH)), embeds, torch.arange(4) < lengths)


def noise_of(update: int = 0, micro_step: int = 0, step: int = 0) -> Noise:
    return Noise(seed=0, rank=0, step=step, update=update, micro_step=micro_step, latent_shape=LATENT)


def fine_levels() -> list[float]:
    """The teacher's levels: evenly spread before the shift between the student's."""
    levels = []
    for high, low in zip(GRID.sigmas[:-1], GRID.sigmas[1:], strict=True):
        u_high, u_low = (s / (SHIFT + s - SHIFT * s) for s in (high, low))
        for j in range(SUBSTEPS):
            u = u_high + (u_low - u_high) * j / SUBSTEPS
            levels.append(SHIFT * u / (1 + (SHIFT - 1) * u))
    return [*levels, 0.0]


@torch.no_grad()
def teacher_states(teacher: ToyTeacher, batch: Batch, noise: Noise) -> list[torch.Tensor]:
    """The teacher's Euler rollout from the noise that `noise` gives first, K·SUBSTEPS + 1 of (B, C, 1, H, W)."""
    states, levels = [noise.latents(BATCH)], fine_levels()
    for high, low in zip(levels[:-1], levels[1:], strict=True):
        states.append(states[-1] + (low - high) * teacher(states[-1], high, batch.prompt_embeds))
    return states


def step_once(objective, batch: Batch, step: int = 0, micro_steps: int = 1) -> list[float]:
    """All updates of one step, each with its micro-batches, as the training loop runs them."""
    losses = []
    for update, network in enumerate(objective.schedule(step)):
        for micro_step in range(micro_steps):
            loss, _ = objective.loss(network, batch, noise_of(update, micro_step, step))
            loss.backward()
            losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------ velocity


@pytest.mark.parametrize("updates", [1, 2, 5, NUM_STEPS * SUBSTEPS])
def test_velocity_uses_every_pair_of_the_teacher_s_rollout_once(teacher, student, batch, updates):
    settings = {"teacher_substeps": SUBSTEPS, "updates_per_rollout": updates}
    objective = build_objective("velocity", Setup(teacher, student, GRID, SHIFT), settings)
    step_once(objective, batch)
    assert len(student.asked) == updates and teacher.calls == len(fine_levels()[:-1]) * BATCH
    x_t, t, text = (torch.cat([asked[i] for asked in student.asked]) for i in range(3))
    target = torch.cat([student.targets(k) for k in range(updates)])
    sizes = [len(asked[0]) for asked in student.asked]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == NUM_STEPS * SUBSTEPS * BATCH
    states = teacher_states(teacher, batch, noise_of())
    found = set()
    for row in range(len(x_t)):
        k = min(range(len(states) - 1), key=lambda k: abs(fine_levels()[k] - t[row].item()))
        b = int((text[row] / 0.25).round()) - 1
        found.add((k, b))
        assert t[row].item() == pytest.approx(fine_levels()[k], abs=1e-12)
        torch.testing.assert_close(x_t[row], states[k][b])
        with torch.no_grad():
            v = teacher(states[k][b : b + 1], fine_levels()[k], batch.prompt_embeds[b : b + 1])[0]
        torch.testing.assert_close(target[row], v)
    assert len(found) == len(x_t)  # every pair, none twice
    assert len(set(t[: len(t) // updates].tolist())) > 1  # shuffled: not a single level an update


def test_velocity_s_loss_is_the_mean_squared_error(teacher, student, batch):
    objective = build_objective("velocity", Setup(teacher, student, GRID, SHIFT), {"teacher_substeps": SUBSTEPS})
    (loss,) = step_once(objective, batch)
    v = student.asked[0][3].detach()
    assert loss == pytest.approx((v - student.targets(0)).square().mean().item(), rel=1e-12)


def test_velocity_keeps_micro_batches_apart(teacher, student, batch):
    settings = {"teacher_substeps": SUBSTEPS, "updates_per_rollout": 2}
    objective = build_objective("velocity", Setup(teacher, student, GRID, SHIFT), settings)
    step_once(objective, batch, micro_steps=2)
    assert len(student.asked) == 4
    for micro_step in range(2):  # asked in the order (update, micro-batch)
        x_t = torch.cat([student.asked[k][0] for k in (micro_step, micro_step + 2)])
        states = torch.cat(teacher_states(teacher, batch, noise_of(micro_step=micro_step))[:-1])
        for values in (x_t, states):
            assert values.shape == (NUM_STEPS * SUBSTEPS * BATCH, *LATENT)
        torch.testing.assert_close(x_t.flatten().sort().values, states.flatten().sort().values)


def test_velocity_refuses_more_updates_than_states():
    settings = {"teacher_substeps": SUBSTEPS, "updates_per_rollout": 12}
    check_objective("velocity", settings, NUM_STEPS, 10)
    with pytest.raises(UserError, match="updates_per_rollout 13.* 12 states"):
        check_objective("velocity", settings | {"updates_per_rollout": 13}, NUM_STEPS, 10)


# ------------------------------------------------------------------------------------------------ trajectory


def test_trajectory_s_targets_jump_along_the_teacher_s_rollout(teacher, student, batch):
    objective = build_objective("trajectory", Setup(teacher, student, GRID, SHIFT), {"teacher_substeps": SUBSTEPS})
    loss, metrics = objective.loss("student", batch, noise_of())
    loss.backward()
    ((x_t, t, text, v),) = student.asked
    shape = (NUM_STEPS, BATCH)
    x_t, t, text, target = x_t.view(*shape, *LATENT), t.view(shape), text.view(shape), student.targets(0)
    target, v = target.view(*shape, *LATENT), v.detach().view(*shape, *LATENT)
    coarse = teacher_states(teacher, batch, noise_of())[::SUBSTEPS]
    for k in range(NUM_STEPS):
        # What the student will be told where it is used: the scheduler's integer timesteps.
        torch.testing.assert_close(1000 * t[k], torch.tensor([999.0, 899.0, 749.0, 499.0])[k].expand(BATCH))
        torch.testing.assert_close(text[k], batch.prompt_embeds[:, 0, 0])
        torch.testing.assert_close(x_t[k], coarse[k])
        # A student that answers with the target lands, by the exported scheduler's Euler step, on the next state.
        landed = x_t[k] + (GRID.sigmas[k + 1] - GRID.sigmas[k]) * target[k]
        torch.testing.assert_close(landed, coarse[k + 1])
        assert metrics[f"loss_step_{k}"].item() == pytest.approx((v[k] - target[k]).square().mean().item(), rel=1e-10)
    assert loss.item() == pytest.approx((v - target).square().mean().item(), rel=1e-12)
    assert not any(figure.requires_grad for figure in metrics.values())


@pytest.mark.parametrize("prompts", [1, BATCH])
def test_trajectory_s_error_of_each_step_is_that_of_all_its_pairs(teacher, student, batch, prompts):
    """Over all updates that share a rollout, some of which lack a step: one prompt's 4 pairs go to 3 updates."""
    batch = Batch(batch.prompt_indices[:prompts], batch.prompt_embeds[:prompts], batch.prompt_mask[:prompts])
    settings = {"teacher_substeps": SUBSTEPS, "updates_per_rollout": 3, "rollout_passes": 2}
    objective = build_objective("trajectory", Setup(teacher, student, GRID, SHIFT), settings)
    told = {f"loss_step_{k}": 0.0 for k in range(NUM_STEPS)}
    errors = {time: [] for time in GRID.times}
    for i, _ in enumerate(updates := objective.schedule(0)):
        loss, figures = objective.loss("student", batch, noise_of(i))
        loss.backward()
        told = {key: total + figures[key].item() / len(updates) for key, total in told.items()}
        x_t, t, _, v = student.asked[i]
        for time, each in zip(t.tolist(), (v - student.targets(i)).detach().square().mean((1, 2, 3, 4)), strict=True):
            errors[time].append(each.item())
    assert all(len(found) == 2 * prompts for found in errors.values())
    assert list(told.values()) == pytest.approx([sum(found) / len(found) for found in errors.values()])


def test_trajectory_of_straight_paths_is_the_velocity_itself(student, batch):
    """Where all data is one point, every path is straight: jumps of any length have v = ε − x₀."""
    point = 0.6

    def straight(x_t, t, prompt_embeds):
        return (x_t - point) / t

    objective = build_objective("trajectory", Setup(straight, student, GRID, SHIFT), {"teacher_substeps": SUBSTEPS})
    objective.loss("student", batch, noise_of())[0].backward()
    # The first level is .9997: what starts as noise there lies on the path to `point` from a little farther out.
    start = noise_of().latents(BATCH)
    torch.testing.assert_close(student.targets(0), ((start - point) / GRID.sigmas[0]).repeat(NUM_STEPS, 1, 1, 1, 1))


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("name", ["velocity", "trajectory"])
def test_gradients_reach_the_student_alone(teacher, student, batch, name):
    objective = build_objective(name, Setup(teacher, student, GRID, SHIFT), {})
    loss, _ = objective.loss("student", batch, noise_of())
    loss.backward()
    assert student.weight.grad.abs() > 0 and teacher.scale.grad is None
    assert not student.asked[0][0].requires_grad
    assert objective.networks() == {} and objective.schedule(0) == ("student",)


@pytest.mark.parametrize("name", ["velocity", "trajectory"])
def test_same_noise_same_loss(teacher, batch, name):
    losses = []
    for step in (3, 3, 4):
        objective = build_objective(name, Setup(teacher, RecordingStudent(), GRID, SHIFT), {})
        losses += step_once(objective, batch, step)
    assert losses[0] == losses[1] != losses[2]


def test_objectives_are_found_by_name():
    assert {"velocity", "trajectory"} <= set(objective_names())
    assert settings_of("velocity")().updates_per_rollout == 1
    with pytest.raises(UserError, match="trajectory.*did you mean 'velocity'"):
        settings_of("velocty")


def test_noise_hangs_on_each_of_its_numbers():
    def draw(**changes):
        numbers = {"seed": 1, "rank": 2, "step": 3, "update": 0, "micro_step": 1} | changes
        noise = Noise(**numbers, latent_shape=LATENT)
        return noise.latents(2), noise.permutation(20)

    (latents, permutation), again = draw(), draw()
    assert latents.shape == (2, *LATENT)
    assert torch.equal(latents, again[0]) and torch.equal(permutation, again[1])
    assert sorted(permutation.tolist()) == list(range(20))
    others = [{"seed": 2}, {"rank": 3}, {"step": 2}, {"update": 1}, {"micro_step": 0}, {"rank": 3, "step": 2}]
    for changes in others:
        other = draw(**changes)
        assert not torch.equal(latents, other[0]) and not torch.equal(permutation, other[1])


def test_noise_is_gaussian_and_fresh_at_every_call():
    noise = Noise(0, 0, 0, latent_shape=(16, 1, 32, 32))
    first, second = noise.latents(1), noise.latents(1)
    n = first.numel()
    assert abs(first.mean()) < 4 / n**0.5 and abs(first.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 4 / n**0.5


def test_seeds_of_neighbours_have_nothing_in_common():
    parts = [(s, r, t, u) for s in range(6) for r in range(6) for t in range(6) for u in range(6)]
    seeds = [mix_seeds(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    flipped = [bin(a ^ b).count("1") for a, b in zip(seeds[:-1], seeds[1:], strict=True)]
    assert 30 < sum(flipped) / len(flipped) < 33  # half of 63 bits
    assert mix_seeds(1, 2) != mix_seeds(2, 1)


def test_a_choice_is_alike_on_all_ranks_and_not_on_all_steps():
    def choices(rank: int, update: int = 0) -> list[int]:
        return [Noise(1, rank, step, update).choice_alike(4) for step in range(40)]

    assert choices(0) == choices(3) != choices(0, update=1)
    assert set(choices(0)) == {0, 1, 2, 3}


def test_uniform_noise_covers_its_range_evenly():
    u = noise_of().uniform(50)
    assert sorted((u * 50).long().tolist()) == list(range(50))
    assert not torch.equal(u, u.sort().values)


@pytest.mark.parametrize("passes", [1, 3])
def test_a_deck_deals_every_pair_once_a_pass(passes):
    deck, drawn = Deck(3, passes), []

    def draw():
        drawn.append(None)
        return torch.arange(10), torch.arange(10) * 2

    hands = [deck.deal(noise_of(update), draw) for update in range(3 * passes)]
    assert len(drawn) == 1 and all(torch.equal(2 * a, b) for a, b in hands)
    dealt = [torch.cat([hand[0] for hand in hands[i : i + 3]]).tolist() for i in range(0, len(hands), 3)]
    assert all(sorted(numbers) == list(range(10)) for numbers in dealt)
    assert len({tuple(numbers) for numbers in dealt}) == passes  # each in an order of its own
    deck.deal(noise_of(0), draw)
    assert len(drawn) == 2


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    zero, near, far = torch.zeros(1), torch.full((1,), 1e-4), torch.full((1,), 10.0)
    assert distance(near, zero, 1e-2).item() == pytest.approx(1e-8 / 2 / 1e-2, rel=1e-3)
    assert distance(far, zero, 1e-2).item() == pytest.approx(10 - 1e-2, rel=1e-5)
    assert distance(far, zero, 0.0).item() == 100


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("trajectory", {"jumps": 6}, "jumps 6.*multiples"),
        ("trajectory", {"teach": "student", "teacher_substeps": 1}, "teacher_substeps 1"),
        ("consistency", {"states": "student", "updates_per_rollout": 2}, "updates_per_rollout 2.* 1 pair"),
        ("consistency", {"updates_per_rollout": 49}, "updates_per_rollout 49.* 48 pair"),
        ("dmd", {"fake_warmup_steps": 10}, "fake_warmup_steps 10.*accepted: 0 to 9"),
        ("dmd", {"contrast_warning": 0.3}, "contrast_warning 0.3.*contrast_stop 0.15"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(name, settings, words):
    with pytest.raises(UserError, match=words):
        check_objective(name, settings, NUM_STEPS, 10)


def teacher_of_experts(*t_mins: float) -> Teacher:
    """One that has networks to copy, and is not asked."""
    fields = [types.SimpleNamespace(transformer=nn.Linear(1, 1), dtype=torch.float64) for _ in t_mins]
    return Teacher([Expert(f, 1.0, t) for f, t in zip(fields, t_mins, strict=True)], torch.zeros(1, 4))


def test_dmd_trains_each_expert_s_fake_score_by_its_share_of_the_times():
    setup = Setup(teacher_of_experts(0.875, 0.0), None, GRID, SHIFT, first_step=100)
    objective = build_objective("dmd", setup, {"fake_score": "full", "fake_updates": 2, "fake_warmup_steps": 3})
    plans = [objective.schedule(step) for step in range(100, 1100)]
    assert all(len(p) == 2 and "student" not in p for p in plans[:3])
    assert all(len(p) == 3 and p[2] == "student" and p[0] == p[1] for p in plans[3:])
    # At shift 3 the boundary .875 lies at u = .7, of scores' u from .02 to .98.
    share = sum(p[0] == "fake_score" for p in plans) / len(plans)
    assert share == pytest.approx((0.98 - 0.7) / 0.96, abs=0.01)
    # Before the shift: .7 is the boundary, .5 the level .75 that the second step leads to.
    for expert, level, expected in [(0, 0.0, (0.7, 0.98)), (1, 0.0, (0.02, 0.7)), (1, 0.75, (0.52, 0.7))]:
        assert objective._score_range(expert, level) == pytest.approx(expected, abs=1e-9)
    assert [objective._exits(expert) for expert in (0, 1)] == [[0, 1, 2, 3], [1, 2, 3]]  # the first leads to t = .9


def test_dmd_leaves_out_steps_behind_which_no_time_is_left():
    """The first of 30 steps leads to u = .999 · 29 / 30 = .965, not .02 below the last score's .98."""
    setup = Setup(teacher_of_experts(0.0), None, few_step_grid(30, SHIFT), SHIFT)
    objective = build_objective("dmd", setup, {"fake_score": "full"})
    assert objective._exits(0) == list(range(1, 30))


@pytest.fixture
def look(monkeypatch):
    """(step, *spreads) → what dmd remarks: a micro-batch each, of pictures with that spread; the teacher's have 1."""
    monkeypatch.setattr("distillation.objectives.dmd.read_text", lambda batch, like: batch.prompt_embeds)

    def drawn(field, start, grid, text):
        wide = text[:, 0, 0] if field is student else torch.ones(len(start))
        return types.SimpleNamespace(latents=wide.view(-1, 1, 1, 1, 1) * start / start.std((1, 2, 3, 4), keepdim=True))

    monkeypatch.setattr("distillation.objectives.dmd.rollout", drawn)
    student = object()
    setup = Setup(teacher_of_experts(0.0), student, GRID, SHIFT)
    settings = {"fake_score": "full", "contrast_every": 2, "contrast_warning": 0.1, "contrast_stop": 0.3}
    objective = build_objective("dmd", setup, settings)

    def look_at(step, *spreads):
        parts = [Batch([0], torch.full((1, 1, 1), s), torch.ones(1, 1, dtype=torch.bool)) for s in spreads]
        return objective.look(step, ((part, noise_of()) for part in parts), lambda tensor: tensor)

    return look_at


def test_dmd_looks_at_the_contrast_of_all_micro_batches(look):
    assert look(1, 0.9, 1.1) is None and look(2, 5.0) is None  # not its turn
    assert look(3, 0.8, 1.2) is None and look(3, 1.0, math.nan) is None
    assert look(5, 1.4, 1.6).words == "step 5: contrast is 125% of the teacher's, it was 100% when dmd began"
    assert look(7, 2.0, 2.0).ends_phase


@pytest.mark.parametrize(
    "first, later, ends", [(0.7, 1.0, None), (0.7, 1.6, False), (0.7, 2.1, True), (1.3, 0.4, False)]
)
def test_dmd_may_bring_contrast_to_the_teacher_s_but_not_beyond(first, later, ends, look):
    """As seen in the running mean, halfway between the two."""
    assert look(1, first) is None
    remark = look(3, later)
    assert (remark and remark.ends_phase) is ends


@pytest.mark.parametrize("updates", [1, 3])
def test_consistency_s_target_keeps_pace_with_updates(updates):
    network = nn.Linear(1, 1, bias=False)
    setup = Setup(None, None, GRID, SHIFT, network=network)
    settings = {"target_decay": 0.9, "updates_per_rollout": updates, "teacher_substeps": 3}
    objective = build_objective("consistency", setup, settings)
    nn.init.zeros_(objective.target.weight)
    nn.init.ones_(network.weight)
    objective.after_step(0)
    assert objective.target.weight.item() == pytest.approx(1 - 0.9**updates)


# ------------------------------------------------------------------------------------------------ a new one


def test_the_objective_that_the_documents_show_is_velocity(teacher, student, batch, tmp_path, monkeypatch):
    """As a user would add it: a file of its own, found by its name, with its settings and its cost."""
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    (shown,) = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    (tmp_path / "shown.py").write_text(shown, encoding="utf-8")
    monkeypatch.setattr(distillation.objectives, "__path__", [*distillation.objectives.__path__, str(tmp_path)])
    assert "shown" in objective_names()
    settings, setup = vars(settings_of("shown")(teacher_substeps=SUBSTEPS)), Setup(teacher, student, GRID, SHIFT)
    (loss,) = step_once(build_objective("shown", setup, settings), batch)
    student.asked.clear()
    (expected,) = step_once(build_objective("velocity", setup, settings), batch)
    assert loss == pytest.approx(expected)
    assert work("shown", settings, NUM_STEPS) == work("velocity", settings, NUM_STEPS)
