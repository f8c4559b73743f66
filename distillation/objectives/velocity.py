"""Guided velocity matching: L = ‖v_θ(x_t, t, c) − v_T(x_t, t, c)‖², on the states of the teacher's own rollouts.

The classic "match the teacher's prediction", done where predictions are asked for: a guided rollout from noise gives
a pair (x_t, v_T) at every step, and none is wasted. It takes guidance out (half the cost) and heals a pruned student;
by itself it does not make one that needs few steps.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config.settings import AT_LEAST_ONE, setting
from data.prompt_embeddings import Batch
from distillation import objective
from distillation.objective import Deck, Noise, Work, check_updates, read_text
from models.flow import on_device, refine_grid
from sampling.ddim import rollout


@dataclass(frozen=True)
class Settings:
    teacher_substeps: int = setting(4, "teacher steps for each of the student's", bound=AT_LEAST_ONE)
    updates_per_rollout: int = setting(
        1, "optimizer updates that share a rollout's states between them", bound=AT_LEAST_ONE
    )
    rollout_passes: int = setting(1, "times that all of a rollout's states are learnt from", bound=AT_LEAST_ONE)


class Objective(objective.Objective):
    """Cost: `teacher_substeps` × student steps guided forwards a prompt, for as many training pairs."""

    def __init__(self, setup: objective.Setup, settings: Settings) -> None:
        super().__init__(setup, settings)
        self.grid = refine_grid(setup.grid, settings.teacher_substeps, setup.shift)
        self.deck = Deck(settings.updates_per_rollout, settings.rollout_passes)

    @staticmethod
    def check(settings: Settings, student_steps: int, steps: int) -> None:
        check_updates(settings.updates_per_rollout, student_steps * settings.teacher_substeps, "states")

    @staticmethod
    def work(settings: Settings, student_steps: int) -> Work:
        states, updates = student_steps * settings.teacher_substeps, settings.updates_per_rollout
        return Work(
            trained=states * settings.rollout_passes,
            at_once=math.ceil(states / updates),
            guided=states,
            updates=updates * settings.rollout_passes,
        )

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student",) * (self.settings.updates_per_rollout * self.settings.rollout_passes)

    def loss(self, network: str, batch: Batch, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x_t, t, text, target = self.deck.deal(noise, lambda: self._pairs(batch, noise))
        return F.mse_loss(self.setup.student(x_t, t, text), target), {}

    @torch.no_grad()
    def _pairs(self, batch: Batch, noise: Noise) -> tuple[torch.Tensor, ...]:
        """All of one guided rollout's n steps: x_t, t, text, v_T, each (n·B, …)."""
        start = noise.latents(len(batch.prompt_indices))
        text, n = read_text(batch, start), len(self.grid)
        teacher = rollout(self.setup.teacher, start, self.grid, text)
        times = on_device(self.grid.times, start.device, start.dtype).repeat_interleave(len(start))  # (n·B,)
        return torch.cat(teacher.states[:-1]), times, text.repeat(n, 1, 1), torch.cat(teacher.velocities)
