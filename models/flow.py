"""The flow-matching path as Wan uses it: x_t = (1 − t)·x₀ + t·ε, v = ε − x₀, t in [0, 1], 1 = pure noise."""

from collections.abc import Callable

import torch

# (x_t, t, prompt_embeds) → v. x_t: (B, C, 1, H, W); t: (B,) in [0, 1]; prompt_embeds: (B, L, D + 1) from `fold_text`.
# Teacher, student and fake score are all one, so every sampler and objective takes any of them.
VelocityField = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def per_sample(t: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A time, or one a sample, shaped to multiply `like`: (B, 1, 1, …), in its dtype and on its device."""
    t = torch.as_tensor(t, dtype=like.dtype, device=like.device)
    return t.reshape(-1, *[1] * (like.ndim - 1))


def shift_time(u: torch.Tensor, shift: float) -> torch.Tensor:
    """t = s·u / (1 + (s − 1)·u): spends more of a uniform grid at high noise when s > 1 (Esser et al. 2024, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """x_t on the straight path from `x0` (t = 0) to `noise` (t = 1)."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_to_x0(x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """x̂₀ = x_t − t·v."""
    return x_t - per_sample(t, x_t) * v


def velocity_to_noise(x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """ε̂ = x_t + (1 − t)·v."""
    return x_t + (1 - per_sample(t, x_t)) * v
