"""The flow-matching path, and the grid that the exported scheduler visits."""

import math

import pytest
import torch

from models.flow import (
    add_noise,
    few_step_grid,
    few_step_scheduler,
    refine_grid,
    shift_time,
    velocity_to_noise,
    velocity_to_x0,
)
from sampling.ddim import ddim_step


def invert_shift(t: float, shift: float) -> float:
    """u for which the shifted time is t, by bisection: no formula to get wrong twice."""
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        low, high = (u, high) if shift * u / (1 + (shift - 1) * u) < t else (low, u)
    return low


def test_conversions_undo_add_noise():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 1, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t, v = add_noise(x0, noise, t), noise - x0
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[4], noise[4])
    torch.testing.assert_close(x_t[3], 0.1 * x0[3] + 0.9 * noise[3], rtol=0, atol=1e-15)
    torch.testing.assert_close(velocity_to_x0(x_t, v, t), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(velocity_to_noise(x_t, v, t), noise, rtol=0, atol=1e-14)


def test_one_time_for_all_equals_one_a_sample():
    x0, noise = torch.randn(2, 3, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = torch.full((3,), 0.3, dtype=torch.float64)
    for function in (add_noise, velocity_to_x0, velocity_to_noise):
        assert torch.equal(function(x0, noise, 0.3), function(x0, noise, each))


def test_shift_of_published_grids():
    u = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    for shift, published in {3: [1, 0.9, 0.75, 0.5], 5: [1, 0.9375, 0.8333, 0.625], 12: [1, 0.973, 0.923, 0.8]}.items():
        torch.testing.assert_close(shift_time(u, shift), torch.tensor(published).double(), rtol=0, atol=5e-4)


def test_few_step_grid_of_the_exported_scheduler():
    grid = few_step_grid(4, 3.0)
    assert grid.sigmas == pytest.approx((0.9997, 0.8996, 0.7496, 0.4997, 0.0), abs=5e-5)
    assert [1000 * t for t in grid.times] == pytest.approx([999, 899, 749, 499], abs=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_few_step_grid_has_the_shifted_uniform_levels(shift, num_steps):
    grid = few_step_grid(num_steps, shift)
    assert len(grid) == num_steps and len(grid.sigmas) == num_steps + 1 and grid.sigmas[-1] == 0
    for k, (sigma, t) in enumerate(zip(grid.sigmas, grid.times, strict=False)):
        u = 1 - k / num_steps
        assert sigma == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=2e-3)
        assert math.floor(1000 * sigma + 1e-3) == pytest.approx(1000 * t, abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_refined_grid_keeps_the_coarse_levels_and_is_even_before_the_shift(shift):
    coarse, substeps = few_step_grid(4, shift), 5
    fine = refine_grid(coarse, substeps, shift)
    assert len(fine) == 4 * substeps and fine.times == fine.sigmas[:-1]
    assert fine.sigmas[::substeps] == coarse.sigmas  # the same floats, not close ones
    u = [invert_shift(sigma, shift) for sigma in fine.sigmas]
    for k in range(4):
        gaps = [u[k * substeps + j] - u[k * substeps + j + 1] for j in range(substeps)]
        assert gaps == pytest.approx([(u[k * substeps] - u[(k + 1) * substeps]) / substeps] * substeps, rel=1e-6)
    assert refine_grid(coarse, 1, shift).sigmas == coarse.sigmas


@pytest.mark.parametrize(("num_steps", "shift"), [(4, 3.0), (4, 12.0), (10, 1.0)])
def test_exported_scheduler_steps_as_ddim_does(num_steps, shift):
    scheduler, grid = few_step_scheduler(shift), few_step_grid(num_steps, shift)
    scheduler.set_timesteps(num_steps)

    def velocity(x, t):
        return torch.tanh(2 * x) - 0.7 * torch.sin(3 * x + 5 * t) + x * t

    ours = theirs = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for k, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocity(theirs, timestep / 1000), timestep, theirs, return_dict=False)[0]
        ours = ddim_step(ours, velocity(ours, grid.times[k]), grid.sigmas[k], grid.sigmas[k + 1])
        assert (ours - theirs).abs().max() < 3e-6  # of values around 1; 1e-6 in the mean
    assert (ours - theirs).abs().mean() < 1e-6
