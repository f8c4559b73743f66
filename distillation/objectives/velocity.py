"""Guided velocity matching: L = ‖v_θ(x_t, t, c) − v_T(x_t, t, c)‖², on the states of the teacher's own rollouts.

The classic "match the teacher's prediction", done where predictions are asked for: a guided rollout from noise gives
a pair (x_t, v_T) at every step, and none is wasted. It takes guidance out (half the cost) and heals a pruned student;
by itself it does not make one that needs few steps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config.errors import UserError
from config.settings import AT_LEAST_ONE, setting
from data.prompt_embeddings import Batch
from distillation import objective
from distillation.objective import Noise, read_text
from models.flow import refine_grid
from sampling.ddim import rollout


@dataclass(frozen=True)
class Settings:
    teacher_substeps: int = setting(4, "teacher steps for each of the student's", bound=AT_LEAST_ONE)
    updates_per_rollout: int = setting(
        1, "optimizer updates that share a rollout's states between them", bound=AT_LEAST_ONE
    )


class Objective(objective.Objective):
    """Cost: `teacher_substeps` × student steps guided forwards a prompt, for as many training pairs."""

    def __init__(self, setup: objective.Setup, settings: Settings) -> None:
        super().__init__(setup, settings)
        self.grid = refine_grid(setup.grid, settings.teacher_substeps, setup.shift)
        self._pairs: dict[int, list[tuple]] = {}  # by micro-batch: what its rollout left for the step's later updates

    @staticmethod
    def check(settings: Settings, student_steps: int) -> None:
        states = student_steps * settings.teacher_substeps
        if settings.updates_per_rollout > states:
            raise UserError(
                f"updates_per_rollout {settings.updates_per_rollout}: a teacher's rollout has {states} states "
                "(student steps × teacher_substeps), one at least for each update"
            )

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student",) * self.settings.updates_per_rollout

    def loss(self, network: str, batch: Batch, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if noise.update == 0:
            self._pairs[noise.micro_step] = self._draw_pairs(batch, noise)
        x_t, t, prompt_embeds, target = self._pairs[noise.micro_step].pop()
        return F.mse_loss(self.setup.student(x_t, t, prompt_embeds), target), {}

    @torch.no_grad()
    def _draw_pairs(self, batch: Batch, noise: Noise) -> list[tuple]:
        """All pairs of one guided rollout, shuffled and dealt out to the step's updates: (x_t, t, text, v_T) each."""
        start = noise.latents(len(batch.prompt_indices))
        text = read_text(batch, start)
        teacher = rollout(self.setup.teacher, start, self.grid, text)
        n, size = len(self.grid), len(start)
        states, targets = torch.cat(teacher.states[:-1]), torch.cat(teacher.velocities)  # (n·B, C, 1, H, W)
        times = torch.tensor(self.grid.times, device=start.device).repeat_interleave(size)  # (n·B,)
        order = noise.permutation(n * size)
        parts = order.tensor_split(self.settings.updates_per_rollout)
        return [(states[i], times[i], text[i % size], targets[i]) for i in parts]
