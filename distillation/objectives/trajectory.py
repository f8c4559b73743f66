"""Finite jumps on the student's own grid: L = ‖v_θ(x_k, t_k, c) − (x_k − x_{k+1}) / (t_k − t_{k+1})‖².

The x's lie on one guided teacher trajectory whose fine grid contains the student's, so that one Euler step of the
student lands where several of the teacher's do. (Progressive distillation, Salimans & Ho 2022, in a single round.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config.settings import AT_LEAST_ONE, setting
from data.prompt_embeddings import Batch
from distillation import objective
from distillation.objective import Noise, read_text
from models.flow import refine_grid
from sampling.ddim import rollout


@dataclass(frozen=True)
class Settings:
    teacher_substeps: int = setting(4, "teacher steps for each of the student's", bound=AT_LEAST_ONE)


class Objective(objective.Objective):
    """Cost: `teacher_substeps` × student steps guided forwards a prompt, for one training pair a student step."""

    def __init__(self, setup: objective.Setup, settings: Settings) -> None:
        super().__init__(setup, settings)
        self.grid = refine_grid(setup.grid, settings.teacher_substeps, setup.shift)

    def loss(self, network: str, batch: Batch, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        start = noise.latents(len(batch.prompt_indices))
        text = read_text(batch, start)
        states, targets = self._jumps(start, text)
        times = torch.tensor(self.setup.grid.times, device=start.device).repeat_interleave(len(start))  # (K·B,)
        v = self.setup.student(states, times, text.repeat(len(self.setup.grid), 1, 1))
        errors = (v - targets).square().mean((1, 2, 3, 4)).view(len(self.setup.grid), -1).mean(1)  # (K,)
        return F.mse_loss(v, targets), {f"loss_step_{k}": e.detach() for k, e in enumerate(errors)}

    @torch.no_grad()
    def _jumps(self, start: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States at the student's levels and the constant velocities between them, both (K·B, C, 1, H, W)."""
        states = rollout(self.setup.teacher, start, self.grid, text).states[:: self.settings.teacher_substeps]
        sigmas = self.setup.grid.sigmas
        jumps = [(states[k] - states[k + 1]) / (sigmas[k] - sigmas[k + 1]) for k in range(len(states) - 1)]
        return torch.cat(states[:-1]), torch.cat(jumps)
