"""Pure samplers: (velocity field, noise, grid of times) → latents. The same ones draw teacher and student."""

import math
from dataclasses import dataclass

import torch

from models.flow import TimeGrid, VelocityField, velocity_to_noise, velocity_to_x0


@dataclass(frozen=True)
class Trajectory:
    """What a rollout saw. `states`: K + 1 latents (B, C, 1, H, W), from noise to picture; `velocities`: K of them."""

    states: list[torch.Tensor]
    velocities: list[torch.Tensor]
    grid: TimeGrid

    @property
    def latents(self) -> torch.Tensor:
        return self.states[-1]


def ddim_step(
    x_t: torch.Tensor, v: torch.Tensor, t: float, s: float, eta: float = 0.0, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """From noise level t to s < t (DDIM, Song et al. 2021, eq. 12, for the path x_t = (1 − t)·x₀ + t·ε).

    With eta = 0 it is x_t + (s − t)·v, an Euler step: for a flow-matching model deterministic DDIM *is* Euler.
    """
    if eta == 0.0 or s == 0.0:
        return x_t + (s - t) * v
    if noise is None:
        raise ValueError(f"eta = {eta} needs fresh noise")
    deviation = eta * (s / t) * math.sqrt(max(t**2 - ((1 - t) / (1 - s) * s) ** 2, 0.0))
    x0, direction = velocity_to_x0(x_t, v, t), velocity_to_noise(x_t, v, t)
    return (1 - s) * x0 + math.sqrt(s**2 - deviation**2) * direction + deviation * noise


def renoise_step(x_t: torch.Tensor, v: torch.Tensor, t: float, s: float, noise: torch.Tensor) -> torch.Tensor:
    """Jump to x̂₀ and noise it afresh to level s: consistency models' multistep sampling. It is not DDIM at eta = 1."""
    return (1 - s) * velocity_to_x0(x_t, v, t) + s * noise


def rollout(
    field: VelocityField,
    noise: torch.Tensor,
    grid: TimeGrid,
    prompt_embeds: torch.Tensor,
    sampler: str = "ddim",
    eta: float = 0.0,
    generators: list[torch.Generator] | None = None,
) -> Trajectory:
    """Follow `field` down `grid` from `noise` (B, C, 1, H, W).

    Args:
        sampler: "ddim" or "renoise".
        eta: DDIM's share of fresh noise, 0 for none to 1.
        generators: one a sample, on the CPU, for the fresh noise of "renoise" and of eta > 0; a sample's noise then
            depends on its own generator alone, not on who shares its batch.
    """
    if sampler not in ("ddim", "renoise"):
        raise ValueError(f"sampler is {sampler!r}; known: ddim, renoise")
    fresh_noise = sampler == "renoise" or eta > 0
    if fresh_noise and generators is None:
        raise ValueError(f"sampler {sampler!r} with eta {eta} draws noise and needs generators")
    states, velocities, x = [noise], [], noise
    for t, sigma, next_sigma in zip(grid.times, grid.sigmas[:-1], grid.sigmas[1:], strict=True):
        v = field(x, t, prompt_embeds)
        z = randn(x.shape[1:], generators).to(x) if fresh_noise and next_sigma > 0 else None
        if sampler == "renoise" and z is not None:
            x = renoise_step(x, v, sigma, next_sigma, z)
        else:
            x = ddim_step(x, v, sigma, next_sigma, eta, z)
        states.append(x)
        velocities.append(v)
    return Trajectory(states, velocities, grid)


def randn(shape: tuple[int, ...], generators: list[torch.Generator]) -> torch.Tensor:
    """(B, *shape) of noise on the CPU, sample b from generator b, as `WanPipeline` draws a single picture's."""
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])
