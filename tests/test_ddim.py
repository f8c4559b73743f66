"""Samplers against Diffusers' Euler scheduler, and against Gaussian data, where everything has a closed form."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.flow import TimeGrid, few_step_grid
from sampling.ddim import ddim_step, rollout

MEAN, STD = 0.7, 0.4  # of the data; the noise has 0 and 1
NO_TEXT = torch.zeros(1)


def nonlinear(x, t, prompt_embeds):
    return torch.tanh(2 * x) - 0.7 * torch.sin(3 * x + 5 * t) + x * t


def gaussian_velocity(x, t, prompt_embeds):
    """E[ε − x₀ | x_t = x] for x₀ ~ N(MEAN, STD²)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    away = (x - (1 - t) * MEAN) / variance
    return t * away - (MEAN + (1 - t) * STD**2 * away)


def gaussian_consistency(x, t, prompt_embeds):
    """The velocity that leads straight to where the Gaussian's flow ends: x₀ = MEAN + STD·(x − mean of x_t) / std."""
    std = math.sqrt((1 - t) ** 2 * STD**2 + t**2)
    return (x - (MEAN + STD * (x - (1 - t) * MEAN) / std)) / t


def even_grid(num_steps: int) -> TimeGrid:
    sigmas = tuple(1 - k / num_steps for k in range(num_steps)) + (0.0,)
    return TimeGrid(sigmas, sigmas[:-1])


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ Diffusers


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_diffusers_euler_scheduler(sampler, shift):
    grid = few_step_grid(6, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=sampler == "renoise")
    scheduler.set_timesteps(sigmas=list(grid.sigmas[:-1]))
    assert scheduler.sigmas.tolist() == pytest.approx(grid.sigmas, abs=1e-7)
    start = draw_noise(1, 4, 1, 4, 4).float()
    theirs, (generator,) = start, seeded(7)
    for t, timestep in zip(grid.times, scheduler.timesteps, strict=True):
        v = nonlinear(theirs, t, NO_TEXT)
        theirs = scheduler.step(v, timestep, theirs, generator=generator, return_dict=False)[0]
    ours = rollout(nonlinear, start, grid, NO_TEXT, sampler, generators=seeded(7)).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ one step


def test_eta_1_draws_from_the_posterior():
    """x_s given x_t and x₀ is Gaussian; its mean and variance, from the covariance of x_s and x_t given x₀."""
    t, s, x0, noise = 0.8, 0.35, 1.3, -0.6
    x_t = (1 - t) * x0 + t * noise
    covariance = (1 - t) / (1 - s) * s**2  # x_t = (1 − t)/(1 − s)·x_s + independent noise
    mean = (1 - s) * x0 + covariance / t**2 * (x_t - (1 - t) * x0)
    std = math.sqrt(s**2 - covariance**2 / t**2)
    for z in (-1.0, 0.0, 2.0):
        tensors = (torch.tensor([value], dtype=torch.float64) for value in (x_t, noise - x0, z))
        x, v, fresh = tensors
        assert ddim_step(x, v, t, s, eta=1.0, noise=fresh).item() == pytest.approx(mean + std * z, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_keeps_the_level_of_noise(eta):
    """From a true x_t (x₀ fixed), x_s has mean (1 − s)·x₀ and standard deviation s."""
    t, s, x0 = 0.9, 0.5, 2.0
    noise, fresh = draw_noise(100_000, seed=0), draw_noise(100_000, seed=1)
    x_s = ddim_step((1 - t) * x0 + t * noise, noise - x0, t, s, eta, fresh)
    assert x_s.mean().item() == pytest.approx((1 - s) * x0, abs=4 * s / math.sqrt(100_000))
    assert x_s.std().item() == pytest.approx(s, rel=4 / math.sqrt(200_000))


def test_the_last_step_is_the_predicted_picture():
    x, v = draw_noise(2, 8)
    for eta in (0.0, 1.0):
        torch.testing.assert_close(ddim_step(x, v, 0.5, 0.0, eta, torch.ones(8).double()), x - 0.5 * v)


# ------------------------------------------------------------------------------------------------ whole rollouts


def test_deterministic_ddim_maps_noise_by_quantiles():
    noise = draw_noise(64, 1, 1, 1, 1)
    errors = []
    for num_steps in (250, 500):
        latents = rollout(gaussian_velocity, noise, even_grid(num_steps), NO_TEXT).latents
        errors.append((latents - (MEAN + STD * noise)).abs().max().item())
    assert errors[0] < 0.01
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)  # Euler's is of first order


