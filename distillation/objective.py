"""What an objective is. Each one is a file in `distillation/objectives/` with a `Settings` and an `Objective`."""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

import distillation.objectives
from config.errors import UserError, nearest
from data.prompt_embeddings import Batch
from models.flow import TimeGrid, VelocityField
from models.folding import fold_text
from models.teacher import Teacher


@dataclass(frozen=True)
class Setup:
    """What every objective works with. `grid` is the one that the student ships with; `shift` shaped it."""

    teacher: Teacher
    student: VelocityField
    grid: TimeGrid
    shift: float


class Noise:
    """All randomness of one loss, from (seed, rank, step, update, micro_step): the same on every run and resume.

    Args:
        update: the how-manieth update of the step this is, counted from 0.
        micro_step: the how-manieth micro-batch of the update.
        latent_shape: (C, 1, H, W).
    """

    def __init__(
        self,
        seed: int,
        rank: int,
        step: int,
        update: int = 0,
        micro_step: int = 0,
        latent_shape: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.update, self.micro_step, self.latent_shape, self.device = update, micro_step, latent_shape, device
        self._generator = torch.Generator(device).manual_seed(mix_seeds(seed, rank, step, update, micro_step))

    def latents(self, batch_size: int) -> Tensor:
        """(B, C, 1, H, W) of Gaussian noise."""
        return torch.randn((batch_size, *self.latent_shape), generator=self._generator, device=self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator, device=self.device)


def mix_seeds(*parts: int) -> int:
    """One 63-bit seed from several numbers, such that neighbours have nothing in common (splitmix64's finalizer)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


class Objective:
    """A loss, and the networks and schedule that go with it. Knows nothing of ranks."""

    def __init__(self, setup: Setup, settings) -> None:
        self.setup, self.settings = setup, settings

    def networks(self) -> dict[str, nn.Module]:
        """Networks trained besides the student."""
        return {}

    @staticmethod
    def check(settings, student_steps: int) -> None:
        """Raises UserError for settings that contradict each other. Called for all phases before weights are loaded."""

    def use(self, wrapped: dict[str, nn.Module]) -> None:
        """Takes `networks()` back as training calls them, wrapped for data parallelism: losses must go through these,
        or gradients stay on their own rank."""

    def schedule(self, step: int) -> tuple[str, ...]:
        """The networks that this step updates, in order; each name is one optimizer update."""
        return ("student",)

    def loss(self, network: str, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to step `network` on, and figures for the log (tensors: they're read only when a row is written)."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after the step's updates."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def objective_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(distillation.objectives.__path__))


def settings_of(name: str) -> type:
    """The `Settings` dataclass of an objective. Raises UserError for a name that has no file: it says what is accepted,
    and leaves to the caller where the name was given."""
    if name not in objective_names():
        accepted = ", ".join(objective_names())
        raise UserError(f"expected one of {accepted}{nearest(name, objective_names())}")
    return _file_of(name).Settings


def check_objective(name: str, settings: dict, student_steps: int) -> None:
    """Raises UserError for an objective's settings that contradict each other or the student's steps."""
    file = _file_of(name)
    file.Objective.check(file.Settings(**settings), student_steps)


def build_objective(name: str, setup: Setup, settings: dict) -> Objective:
    file = _file_of(name)
    return file.Objective(setup, file.Settings(**settings))


def _file_of(name: str) -> ModuleType:
    return importlib.import_module(f"distillation.objectives.{name}")


def read_text(batch: Batch, like: Tensor) -> Tensor:
    """A batch's text as networks read it, (B, L + 4, D + 1), on the device of `like`."""
    return fold_text(batch.prompt_embeds.to(like.device).float(), batch.prompt_mask.to(like.device))
