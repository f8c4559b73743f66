"""What an objective is. Each one is a file in `distillation/objectives/` with a `Settings` and an `Objective`."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import distillation.objectives
from config.errors import UserError, nearest
from data.prompt_embeddings import Batch
from distributed.sharding import copy_network
from models.flow import TimeGrid, VelocityField, to_device
from models.folding import fold_text
from models.sizes import WanSize
from models.teacher import Teacher


@dataclass(frozen=True)
class Setup:
    """What every objective works with.

    grid: the one that the student ships with; `shift` shaped it.
    network: the student's own, not wrapped: to be copied, never trained through.
    as_field: (network, dtype of its inputs) → its velocity field, in the precision that training computes in.
    dtype: of the student's inputs.
    first_step: of the phase, counted over the whole run.
    """

    teacher: Teacher
    student: VelocityField
    grid: TimeGrid
    shift: float
    network: nn.Module | None = None
    as_field: Callable[[nn.Module, torch.dtype], VelocityField] = lambda network, dtype: network
    dtype: torch.dtype = torch.float32
    first_step: int = 0

    def frozen_student(self) -> tuple[nn.Module, VelocityField]:
        """A copy of the student as it is now, and its velocity field."""
        network = copy_network(self.network).requires_grad_(False).eval()
        return network, self.as_field(network, self.dtype)


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
        self.step, self.update, self.micro_step = step, update, micro_step
        self.latent_shape, self.device = latent_shape, device
        self._generator = torch.Generator(device).manual_seed(mix_seeds(seed, rank, step, update, micro_step))
        self._on_host = torch.Generator().manual_seed(mix_seeds(seed, rank, step, update, micro_step, 1))
        self._alike = torch.Generator().manual_seed(mix_seeds(seed, step, update, micro_step))

    def latents(self, batch_size: int) -> Tensor:
        """(B, C, 1, H, W) of Gaussian noise."""
        return torch.randn((batch_size, *self.latent_shape), generator=self._generator, device=self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator, device=self.device)

    def choice_alike(self, n: int) -> int:
        """One of 0 … n − 1, the same on all ranks: where networks are sharded, all must run the same forwards."""
        return int(torch.randint(n, (), generator=self._alike))

    def uniform(self, n: int) -> Tensor:
        """(n,) evenly spread over [0, 1): one in each nth of it, in random order, which is less noisy than n draws."""
        return _evenly_spread(n, self._generator)

    def spread_over(self, count: int, n: int) -> Tensor:
        """(n,) of 0 … count − 1, evenly spread as `uniform` is, on the host: they decide what is to be done."""
        return (_evenly_spread(n, self._on_host) * count).long().clamp(max=count - 1)


def _evenly_spread(n: int, generator: torch.Generator) -> Tensor:
    about = {"generator": generator, "device": generator.device}
    parts = (torch.rand(n, **about) + torch.arange(n, device=generator.device)) / n
    return parts.clamp(max=1 - 2**-24)[torch.randperm(n, **about)]  # rounding would make 1 of the largest


def mix_seeds(*parts: int) -> int:
    """One 63-bit seed from several numbers, such that neighbours have nothing in common (splitmix64's finalizer)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class Work:
    """What one optimizer step asks of the networks, in latents for each prompt of a micro-batch.

    Forwards with a backward: `trained` of the student, `fake_trained` of the objective's own networks. Without one:
    `guided` of the teacher (each two forwards, in one batch), `drawn` of the student or a copy of it, `fake` of the
    objective's own.
    """

    trained: float
    at_once: float  # of `trained`, in one forward: they decide how much is kept for the backward
    guided: float = 0.0
    drawn: float = 0.0
    fake: float = 0.0
    fake_trained: float = 0.0
    updates: int = 1  # of the student
    fake_updates: int = 0


class Own(NamedTuple):
    """Parameters that an objective holds besides student and teacher, in float32. `adapters`: whether the trained ones
    stand on the teacher's experts."""

    trained: int = 0
    frozen: int = 0
    adapters: bool = False


class Remark(NamedTuple):
    """What an objective has seen, in words for the user."""

    words: str
    ends_phase: bool


class Objective:
    """A loss, and the networks and schedule that go with it. Knows nothing of ranks."""

    trains_experts = False  # whether its networks are the teacher's experts or copies, which must be on the device then

    def __init__(self, setup: Setup, settings) -> None:
        self.setup, self.settings = setup, settings

    def networks(self) -> dict[str, nn.Module]:
        """Networks trained besides the student."""
        return {}

    @staticmethod
    def check(settings, student_steps: int, steps: int) -> None:
        """Raises UserError for settings that contradict each other, the student's steps on its grid, or the `steps` of
        the phase. Called for all phases before weights are loaded."""

    @staticmethod
    def work(settings, student_steps: int) -> Work:
        """What a step costs, from the settings alone."""
        raise NotImplementedError

    @staticmethod
    def own_parameters(settings, student: int, experts: list[WanSize]) -> Own:
        """What the objective holds besides student and teacher, where `student` parameters are trained."""
        return Own()

    @staticmethod
    def state_settings(settings) -> dict:
        """The settings, by name, that `state_dict` and the trained networks depend on: a phase that has begun keeps
        them on resume."""
        return {}

    def use(self, wrapped: dict[str, nn.Module]) -> None:
        """Takes `networks()` back as training calls them, wrapped for data parallelism: losses must go through these,
        or gradients stay on their own rank."""

    def schedule(self, step: int) -> tuple[str, ...]:
        """The networks that this step updates, in order; each name is one optimizer update."""
        return ("student",)

    def learning_rate(self, network: str, phase_rate: float) -> float:
        """The peak learning rate of one of `networks()`; the student's is always the phase's."""
        return phase_rate

    def loss(self, network: str, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to step `network` on, and figures for the log (tensors: they're read only when a row is written)."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after the step's updates."""

    def steps_without_student(self) -> int:
        """How many of the phase's first steps train other networks alone: the student's learning rate waits."""
        return 0

    def look(
        self, step: int, batches: Iterable[tuple[Batch, Noise]], mean: Callable[[Tensor], Tensor]
    ) -> Remark | None:
        """Called after each step: something to say of the student, or the end of the phase.

        Args:
            batches: the step's micro-batches, to look at the student with, each with new noise.
            mean: of a tensor over all ranks, so that all decide alike. If one rank calls it, all must.
        """
        return None

    def close(self) -> None:
        """Called when the phase is over: gives back what the objective has put into the teacher's networks."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class Deck:
    """Training pairs of one rollout, shuffled and dealt out to a step's updates: none is wasted, and in each of the
    `passes` none is seen twice.

    Each micro-batch has its own pairs, drawn when it has none left.
    """

    def __init__(self, updates: int, passes: int = 1) -> None:
        self.updates, self.passes, self._left = updates, passes, {}

    def deal(self, noise: Noise, draw: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """This update's share. `draw` gives the pairs' columns, each (N, …), and is called once a step."""
        if not self._left.get(noise.micro_step):
            columns = draw()
            if self.updates * self.passes == 1:
                return columns
            orders = [noise.permutation(len(columns[0])).tensor_split(self.updates) for _ in range(self.passes)]
            self._left[noise.micro_step] = [(columns, indices) for order in orders for indices in order]
        columns, indices = self._left[noise.micro_step].pop()
        return tuple(column[indices] for column in columns)


def check_updates(updates: int, count: int, what: str) -> None:
    """Raises UserError where a rollout leaves fewer pairs of a prompt than there are updates to share them."""
    if updates > count:
        raise UserError(
            f"updates_per_rollout {updates}: a rollout leaves {count} {what} of a prompt, one at least for each "
            f"update; accepted: 1{f' to {count}' if count > 1 else ''}"
        )


def distance(prediction: Tensor, target: Tensor, huber_c: float) -> Tensor:
    """Mean squared error, or, for c > 0, the mean over all elements of pseudo-Huber √(e² + c²) − c.

    Pseudo-Huber: Song & Dhariwal 2023; elementwise as latent consistency models have it.
    """
    error = prediction - target
    if huber_c == 0.0:
        return error.square().mean()
    return ((error.square() + huber_c**2).sqrt() - huber_c).mean()


def objective_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(distillation.objectives.__path__))


def settings_of(name: str) -> type:
    """The `Settings` dataclass of an objective. Raises UserError for a name that has no file: it says what is accepted,
    and leaves to the caller where the name was given."""
    if name not in objective_names():
        accepted = ", ".join(objective_names())
        raise UserError(f"expected one of {accepted}{nearest(name, objective_names())}")
    return _file_of(name).Settings


def check_objective(name: str, settings: dict, student_steps: int, steps: int) -> None:
    """Raises UserError for an objective's settings that contradict each other, the student's or the phase's steps."""
    file = _file_of(name)
    file.Objective.check(file.Settings(**settings), student_steps, steps)


def trains_experts(name: str) -> bool:
    """Whether an objective trains the teacher's experts, or copies of them."""
    return _file_of(name).Objective.trains_experts


def work(name: str, settings: dict, student_steps: int) -> Work:
    """What a step of an objective asks of the networks."""
    file = _file_of(name)
    return file.Objective.work(file.Settings(**settings), student_steps)


def own_parameters(name: str, settings: dict, student: int, experts: list[WanSize]) -> Own:
    """What an objective holds besides student and teacher."""
    file = _file_of(name)
    return file.Objective.own_parameters(file.Settings(**settings), student, experts)


def state_settings(name: str, settings: dict) -> dict:
    """What must stay as it is within a phase."""
    file = _file_of(name)
    return file.Objective.state_settings(file.Settings(**settings))


def build_objective(name: str, setup: Setup, settings: dict) -> Objective:
    file = _file_of(name)
    return file.Objective(setup, file.Settings(**settings))


def _file_of(name: str) -> ModuleType:
    return importlib.import_module(f"distillation.objectives.{name}")


_texts: WeakKeyDictionary[Batch, Tensor] = WeakKeyDictionary()  # a step may learn from a batch several times


def read_text(batch: Batch, like: Tensor) -> Tensor:
    """A batch's text as networks read it, (B, L + 4, D + 1), on the device of `like`. Not to be changed."""
    if batch not in _texts:
        _texts[batch] = to_device(fold_text(batch.prompt_embeds.float(), batch.prompt_mask), like.device)
    return _texts[batch]
