"""Consistency: one answer for all states of a path, f_θ(x_t, t) = x_t − t·v_θ(x_t, t, c) = x̂₀.

L = d(f_θ(x_t, t), sg f_θ⁻(x_s, s)), where a single guided step of the teacher leads from x_t to x_s on a fine grid, and
at the path's end f⁻ is x_0 itself. (Song et al. 2023, Alg. 2; with guidance and on latents: Luo et al. 2023.)

Such a student is best drawn with `--sampler renoise`, which asks it for x̂₀ only. Deterministic DDIM works too.
"""

import math
from dataclasses import dataclass

import torch

from config.settings import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, setting
from data.prompt_embeddings import Batch
from distillation import objective
from distillation.objective import Deck, Noise, Own, Work, check_updates, distance, read_text
from models.flow import VelocityField, add_noise, on_device, refine_grid, to_device, velocity_to_x0
from models.sizes import WanSize
from sampling.ddim import rollout


@dataclass(frozen=True)
class Settings:
    teacher_substeps: int = setting(12, "steps of the fine grid for each of the student's", bound=AT_LEAST_ONE)
    states: str = setting(
        "teacher", "teacher: of its rollouts; student: its pictures, noised anew", choices=("teacher", "student")
    )
    updates_per_rollout: int = setting(
        1, "optimizer updates that share a rollout's states between them", bound=AT_LEAST_ONE
    )
    rollout_passes: int = setting(1, "times that all of a rollout's states are learnt from", bound=AT_LEAST_ONE)
    target_decay: float = setting(
        0.95, "an update, of the target, which averages the student's weights; 0: the student itself", bound=BELOW_ONE
    )
    huber_c: float = setting(1e-3, "pseudo-Huber's c; 0 for squared error", bound=NOT_NEGATIVE)


class Objective(objective.Objective):
    """Cost: with the teacher's states `teacher_substeps` × student steps guided forwards a prompt, for as many pairs;
    with the student's, one guided forward and a rollout of the student for the one pair of a prompt."""

    def __init__(self, setup: objective.Setup, settings: Settings) -> None:
        super().__init__(setup, settings)
        self.grid = refine_grid(setup.grid, settings.teacher_substeps, setup.shift)
        self.deck = Deck(settings.updates_per_rollout, settings.rollout_passes)
        self.target: VelocityField = setup.student
        if settings.target_decay:
            self._average, self.target = setup.frozen_student()

    @staticmethod
    def check(settings: Settings, student_steps: int, steps: int) -> None:
        pairs = student_steps * settings.teacher_substeps if settings.states == "teacher" else 1
        check_updates(settings.updates_per_rollout, pairs, "pair(s)")

    @staticmethod
    def work(settings: Settings, student_steps: int) -> Work:
        own, passes = settings.states == "student", settings.rollout_passes
        pairs, updates = 1 if own else student_steps * settings.teacher_substeps, settings.updates_per_rollout
        return Work(
            trained=pairs * passes,
            at_once=math.ceil(pairs / updates),
            guided=pairs,
            drawn=pairs * passes + (student_steps if own else 0),
            updates=updates * passes,
        )

    @staticmethod
    def own_parameters(settings: Settings, student: int, experts: list[WanSize]) -> Own:
        return Own(frozen=student if settings.target_decay else 0)

    @staticmethod
    def state_settings(settings: Settings) -> dict:
        return {"target_decay": "0" if settings.target_decay == 0 else "above 0"}

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student",) * (self.settings.updates_per_rollout * self.settings.rollout_passes)

    def loss(self, network: str, batch: Batch, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        draw = self._on_teacher_paths if self.settings.states == "teacher" else self._on_own_pictures
        x_t, t, x_s, s, text = self.deck.deal(noise, lambda: draw(batch, noise))
        with torch.no_grad():
            answer = velocity_to_x0(x_s, self.target(x_s, s, text), s)  # at s = 0: x_s itself, whatever is answered
        return distance(velocity_to_x0(x_t, self.setup.student(x_t, t, text), t), answer, self.settings.huber_c), {}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.settings.target_decay:
            student = [p.detach() for p in self.setup.network.parameters()]
            decay = self.settings.target_decay ** len(self.schedule(step))  # as if after each of the step's updates
            torch._foreach_lerp_(list(self._average.parameters()), student, 1 - decay)

    def state_dict(self) -> dict:
        return {"average": self._average.state_dict()} if self.settings.target_decay else {}

    def load_state_dict(self, state: dict) -> None:
        if self.settings.target_decay:
            self._average.load_state_dict(state["average"])

    @torch.no_grad()
    def _on_teacher_paths(self, batch: Batch, noise: Noise) -> tuple[torch.Tensor, ...]:
        """All neighbours of one guided rollout of n steps: x_t, t, x_s, s, text, each (n·B, …)."""
        start = noise.latents(len(batch.prompt_indices))
        text, n = read_text(batch, start), len(self.grid)
        states = rollout(self.setup.teacher, start, self.grid, text).states
        levels = on_device((*self.grid.times, 0.0), start.device, start.dtype)
        t, s = (part.repeat_interleave(len(start)) for part in (levels[:-1], levels[1:]))
        return torch.cat(states[:-1]), t, torch.cat(states[1:]), s, text.repeat(n, 1, 1)

    @torch.no_grad()
    def _on_own_pictures(self, batch: Batch, noise: Noise) -> tuple[torch.Tensor, ...]:
        """The student's pictures, noised to a random level of the fine grid, from where the teacher takes one step."""
        start = noise.latents(len(batch.prompt_indices))
        text = read_text(batch, start)
        x0 = rollout(self.setup.student, start, self.setup.grid, text).latents
        # Drawn on the host, they tell the teacher which of its experts to ask without a look at the GPU.
        levels = on_device((*self.grid.times, 0.0), torch.device("cpu"), start.dtype)
        k = noise.spread_over(len(self.grid), len(start))
        t, s = (to_device(levels[i], start.device) for i in (k, k + 1))
        x_t = add_noise(x0, noise.latents(len(start)), t)
        x_s = x_t - (t - s).view(-1, 1, 1, 1, 1) * self.setup.teacher(x_t, levels[k], text)
        return x_t, t, x_s, s, text