@pytest.mark.parametrize(
    ("field", "sampler", "eta", "num_steps"),
    [
        (gaussian_velocity, "ddim", 0.5, 300),
        (gaussian_velocity, "ddim", 1.0, 300),
        (gaussian_consistency, "renoise", 0.0, 4),  # exact for a consistency function, however few the steps
    ],
)
def test_samples_have_the_data_s_mean_and_variance(field, sampler, eta, num_steps):
    n = 160 * 160
    noise = draw_noise(1, 1, 1, 160, 160)
    latents = rollout(field, noise, even_grid(num_steps), NO_TEXT, sampler, eta, seeded(1)).latents
    assert latents.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(n))
    # Four standard errors, and what steps of 1/300 leave over.
    assert latents.std().item() == pytest.approx(STD, rel=4 / math.sqrt(2 * n) + 1 / num_steps * (eta > 0))
    correlation = torch.corrcoef(torch.stack([latents.flatten(), noise.flatten()]))[0, 1].item()
    assert abs(correlation) < 0.9  # fresh noise did come in; without it this is 1


def test_renoise_is_not_eta_1():
    noise = draw_noise(1, 1, 1, 8, 8)
    ends = [
        rollout(gaussian_velocity, noise, even_grid(4), NO_TEXT, sampler, eta, seeded(1)).latents
        for sampler, eta in (("renoise", 0.0), ("ddim", 1.0))
    ]
    assert (ends[0] - ends[1]).abs().max() > 0.05


@pytest.mark.parametrize(("sampler", "eta"), [("renoise", 0.0), ("ddim", 0.5)])
def test_a_sample_depends_on_its_own_generator_alone(sampler, eta):
    noise, grid = draw_noise(3, 2, 1, 4, 4).float(), few_step_grid(4, 3.0)
    together = rollout(nonlinear, noise, grid, NO_TEXT, sampler, eta, seeded(5, 6, 7)).latents
    for i in range(3):
        alone = rollout(nonlinear, noise[i : i + 1], grid, NO_TEXT, sampler, eta, seeded(5 + i)).latents
        torch.testing.assert_close(together[i : i + 1], alone)
    other = rollout(nonlinear, noise, grid, NO_TEXT, sampler, eta, seeded(5, 8, 7)).latents
    assert torch.equal(other[[0, 2]], together[[0, 2]]) and not torch.allclose(other[1], together[1])


def test_trajectory_holds_every_state_and_what_the_network_was_told():
    told = []

    def field(x, t, prompt_embeds):
        told.append((x, t, prompt_embeds))
        return nonlinear(x, t, prompt_embeds)

    noise, grid = draw_noise(2, 1, 1, 2, 2), few_step_grid(4, 3.0)
    trajectory = rollout(field, noise, grid, NO_TEXT)
    assert (
        len(trajectory.states) == 5 and len(trajectory.velocities) == 4 and trajectory.latents is trajectory.states[4]
    )
    assert tuple(t for _, t, _ in told) == grid.times and all(text is NO_TEXT for _, _, text in told)
    for k, (x, t, _) in enumerate(told):
        assert torch.equal(x, trajectory.states[k])
        assert torch.equal(trajectory.velocities[k], nonlinear(x, t, NO_TEXT))


def test_missing_noise_and_unknown_samplers_are_errors():
    noise = draw_noise(1, 1, 1, 2, 2)
    for sampler, eta in (("renoise", 0.0), ("ddim", 0.5)):
        with pytest.raises(ValueError, match="generators"):
            rollout(nonlinear, noise, even_grid(2), NO_TEXT, sampler, eta)
    with pytest.raises(ValueError, match="'euler'.*ddim, renoise"):
        rollout(nonlinear, noise, even_grid(2), NO_TEXT, "euler")
    with pytest.raises(ValueError, match="noise"):
        ddim_step(noise, noise, 0.5, 0.25, eta=1.0)
