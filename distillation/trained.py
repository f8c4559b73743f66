"""A network together with all that trains it."""

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from config.config import OptimizationConfig, Phase
from distributed.process_group import Ranks
from distributed.sharding import wrap


class Trained:
    """A network, its wrapper, optimizer, learning-rate schedule and loss scaler: one each, shared with no other.

    Made anew for each phase, so that a phase starts with its own rates and without the moments of the one before.

    Args:
        learning_rate, steps: of its schedule, where they are not the phase's.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: OptimizationConfig,
        phase: Phase,
        ranks: Ranks,
        wrapped: nn.Module | None = None,
        learning_rate: float | None = None,
        steps: int | None = None,
    ) -> None:
        self.network, self.wrapped = network, wrapped or wrap(network, ranks)
        self.max_grad_norm = settings.max_grad_norm
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=phase.learning_rate if learning_rate is None else learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
            # The default on a GPU, foreach, takes another copy of all weights while it steps.
            fused=ranks.device.type == "cuda" or None,
        )
        self.lr_scheduler = get_scheduler(
            phase.lr_scheduler,
            self.optimizer,
            num_warmup_steps=phase.lr_warmup_steps,
            num_training_steps=steps or phase.steps,
        )
        # Only fp16 needs its losses scaled; disabled, the scaler hands everything through.
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.mixed_precision == "fp16")

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def step(self) -> torch.Tensor:
        """Clip, update, clear the gradients. Returns the gradient's norm before clipping, a scalar on the device."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()
