"""Finite jumps on the student's own grid: L = d(v_θ(x_k, t_k, c), (x_k − x_{k+1}) / (t_k − t_{k+1})).

From x_k to x_{k+1} leads the teacher, in several guided steps; the student learns to land there in one Euler step.
The x_k lie on one trajectory of the teacher from noise (Salimans & Ho 2022, in a single round), or, with
`states = "student"`, on the student's own: it learns at the states that it will meet, and to make up for its earlier
errors (as π-Flow imitates its teacher, Chen et al. 2025).

Progressive distillation in several rounds is a phase a round: `jumps = 16`, then `jumps = 8` and so on with
`teach = "student"` and `teacher_substeps = 2`: a copy of the student as the phase finds it, in the teacher's place, and
two of its jumps for each new one.
"""

import math
from dataclasses import dataclass

import torch

from config.errors import UserError
from config.settings import AT_LEAST_ONE, NOT_NEGATIVE, SCHEDULE_OR_NONE, setting
from data.prompt_embeddings import Batch
from distillation import objective
from distillation.objective import Deck, Noise, Own, Work, check_updates, distance, read_text
from models.flow import TimeGrid, few_step_grid, on_device, refine_grid
from models.sizes import WanSize
from sampling.ddim import rollout


@dataclass(frozen=True)
class Settings:
    teacher_substeps: int = setting(4, "teacher steps for each of the student's", bound=AT_LEAST_ONE)
    states: str = setting("teacher", "whose rollouts the states are from", choices=("teacher", "student"))
    teach: str = setting(
        "teacher", "who shows the jumps; student: a copy as of the phase's start", choices=("teacher", "student")
    )
    jumps: int = setting(0, "steps of the grid that this phase trains on; 0: the student's own", bound=SCHEDULE_OR_NONE)
    updates_per_rollout: int = setting(
        1, "optimizer updates that share a rollout's states between them", bound=AT_LEAST_ONE
    )
    rollout_passes: int = setting(1, "times that all of a rollout's states are learnt from", bound=AT_LEAST_ONE)
    huber_c: float = setting(0.0, "pseudo-Huber's c; 0 for squared error", bound=NOT_NEGATIVE)


class Objective(objective.Objective):
    """Cost: `teacher_substeps` × jumps guided forwards a prompt, for one training pair a jump."""

    def __init__(self, setup: objective.Setup, settings: Settings) -> None:
        super().__init__(setup, settings)
        self.grid = few_step_grid(settings.jumps, setup.shift) if settings.jumps else setup.grid
        self.fine_grid = refine_grid(self.grid, settings.teacher_substeps, setup.shift)
        self.deck = Deck(settings.updates_per_rollout, settings.rollout_passes)
        self._copy, self.guide = setup.frozen_student() if settings.teach == "student" else (None, setup.teacher)

    @staticmethod
    def check(settings: Settings, student_steps: int, steps: int) -> None:
        if settings.jumps % student_steps:
            raise UserError(
                f"jumps {settings.jumps}: the student draws in {student_steps} steps; accepted are multiples of that"
            )
        check_updates(settings.updates_per_rollout, settings.jumps or student_steps, "jumps")
        if settings.teach == "student" and settings.teacher_substeps == 1:
            raise UserError(
                'teacher_substeps 1: with teach = "student", a jump of one step teaches nothing; accepted: 2 or more'
            )

    @staticmethod
    def work(settings: Settings, student_steps: int) -> Work:
        jumps, updates = settings.jumps or student_steps, settings.updates_per_rollout
        shown, by_teacher = jumps * settings.teacher_substeps, settings.teach == "teacher"
        return Work(
            trained=jumps * settings.rollout_passes,
            at_once=math.ceil(jumps / updates),
            guided=shown if by_teacher else 0,
            drawn=(0 if by_teacher else shown) + (jumps if settings.states == "student" else 0),
            updates=updates * settings.rollout_passes,
        )

    @staticmethod
    def own_parameters(settings: Settings, student: int, experts: list[WanSize]) -> Own:
        return Own(frozen=student if settings.teach == "student" else 0)

    @staticmethod
    def state_settings(settings: Settings) -> dict:
        return {"teach": settings.teach}

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student",) * (self.settings.updates_per_rollout * self.settings.rollout_passes)

    def loss(self, network: str, batch: Batch, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        k, x_k, text, target = self.deck.deal(noise, lambda: self._pairs(batch, noise))
        v = self.setup.student(x_k, on_device(self.grid.times, x_k.device, x_k.dtype)[k], text)
        errors = (v - target).detach().square().mean((1, 2, 3, 4))  # (n,)
        return distance(v, target, self.settings.huber_c), self._by_step(errors, k, len(batch.prompt_indices))

    def state_dict(self) -> dict:
        return {"guide": self._copy.state_dict()} if self._copy else {}

    def load_state_dict(self, state: dict) -> None:
        if self._copy:
            self._copy.load_state_dict(state["guide"])

    def _by_step(self, errors: torch.Tensor, k: torch.Tensor, prompts: int) -> dict[str, torch.Tensor]:
        """The error of each of the grid's steps, such that the mean over all updates that share a rollout is that over
        all its prompts: a single share may have much of one step, and none of another."""
        of_step = k == torch.arange(len(self.grid), device=k.device)[:, None]  # (K, n)
        sums = (of_step * errors).sum(1) * (self.settings.updates_per_rollout / prompts)
        return {f"loss_step_{i}": each for i, each in enumerate(sums)}

    @torch.no_grad()
    def _pairs(self, batch: Batch, noise: Noise) -> tuple[torch.Tensor, ...]:
        """All jumps of a rollout of K steps: their numbers, states, texts and velocities, each (K·B, …)."""
        start = noise.latents(len(batch.prompt_indices))
        text, jumps = read_text(batch, start), len(self.grid)
        find = self._along_own if self.settings.states == "student" else self._along_teacher
        states, targets = find(start, text)
        numbers = torch.arange(jumps, device=start.device).repeat_interleave(len(start))
        return numbers, states, text.repeat(jumps, 1, 1), targets

    @torch.no_grad()
    def _along_teacher(self, start: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States at the grid's levels and the constant velocities between them, both (K·B, C, 1, H, W)."""
        states = rollout(self.guide, start, self.fine_grid, text).states[:: self.settings.teacher_substeps]
        sigmas = self.grid.sigmas
        jumps = [(states[k] - states[k + 1]) / (sigmas[k] - sigmas[k + 1]) for k in range(len(self.grid))]
        return torch.cat(states[:-1]), torch.cat(jumps)

    @torch.no_grad()
    def _along_own(self, start: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at the states of the student's rollout: from each of them the teacher leads on to the next level."""
        states = rollout(self.setup.student, start, self.grid, text).states[:-1]
        jumps, n = [], self.settings.teacher_substeps
        for k, x in enumerate(states):
            part = TimeGrid(self.fine_grid.sigmas[k * n : (k + 1) * n + 1], self.fine_grid.times[k * n : (k + 1) * n])
            jumps.append((x - rollout(self.guide, x, part, text).latents) / (part.sigmas[0] - part.sigmas[-1]))
        return torch.cat(states), torch.cat(jumps)
