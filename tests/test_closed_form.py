"""Objectives on data whose velocity is known exactly: students must learn the distribution, in float64.

Data is a mixture of Gaussians in one or two dimensions. Its velocity is written out below; at its own parameters it
is the teacher, and with free ones a fake score that can be exactly right. A "picture" is SIDE × SIDE draws of it, each
position for itself: its channels are the dimensions.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from data.prompt_embeddings import Batch
from distillation.objective import Noise, Setup, build_objective, settings_of
from models.flow import TimeGrid, add_more_noise, few_step_grid
from models.folding import fold_text
from models.teacher import Expert, Teacher
from sampling.ddim import rollout

SHIFT, BATCH, SIDE = 3.0, 16, 4
GRID = few_step_grid(4, SHIFT)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def to_points(x: torch.Tensor) -> torch.Tensor:
    """(B, dimensions, 1, H, W) → (B·H·W, dimensions)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def to_pictures(points: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return points.view(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


def each_point(t, like: torch.Tensor) -> torch.Tensor:
    """A time, or one a picture, for each of its points: (B·H·W,)."""
    return torch.as_tensor(t).expand(len(like)).repeat_interleave(like[0, 0].numel())


class Mixture(nn.Module):
    """Σ wᵢ·N(mᵢ, sᵢ²·1) as a velocity field: v(x, t) = E[ε − x₀ | x_t = x]. Also a stand-in for an expert's field."""

    dtype = torch.float64

    def __init__(self, weights, means, stds) -> None:
        super().__init__()
        self.log_weights = nn.Parameter(torch.tensor(weights).log())
        self.means = nn.Parameter(torch.tensor(means))  # (modes, dimensions)
        self.log_stds = nn.Parameter(torch.tensor(stds).log())

    @property
    def transformer(self) -> nn.Module:
        return self

    def log_density(self, x: torch.Tensor, t: torch.Tensor, by_mode: bool = False) -> torch.Tensor:
        """log p_t(x) up to a constant, (B,), or its summands by mode, (B, modes). x: (B, dimensions), t: (B,)."""
        variance = ((1 - t)[:, None] * self.log_stds.exp()).square() + t[:, None].square()
        distance = (x[:, None] - (1 - t)[:, None, None] * self.means).square().sum(-1)
        each = self.log_weights.log_softmax(0) - distance / (2 * variance) - x.shape[1] / 2 * variance.log()
        return each if by_mode else each.logsumexp(1)

    def forward(self, x_t, t, prompt_embeds=None):
        x, t = to_points(x_t), each_point(t, x_t)
        share = self.log_density(x, t, by_mode=True).softmax(1)[..., None]  # of each mode, given x: (B, modes, 1)
        std, far = self.log_stds.exp()[:, None], x[:, None] - (1 - t)[:, None, None] * self.means
        variance = ((1 - t)[:, None, None] * std).square() + t[:, None, None].square()
        x0 = self.means + (1 - t)[:, None, None] * std.square() / variance * far
        noise = t[:, None, None] / variance * far
        return to_pictures((share * (noise - x0)).sum(1), x_t)

    def draw(self, n: int) -> torch.Tensor:
        """(n, dimensions)."""
        with torch.no_grad():
            mode = torch.multinomial(self.log_weights.softmax(0), n, replacement=True)
            return self.means[mode] + self.log_stds.exp()[mode, None] * torch.randn(n, self.means.shape[1])


class Student(nn.Module):
    """A small network of x and t."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        layers = [nn.Linear(dimensions + 8, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU()]
        self.network = nn.Sequential(*layers, nn.Linear(96, dimensions))

    def forward(self, x_t, t, prompt_embeds=None):
        t = each_point(t, x_t)
        waves = torch.cat([f(2**k * math.pi * t / 2)[:, None] for k in range(4) for f in (torch.sin, torch.cos)], 1)
        return to_pictures(self.network(torch.cat([to_points(x_t), waves], 1)), x_t)


LINE = {"weights": [0.3, 0.7], "means": [[-2.0], [1.5]], "stds": [0.3, 0.4]}
PLANE = {"weights": [0.5, 0.3, 0.2], "means": [[0.0, 1.8], [-1.6, -1.0], [1.6, -1.0]], "stds": [0.3, 0.3, 0.3]}


class Taught(nn.Module):
    """An expert that answers exactly, as `data` does. What a fake score copies is a network that has learnt to."""

    dtype = torch.float64

    def __init__(self, data: Mixture) -> None:
        super().__init__()
        self.data, self.means, self.transformer = data, data.means, Student(data.means.shape[1])
        optimizer = torch.optim.Adam(self.transformer.parameters(), lr=4e-3, betas=(0.9, 0.99))
        course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
        for _ in range(800):
            t = torch.rand(256)
            t = SHIFT * t / (1 + (SHIFT - 1) * t)
            x0, noise = data.draw(256), torch.randn(256, data.means.shape[1])
            x_t = (1 - t)[:, None] * x0 + t[:, None] * noise
            v = self.transformer(x_t[:, :, None, None, None], t).flatten(1)
            optimizer.zero_grad()
            (v - (noise - x0)).square().mean().backward()
            optimizer.step()
            course.step()

    def forward(self, x_t, t, prompt_embeds=None):
        return self.data(x_t, t)


def teacher_of(field: nn.Module) -> Teacher:
    return Teacher([Expert(field, 1.0, 0.0)], torch.zeros(1, 4))


def setup_of(mixture: dict, first_step: int = 0) -> tuple[Mixture, Student, Setup]:
    data = Mixture(**mixture)
    student = Student(data.means.shape[1])
    return data, student, Setup(teacher_of(data), student, GRID, SHIFT, student, first_step=first_step)


def batch_of(n: int = BATCH) -> Batch:
    return Batch(list(range(n)), torch.zeros(n, 1, 4), torch.ones(n, 1, dtype=torch.bool))


def noise_of(step: int, update: int, dimensions: int) -> Noise:
    return Noise(0, 0, step, update, latent_shape=(dimensions, 1, SIDE, SIDE))


def train(setup: Setup, name: str, steps: int, rate: float, momentum: float = 0.9, **settings):
    """A phase, as the training loop runs it, its learning rates falling to nothing."""
    objective = build_objective(name, setup, vars(default_settings(name)) | settings)
    networks = {"student": setup.network, **objective.networks()}
    objective.use(objective.networks())
    optimizers = {}
    for key, network in networks.items():
        peak = rate if key == "student" else objective.learning_rate(key, rate)
        optimizers[key] = torch.optim.Adam(network.parameters(), lr=peak, betas=(momentum, 0.99))
    dimensions = setup.teacher.experts[0].field.means.shape[1]
    courses = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers.values()]
    for step in range(setup.first_step, setup.first_step + steps):
        for update, key in enumerate(objective.schedule(step)):
            loss, _ = objective.loss(key, batch_of(), noise_of(step, update, dimensions))
            optimizers[key].zero_grad()
            loss.backward()
            optimizers[key].step()
        objective.after_step(step)
        for course in courses:
            course.step()
    return objective


def default_settings(name: str):
    return settings_of(name)()


@torch.no_grad()
def drawn(field, dimensions: int, grid: TimeGrid = GRID, n: int = 256, sampler: str = "ddim") -> torch.Tensor:
    """The points of n pictures, (n·SIDE², dimensions)."""
    noise = torch.randn(n, dimensions, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    generators = [torch.Generator().manual_seed(i) for i in range(n)] if sampler == "renoise" else None
    return to_points(rollout(field, noise, grid, torch.zeros(n, 5, 5), sampler, generators=generators).latents)


def wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """W₁, exact in one dimension; in two the mean over directions, of equally many samples."""
    angles = torch.arange(8) * math.pi / 8
    directions = torch.stack([angles.cos(), angles.sin()]) if a.shape[1] == 2 else torch.ones(1, 1)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()


def mode_shares(samples: torch.Tensor, data: Mixture) -> torch.Tensor:
    """Share of the samples within 4 standard deviations of each mode."""
    near = torch.cdist(samples, data.means.detach()) < 4 * data.log_stds.detach().exp()
    return near.double().mean(0)


def assert_learnt(field, data: Mixture, within: float, sampler: str = "ddim") -> None:
    samples = drawn(field, data.means.shape[1], sampler=sampler)
    far = wasserstein(samples, data.draw(len(samples)))
    shares, wanted = mode_shares(samples, data), data.log_weights.detach().softmax(0)
    assert far < within, f"W₁ {far:.3f}, shares {shares.tolist()}"
    assert (shares - wanted).abs().max() < 0.05, f"shares {shares.tolist()}, W₁ {far:.3f}"


# ------------------------------------------------------------------------------------------------ the references


@pytest.mark.parametrize("mixture", [LINE, PLANE])
def test_the_exact_velocity_is_that_of_the_density(mixture):
    """∇ log p_t = −(x + (1 − t)·v)/t, by automatic differentiation; and its fine rollout gives the data back."""
    data = Mixture(**mixture)
    t = torch.rand(64) * 0.9 + 0.05
    x = (torch.randn(64, data.means.shape[1]) * 2).requires_grad_()
    (score,) = torch.autograd.grad(data.log_density(x, t).sum(), x)
    v = data(x.detach()[:, :, None, None, None], t).flatten(1)
    torch.testing.assert_close(score, -(x.detach() + (1 - t)[:, None] * v) / t[:, None])
    samples = drawn(data, data.means.shape[1], few_step_grid(200, SHIFT))
    assert wasserstein(samples, data.draw(len(samples))) < 0.05


def test_four_steps_of_the_teacher_are_not_enough():
    """What the students have to beat."""
    for mixture in (LINE, PLANE):
        data = Mixture(**mixture)
        assert wasserstein(drawn(data, data.means.shape[1]), data.draw(4096)) > 0.25


# ------------------------------------------------------------------------------------------------ students


@pytest.mark.parametrize("mixture", [LINE, PLANE])
@pytest.mark.parametrize("states", ["teacher", "student"])
def test_trajectory_learns_the_distribution(mixture, states):
    data, student, setup = setup_of(mixture)
    train(setup, "trajectory", 400, 4e-3, states=states, teacher_substeps=8)
    assert_learnt(student, data, within=0.1)


def test_trajectory_by_halving_learns_the_distribution():
    data, student, setup = setup_of(LINE)
    train(setup, "trajectory", 300, 4e-3, jumps=16, teacher_substeps=2)
    for jumps in (8, 4):
        train(setup, "trajectory", 200, 2e-3, jumps=jumps, teacher_substeps=2, teach="student")
    assert_learnt(student, data, within=0.12)


@pytest.mark.parametrize("mixture, steps, rate", [(LINE, (150, 500), (4e-3, 2e-3)), (PLANE, (300, 600), (8e-3, 8e-3))])
def test_consistency_learns_the_distribution(mixture, steps, rate):
    data, student, setup = setup_of(mixture)
    train(setup, "velocity", steps[0], rate[0])
    train(setup, "consistency", steps[1], rate[1], teacher_substeps=4)
    assert_learnt(student, data, within=0.2, sampler="renoise")


def test_velocity_learns_the_distribution_in_many_steps():
    data, student, setup = setup_of(LINE)
    train(setup, "velocity", 300, 4e-3)
    samples = drawn(student, 1, few_step_grid(32, SHIFT))
    assert wasserstein(samples, data.draw(len(samples))) < 0.12
    assert wasserstein(drawn(student, 1), data.draw(len(samples))) > 0.15  # few are not enough


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the fake score's warm-up
@pytest.mark.parametrize("mixture, within", [(LINE, 0.155), (PLANE, 0.1)])
def test_dmd_learns_the_distribution(mixture, within):
    """From a student that has merely learnt what few steps of the teacher do: W₁ .22 and .17."""
    data = Mixture(**mixture)
    student = Student(data.means.shape[1])
    setup = Setup(teacher_of(Taught(data)), student, GRID, SHIFT, student, lambda network, dtype: network.double())
    train(setup, "trajectory", 200, 4e-3, teacher_substeps=2)
    samples = drawn(student, data.means.shape[1])
    before = wasserstein(samples, data.draw(len(samples)))
    settings = {"fake_score": "full", "fake_learning_rate": 4e-3, "fake_updates": 3, "fake_warmup_steps": 30}
    train(setup, "dmd", 800, 1e-3, momentum=0.0, score_shift=1.0, **settings)
    assert before > 1.35 * within
    assert_learnt(student, data, within)


# ------------------------------------------------------------------------------------------------ single losses


@pytest.mark.parametrize("expert", [0, 1])
def test_dmd_s_direction_is_the_difference_of_the_scores(expert):
    """x̂₀ = (x + t²·∇log p_t(x)) / (1 − t) (Tweedie), the scores by automatic differentiation of the densities; each
    expert of the teacher and its own fake score have others."""
    fields = [Mixture(**PLANE), Mixture([0.2, 0.8], [[1.0, -0.4], [0.3, 0.9]], [0.3, 0.6])]
    fakes = [Mixture([0.5, 0.5], [[0.4, 1.0], [-1.0, 0.3]], [0.5, 0.2]), Mixture([1.0], [[0.1, -0.7]], [0.8])]
    experts = [Expert(field, 1.0, t_min) for field, t_min in zip(fields, (0.875, 0.0), strict=True)]
    setup = Setup(Teacher(experts, torch.zeros(1, 4)), Student(2), GRID, SHIFT)
    objective = build_objective("dmd", setup, vars(default_settings("dmd")) | {"fake_score": "full"})
    objective.use(dict(zip(("fake_score", "fake_score_2"), fakes, strict=True)))
    data, other = fields[expert], fakes[expert]
    x0, x_t, t = torch.randn(16, 2, 1, 1, 1), torch.randn(16, 2, 1, 1, 1), torch.rand(16) * 0.9 + 0.05
    direction = objective.direction(x0, x_t, t, torch.zeros(16, 5, 5), expert).flatten(1)
    x = x_t.flatten(1).requires_grad_()
    scores = [torch.autograd.grad(mixture.log_density(x, t).sum(), x)[0] for mixture in (other, data)]
    factor = (t.square() / (1 - t))[:, None]
    teacher_x0 = (x.detach() + t[:, None].square() * scores[1]) / (1 - t)[:, None]
    scale = (x0.flatten(1) - teacher_x0).abs().mean(1, keepdim=True)
    torch.testing.assert_close(direction, factor * (scores[0] - scores[1]) / scale)


@pytest.mark.parametrize("match", ["path", "picture"])
def test_dmd_s_gradient_is_the_direction(match):
    data, student, setup = setup_of(LINE)
    settings = vars(default_settings("dmd")) | {"fake_score": "full", "match": match}
    objective = build_objective("dmd", setup, settings)
    objective.use(objective.networks())
    objective.direction = lambda x0, *rest: seen.setdefault("g", torch.randn(x0.shape))

    def watched(x_t, t, text):
        v = student(x_t, t, text)
        if v.requires_grad:
            v.retain_grad()
            seen.update(v=v, t=t)
        return v

    objective.setup = Setup(setup.teacher, watched, GRID, SHIFT, student)
    found = set()
    for step in range(12):
        seen = {}
        objective.loss("student", batch_of(8), noise_of(step, 0, 1))[0].backward()
        k = GRID.times.index(seen["t"])
        # x = x_k + (s − t_k)·v, so that dL/dv = −(t_k − s)·g/n.
        way = GRID.sigmas[k] - (GRID.sigmas[k + 1] if match == "path" else 0.0)
        torch.testing.assert_close(seen["v"].grad, -way * seen["g"] / seen["g"].numel())
        found.add(k)
    assert found == {0, 1, 2, 3}


@pytest.mark.parametrize("s", [0.0, 0.5, 0.9])
def test_more_noise_leads_to_the_exact_marginals(s):
    """Of N(m, std²): x_t has the mean and deviation that it has at t, and v* averages to the exact velocity."""
    mean, std, n = 0.8, 0.5, 400_000
    t = torch.full((n,), s + 0.6 * (1 - s))
    x_s = (1 - s) * (mean + std * torch.randn(n, 1, 1, 1, 1)) + s * torch.randn(n, 1, 1, 1, 1)
    x_t, v, weight = add_more_noise(x_s, torch.randn(n, 1, 1, 1, 1), s, t)
    spread = (((1 - t[0]) * std).square() + t[0].square()).sqrt()
    assert abs(x_t.mean() - (1 - t[0]) * mean) < 0.01 and abs(x_t.std() - spread) < 0.01
    exact = Mixture([1.0], [[mean]], [std])(x_t, t).detach()
    residual = (v - exact) * weight.sqrt()
    assert 0.3 < residual.std() < 2
    for moment in (torch.ones_like(x_t), x_t, x_t.square(), x_t.sin()):  # orthogonal to whatever x_t tells
        assert abs((residual * moment).mean()) < 0.01
    if s == 0.0:
        torch.testing.assert_close(
            v * t[0] + x_s * t[0], (x_t - (1 - t[0]) * x_s)
        )  # v* = ε − x₀, t·ε = x_t − (1 − t)·x₀


def test_dmd_s_fake_scores_start_as_the_experts_without_guidance():
    data, _, setup = setup_of(PLANE)
    setup.teacher.experts[0] = Expert(data, 5.0, 0.0)
    objective = build_objective("dmd", setup, vars(default_settings("dmd")) | {"fake_score": "full"})
    (fake,) = objective.networks().values()
    x = torch.randn(8, 2, 1, 1, 1)
    torch.testing.assert_close(fake(x, 0.5), data(x, 0.5), rtol=1e-5, atol=1e-6)  # the copy is in float32
    assert all(p.requires_grad for p in fake.parameters())
    assert not {id(p) for p in fake.parameters()} & {id(p) for p in data.parameters()}


class FlowMap(nn.Module):
    """The exact consistency function of N(mean, std²): f(x, t) = mean + std·(x − (1 − t)·mean)/σ_t, as a velocity."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), std

    def forward(self, x_t, t, prompt_embeds=None):
        t = torch.as_tensor(t).reshape(-1, 1, 1, 1, 1)
        sigma = (((1 - t) * self.std).square() + t.square()).sqrt()
        x0 = self.mean + self.std * (x_t - (1 - t) * self.mean) / sigma
        return torch.where(t > 0, (x_t - x0) / t.clamp(min=1e-9), 0.0)


@pytest.mark.parametrize("states", ["teacher", "student"])
def test_consistency_s_loss_vanishes_on_the_exact_flow_map(states):
    """Its error is that of one Euler step, (Δt)², so that twice as fine a grid leaves a sixteenth of the square."""
    teacher = teacher_of(Mixture([1.0], [[0.8]], [0.5]))

    def loss(student: FlowMap, substeps: int) -> float:
        setup = Setup(teacher, student, GRID, SHIFT, student)
        settings = vars(default_settings("consistency")) | {
            "states": states,
            "teacher_substeps": substeps,
            "huber_c": 0.0,
        }
        return build_objective("consistency", setup, settings).loss("student", batch_of(), noise_of(0, 0, 1))[0].item()

    exact = [loss(FlowMap(0.8, 0.5), n) for n in (16, 32, 64)]
    assert exact[0] < 1e-4 and all(10 < a / b < 22 for a, b in zip(exact[:-1], exact[1:], strict=True)), exact
    assert loss(FlowMap(0.8, 0.9), 64) > 100 * exact[2]


def test_consistency_on_own_pictures_takes_one_exact_step_from_what_it_noised():
    data, n = Mixture(**LINE), 64
    setup = Setup(teacher_of(data), lambda x, t, text: (x - 0.8) / t, GRID, SHIFT)  # whose pictures are all 0.8
    settings = vars(default_settings("consistency")) | {"states": "student", "target_decay": 0.0}
    objective = build_objective("consistency", setup, settings)
    x_t, t, x_s, s, _ = objective._on_own_pictures(batch_of(n), noise_of(0, 0, 1))
    assert set(zip(t.tolist(), s.tolist(), strict=True)) <= set(pairwise(objective.grid.sigmas))
    torch.testing.assert_close(x_s, x_t - (t - s).view(-1, 1, 1, 1, 1) * data(x_t, t))
    levels = t.view(-1, 1, 1, 1, 1)
    assert ((x_t - (1 - levels) * 0.8) / levels).std() == pytest.approx(1, abs=0.03)


class Told(nn.Module):
    """N(m, std²) whose mean is what the text's first number says; 0 for the negative prompt."""

    dtype, std = torch.float64, 0.5

    def forward(self, x_t, t, prompt_embeds):
        mean = prompt_embeds[:, 0, 0].view(-1, 1, 1, 1, 1)
        t = torch.as_tensor(t).reshape(-1, 1, 1, 1, 1)
        far, variance = x_t - (1 - t) * mean, ((1 - t) * self.std).square() + t.square()
        return (t - (1 - t) * self.std**2) / variance * far - mean


@pytest.mark.parametrize("states", ["teacher", "student"])
def test_guidance_jumps_along_the_tilted_gaussian(states):
    """Of Gaussians with one std, guidance w is the Gaussian with mean m_u + w·(m_c − m_u): its flow is known."""
    w, n = 3.0, 8
    teacher = Teacher([Expert(Told(), w, 0.0)], torch.zeros(1, 4))
    settings = vars(default_settings("trajectory")) | {"states": states, "teacher_substeps": 400}
    objective = build_objective("trajectory", Setup(teacher, Told(), GRID, SHIFT), settings)
    embeds = torch.linspace(-1, 1, n).view(n, 1, 1).expand(n, 1, 4)
    text = fold_text(embeds, torch.ones(n, 1, dtype=torch.bool))
    find = objective._along_own if states == "student" else objective._along_teacher
    x, jumps = find(torch.randn(n, 1, 1, 1, 1), text)
    mean = (w * embeds[:, 0, 0]).repeat(4).view(-1, 1, 1, 1, 1)
    high, low = (
        torch.tensor(part).repeat_interleave(n).view(-1, 1, 1, 1, 1) for part in (GRID.sigmas[:-1], GRID.sigmas[1:])
    )
    spread = [(((1 - t) * Told.std).square() + t.square()).sqrt() for t in (high, low)]
    landed = (1 - low) * mean + (x - (1 - high) * mean) * spread[1] / spread[0]  # the exact flow from high to low
    torch.testing.assert_close(x - (high - low) * jumps, landed, atol=5e-3, rtol=0)
