"""Distribution matching: the student's pictures as a whole are to be spread as the teacher's are (Yin et al. 2023, DMD;
2024, DMD2, here without its GAN).

The student draws with the sampler and on the grid that ship, up to a random step; only that step has a gradient. What
it has reached, x at level s, is noised on to t' > s. There the teacher's x̂₀ says where right states lie, and that of a
*fake score*, a network which is trained on the student's own states all along, where the student's lie; the difference
is the student's gradient:

    g = (x̂₀_fake − x̂₀_teacher) / mean|x̂₀ − x̂₀_teacher|,    L = ½ ‖x − sg(x − g)‖²                  (DMD, eqs. 7, 8)
    L_fake = w·‖v_φ(x_t', t', c) − v*‖², v* and its weight w from `add_more_noise`

x is the state that the step leads to, at the grid's next level s (`match = "path"`: Luo et al. 2025, TDM; Phased DMD,
2510.27684), or, as DMD2 has it, the step's x̂₀, s = 0 (`match = "picture"`). Both are the same at the last step.
No network is told which step a state is from: at a t' that several steps share, the fake score knows their mixture.
TDM can give each step times of its own instead; Phased DMD trains one after the other.

Each of the teacher's experts has its own fake score, which starts as that expert without guidance. Which one a step
asks is decided first, by its share of all times, then the exit, of those whose states it can score: a first step that
leads to more noise than the low-noise expert sees is trained less often than the others. To train all alike asks the
high-noise expert, with its guidance, twice as often; contrast then ran away (docs/quality.md).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from config.errors import UserError
from config.settings import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, setting
from data.prompt_embeddings import Batch
from distillation import objective
from distillation.objective import Noise, Own, Remark, Work, read_text
from distillation.objectives import trajectory
from models.flow import (
    TimeGrid,
    VelocityField,
    add_more_noise,
    refine_grid,
    shift_time,
    unshift_time,
    velocity_to_x0,
)
from models.scores import fake_scores, remove_fake_adapters
from models.sizes import WanSize
from sampling.ddim import ddim_step, rollout

SCORE_TIMES = (0.02, 0.98)  # before the shift; high noise must be among them
GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, fill [0, 1) evenly
CONTRAST_MEMORY = 0.5  # share of what was seen before, in the running mean


@dataclass(frozen=True)
class Settings:
    match: str = setting("path", "what is matched: the path's states, or pictures", choices=("path", "picture"))
    fake_score: str = setting("lora", "full: a copy of each expert; lora: adapters on them", choices=("full", "lora"))
    fake_lora_rank: int = setting(64, "of the adapters", bound=AT_LEAST_ONE)
    fake_learning_rate: float | None = setting(None, "the fake score's; the student's where left out", bound=POSITIVE)
    fake_updates: int = setting(5, "updates of the fake score for each of the student's", bound=AT_LEAST_ONE)
    fake_warmup_steps: int = setting(0, "steps at the start that train the fake score alone", bound=NOT_NEGATIVE)
    score_shift: float | None = setting(None, "of the score's times; the student's where left out", bound=POSITIVE)
    anchor_weight: float = setting(0.0, "of trajectory's loss beside it, against loss of diversity", bound=NOT_NEGATIVE)
    anchor_substeps: int = setting(
        4, "teacher steps for each of the student's, in the anchor and in looks at contrast", bound=AT_LEAST_ONE
    )
    contrast_every: int = setting(20, "steps between two looks at the contrast", bound=AT_LEAST_ONE)
    contrast_warning: float = setting(
        0.05, "drift of contrast away from the teacher's that is warned of", bound=POSITIVE
    )
    contrast_stop: float = setting(0.15, "drift of contrast that ends the phase", bound=POSITIVE)


class Objective(objective.Objective):
    """Cost: one guided forward a prompt for an update of the student, and about (K + 1) / 2 of the student for each
    update of student or fake score, K being the student's steps; the anchor costs what trajectory does, and so does a
    look at contrast."""

    def __init__(self, setup: objective.Setup, settings: Settings) -> None:
        super().__init__(setup, settings)
        self.shift = settings.score_shift or setup.shift
        # The noise levels that the student's steps lead to, as far as they are matched.
        self.levels = setup.grid.sigmas[1:] if settings.match == "path" else (0.0,) * len(setup.grid)
        self._networks = fake_scores(setup.teacher, settings.fake_score, settings.fake_lora_rank)
        self.fakes: dict[str, VelocityField] = {}
        self.anchor = None
        if settings.anchor_weight:
            self.anchor = trajectory.Objective(setup, trajectory.Settings(teacher_substeps=settings.anchor_substeps))
        self.look_grid = refine_grid(setup.grid, settings.anchor_substeps, setup.shift)
        self._contrast: list[float] = []  # of the student as a share of the teacher's: at first, and of late

    # ---- what is trained, and when

    trains_experts = True

    def networks(self) -> dict[str, nn.Module]:
        return self._networks

    @staticmethod
    def check(settings: Settings, student_steps: int, steps: int) -> None:
        if settings.fake_warmup_steps >= steps:
            raise UserError(
                f"fake_warmup_steps {settings.fake_warmup_steps}: the phase's {steps} steps would leave the student as "
                f"it is; accepted: 0 to {steps - 1}"
            )
        if settings.contrast_warning > settings.contrast_stop:
            raise UserError(
                f"contrast_warning {settings.contrast_warning:g}: beyond contrast_stop {settings.contrast_stop:g}, "
                "which ends the phase; accepted: up to that"
            )

    @staticmethod
    def work(settings: Settings, student_steps: int) -> Work:
        fakes, before = settings.fake_updates, (student_steps - 1) / 2  # about: two experts share exits unevenly
        anchor = student_steps if settings.anchor_weight else 0
        looked = student_steps / settings.contrast_every
        return Work(
            trained=1 + anchor,
            at_once=1 + anchor,
            guided=1 + (anchor + looked) * settings.anchor_substeps,
            drawn=before + fakes * (before + 1) + looked,
            fake=1,
            fake_trained=fakes,
            fake_updates=fakes,
        )

    @staticmethod
    def own_parameters(settings: Settings, student: int, experts: list[WanSize]) -> Own:
        if settings.fake_score == "full":
            return Own(trained=sum(expert.parameters for expert in experts))
        return Own(trained=sum(expert.adapters(settings.fake_lora_rank) for expert in experts), adapters=True)

    @staticmethod
    def state_settings(settings: Settings) -> dict:
        rank = {"fake_lora_rank": settings.fake_lora_rank} if settings.fake_score == "lora" else {}
        return {"fake_score": settings.fake_score} | rank

    def close(self) -> None:
        remove_fake_adapters(self.setup.teacher)

    def use(self, wrapped: dict[str, nn.Module]) -> None:
        for (name, network), expert in zip(wrapped.items(), self.setup.teacher.experts, strict=True):
            # Adapters live on the expert, which takes its own dtype; a copy is in float32.
            dtype = expert.field.dtype if self.settings.fake_score == "lora" else torch.float32
            self.fakes[name] = self.setup.as_field(network, dtype)

    def learning_rate(self, network: str, phase_rate: float) -> float:
        return self.settings.fake_learning_rate or phase_rate

    def schedule(self, step: int) -> tuple[str, ...]:
        fake = (list(self._networks)[self._expert_at(step)],) * self.settings.fake_updates
        warms_up = step - self.setup.first_step < self.settings.fake_warmup_steps
        return fake if warms_up else (*fake, "student")

    def steps_without_student(self) -> int:
        return self.settings.fake_warmup_steps

    def _expert_at(self, step: int) -> int:
        """Whose times a step scores at: each expert as often as its share of the times. All ranks choose alike."""
        u = SCORE_TIMES[0] + (SCORE_TIMES[1] - SCORE_TIMES[0]) * (step * GOLDEN_RATIO % 1.0)
        return self.setup.teacher.in_charge(shift_time(u, self.shift))

    def _exits(self, expert: int) -> list[int]:
        """The student's steps whose states an expert can score: not those that lead to more noise than it sees."""
        ranges = [self._score_range(expert, level) for level in self.levels]
        return [k for k, (low, high) in enumerate(ranges) if low < high]

    def _score_range(self, expert: int, level: float) -> tuple[float, float]:
        """Where an expert scores states of a level: from and to, before the shift. Empty where from >= to."""
        experts = self.setup.teacher.experts
        low, high = experts[expert].t_min, experts[expert - 1].t_min if expert else 1.0
        lowest = unshift_time(level, self.shift) + SCORE_TIMES[0]
        return max(unshift_time(low, self.shift), lowest), min(unshift_time(high, self.shift), SCORE_TIMES[1])

    # ---- losses

    def loss(self, network: str, batch: Batch, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        start = noise.latents(len(batch.prompt_indices))
        text, expert = read_text(batch, start), self._expert_at(noise.step)
        exits = self._exits(expert)
        k = exits[noise.choice_alike(len(exits))]
        low, high = self._score_range(expert, self.levels[k])
        t = shift_time(low + (high - low) * noise.uniform(len(start)), self.shift)  # (B,)
        x, x0 = self._draw(start, text, k, with_grad=network == "student")
        x_t, v, weight = add_more_noise(x.detach(), noise.latents(len(x)), self.levels[k], t)
        if network != "student":
            return (weight * (self.fakes[network](x_t, t, text) - v).square()).mean(), {}
        direction = self.direction(x0.detach(), x_t, t, text, expert)
        loss = 0.5 * F.mse_loss(x, x.detach() - direction)
        figures = {"dmd_gradient": direction.abs().mean()}
        if self.anchor:
            anchor, _ = self.anchor.loss("student", batch, noise)
            loss, figures["anchor"] = loss + self.settings.anchor_weight * anchor, anchor.detach()
        return loss, figures

    def _draw(self, start: torch.Tensor, text: torch.Tensor, k: int, with_grad: bool) -> tuple[torch.Tensor, ...]:
        """What the student's k-th step leads to, and its x̂₀, both (B, C, 1, H, W). That step alone has a gradient."""
        sigmas, times = self.setup.grid.sigmas, self.setup.grid.times
        with torch.no_grad():
            x = rollout(self.setup.student, start, TimeGrid(sigmas[: k + 1], times[:k]), text).latents
        with torch.set_grad_enabled(with_grad):
            v = self.setup.student(x, times[k], text)
            return ddim_step(x, v, sigmas[k], self.levels[k]), velocity_to_x0(x, v, sigmas[k])

    @torch.no_grad()
    def direction(
        self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, expert: int
    ) -> torch.Tensor:
        """g: where the student's state should move away from, normalised per sample, (B, C, 1, H, W)."""
        fake = list(self.fakes.values())[expert]
        x0_fake = velocity_to_x0(x_t, fake(x_t, t, text), t)
        # That expert, and no other where t is rounded across the boundary: all ranks run the same ones.
        x0_teacher = velocity_to_x0(x_t, self.setup.teacher(x_t, t, text, expert), t)
        scale = (x0 - x0_teacher).abs().mean((1, 2, 3, 4), keepdim=True)
        return (x0_fake - x0_teacher) / scale.clamp(min=1e-8)

    def state_dict(self) -> dict:
        return {"contrast": self._contrast}

    def load_state_dict(self, state: dict) -> None:
        self._contrast = state["contrast"]

    # ---- when to stop

    @torch.no_grad()
    def look(self, step: int, batches: Iterable[tuple[Batch, Noise]], mean) -> Remark | None:
        """Late in dmd contrast tends to rise: the student's is compared with the teacher's now and then, and what
        counts is how far it has left what lies between where this phase found it and the teacher's."""
        done = step - self.setup.first_step - self.settings.fake_warmup_steps  # of the student's own steps
        if done < 1 or (done - 1) % self.settings.contrast_every:
            return None
        fields = ((self.setup.student, self.setup.grid), (self.setup.teacher, self.look_grid))
        spreads = []
        for batch, noise in batches:
            start = noise.latents(len(batch.prompt_indices))
            text = read_text(batch, start)
            latents = [rollout(field, start, grid, text).latents for field, grid in fields]
            spreads.append(torch.stack([each.std((1, 2, 3, 4)).mean() for each in latents]))  # (2,)
        student, teacher = mean(torch.stack(spreads).mean(0)).tolist()
        if not math.isfinite(student / teacher):  # would stay in the running mean
            return None
        if not self._contrast:
            self._contrast = [student / teacher] * 2
        first, before = self._contrast
        now = CONTRAST_MEMORY * before + (1 - CONTRAST_MEMORY) * student / teacher
        self._contrast = [first, now]
        drift = max(now - max(first, 1.0), min(first, 1.0) - now)
        if drift <= self.settings.contrast_warning:
            return None
        words = f"step {step}: contrast is {now:.0%} of the teacher's, it was {first:.0%} when dmd began"
        ends = drift > self.settings.contrast_stop
        return Remark(f"{words}: dmd ends here" if ends else words, ends)
