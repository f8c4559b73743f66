"""The flow-matching path as Wan uses it: x_t = (1 − t)·x₀ + t·ε, v = ε − x₀, t in [0, 1], 1 = pure noise."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import DPMSolverMultistepScheduler

# (x_t, t, prompt_embeds) → v. x_t, v: (B, C, 1, H, W); t in [0, 1], one number for all or (B,);
# prompt_embeds: (B, L, D + 1) from `fold_text`. Teacher, student and fake score are all one, so every sampler and
# objective takes any of them.
VelocityField = Callable[[torch.Tensor, float | torch.Tensor, torch.Tensor], torch.Tensor]


def per_sample(t: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A time, or one a sample, shaped to multiply `like`: (B, 1, 1, …), in its dtype and on its device."""
    if not isinstance(t, torch.Tensor):
        t = torch.full((1,), t, dtype=like.dtype, device=like.device)  # filled there: copying would wait for the GPU
    return t.to(like).reshape(-1, *[1] * (like.ndim - 1))


@cache
def on_device(times: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A grid's times or sigmas as a tensor, (K,). Made once, and not to be changed."""
    return to_device(torch.tensor(times, dtype=dtype), device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host's, behind what the GPU still has to do. A plain copy would have the host wait for that."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def unshift_time(t: float, shift: float) -> float:
    """u of `shift_time`."""
    return t / (shift - (shift - 1) * t)


def shift_time(u: torch.Tensor | float, shift: float) -> torch.Tensor | float:
    """t = s·u / (1 + (s − 1)·u): spends more of a uniform grid at high noise when s > 1 (Esser et al. 2024, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """x_t on the straight path from `x0` (t = 0) to `noise` (t = 1)."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def add_more_noise(
    x_s: torch.Tensor, noise: torch.Tensor, s: float, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From a state at level s on to levels t > s, and what a network that knows only x_s learns the velocity from.

    x_t = α·x_s + β·ε with α = (1 − t)/(1 − s), β² = t² − α²·s². With v* = −x_s/(1 − s) + (t − β²)/((1 − t)·β)·ε, which
    is ε − x₀ at s = 0, E[v* | x_t] is the velocity of the x_t's distribution (Phased DMD, 2510.27684).

    The noise that x_s has already cannot be told from ε: v* scatters by s/((1 − s)·β) around what x_t tells, besides
    what is open of x₀, a spread of about 1.

    Returns:
        x_t and v*, (B, C, 1, H, W), and the inverse of v*'s variance, (B, 1, 1, 1, 1): 1 at s = 0.
    """
    t = per_sample(t, x_s)
    alpha = (1 - t) / (1 - s)
    beta = (t.square() - (alpha * s).square()).sqrt()
    velocity = -x_s / (1 - s) + (t - beta.square()) / ((1 - t) * beta) * noise
    return alpha * x_s + beta * noise, velocity, 1 / (1 + (s / ((1 - s) * beta)).square())


def velocity_to_x0(x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """x̂₀ = x_t − t·v."""
    return x_t - per_sample(t, x_t) * v


def velocity_to_noise(x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """ε̂ = x_t + (1 − t)·v."""
    return x_t + (1 - per_sample(t, x_t)) * v


@dataclass(frozen=True)
class TimeGrid:
    """The levels that a sampler visits. Plain numbers: nothing here waits for a GPU.

    sigmas: K + 1 noise levels, falling, the last one 0; a step goes from one to the next.
    times: K values of t that the network is told. A scheduler rounds its timesteps to integers, so they may lie
        up to 0.001 below the sigmas.
    """

    sigmas: tuple[float, ...]
    times: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.times)


def few_step_scheduler(shift: float) -> DPMSolverMultistepScheduler:
    """The scheduler that a student is trained on and exported with.

    `WanPipeline` takes no list of sigmas, so what it draws is decided by the scheduler's own grid. At order 1 this
    one steps as Euler does, and its grid wastes no step: t = 1, .9, .75, .5 for 4 steps at shift 3.
    """
    return DPMSolverMultistepScheduler(
        solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def few_step_grid(num_steps: int, shift: float) -> TimeGrid:
    """The grid that `few_step_scheduler` visits in `num_steps` steps."""
    scheduler = few_step_scheduler(shift)
    scheduler.set_timesteps(num_steps)
    times = (scheduler.timesteps.double() / scheduler.config.num_train_timesteps).tolist()
    return TimeGrid(tuple(scheduler.sigmas.double().tolist()), tuple(times))


def refine_grid(grid: TimeGrid, substeps: int, shift: float) -> TimeGrid:
    """`substeps` steps in place of each of `grid`'s, evenly spread before the shift; its sigmas are all kept.

    For a teacher, which knows any t: it is told the sigmas as they are. So is a student that learns at these states; at
    its own levels that may be up to 0.001 beyond the rounded times which it is told when it draws.
    """
    u = [unshift_time(sigma, shift) for sigma in grid.sigmas]
    sigmas = []
    for k in range(len(grid)):
        sigmas.append(grid.sigmas[k])
        for j in range(1, substeps):
            between = u[k] + (u[k + 1] - u[k]) * j / substeps
            sigmas.append(shift_time(between, shift))
    return TimeGrid((*sigmas, grid.sigmas[-1]), tuple(sigmas))
