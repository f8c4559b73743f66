"""A network together with all that trains it."""

from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from config.config import OptimizationConfig, Phase
from distributed.process_group import Ranks
from distributed.sharding import cut_like, whole, wrap

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
PRECISION = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --mixed_precision


def wrap_trained(network: nn.Module, settings: OptimizationConfig, ranks: Ranks) -> nn.Module:
    """The network as training calls it."""
    return wrap(network, ranks, settings.student_sharding, PRECISION[settings.mixed_precision])


def make_optimizer(
    parameters: list[nn.Parameter], learning_rate: float, settings: OptimizationConfig, device: torch.device
) -> torch.optim.Optimizer:
    about = {
        "lr": learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    if settings.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # optional; `make_plan` has seen that it is there

        return AdamW8bit(parameters, **about)
    # The default on a GPU, foreach, takes another copy of all weights while it steps; and only the fused one can leave
    # a step out without asking the host.
    return torch.optim.AdamW(parameters, **about, fused=device.type in ("cpu", "cuda"))


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
        self.network, self.wrapped = network, wrapped or wrap_trained(network, settings, ranks)
        self.max_grad_norm = settings.max_grad_norm
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        rate = phase.learning_rate if learning_rate is None else learning_rate
        self.optimizer = make_optimizer(self.parameters, rate, settings, ranks.device)
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

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, update, clear the gradients. A gradient that is not finite changes nothing; it is the same on all
        ranks, and so is the decision.

        Returns the gradient's norm before clipping, and whether the weights were updated: scalars on the device, which
        may not have got there yet.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        finite = norm.isfinite()
        if self.optimizer.defaults.get("fused") and not self.scaler.is_enabled():
            # AdamW divides the gradients by the one as it reads them, and leaves the step out for the other.
            self.optimizer.grad_scale = ((norm + CLIP_EPSILON) / self.max_grad_norm).clamp(min=1.0)
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif finite:  # the host waits for the GPU; fp16's scaler must know of slices that other ranks hold
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            self.scaler.step(self.optimizer)
        self.scaler.update()  # lowers fp16's scale where it was too high
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def state_dict(self, with_weights: bool) -> dict[str, Any]:
        """All that is needed to go on bit for bit; keys are text. The student's weights are kept elsewhere."""
        optimizer = self.optimizer.state_dict()
        return {
            "weights": {str(i): p.detach() for i, p in enumerate(self.parameters)} if with_weights else {},
            "moments": {str(i): state for i, state in optimizer["state"].items()},
            "param_groups": optimizer["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, weights in state["weights"].items():
            self.parameters[int(i)].copy_(cut_like(weights, self.parameters[int(i)]))
        moments = {int(i): cut_moments(moment, self.parameters[int(i)]) for i, moment in state["moments"].items()}
        here = {key: self.optimizer.defaults[key] for key in ("fused", "foreach") if key in self.optimizer.defaults}
        groups = [group | here for group in state["param_groups"]]  # of how it steps on this machine, not on that one
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.scaler.load_state_dict(state["scaler"])


def cut_moments(moments: dict[str, torch.Tensor], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's moments of a parameter, cut as it is; the number of its steps is whole everywhere."""
    return {name: cut_like(m, parameter) if m.shape == parameter.shape else m for name, m in moments.items()}
