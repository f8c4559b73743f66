"""Fake scores: networks that learn what the student's pictures are like. They start as the teacher's own experts."""

from torch import nn

from distributed.sharding import copy_network
from models.adapters import Adapted, remove_adapters
from models.teacher import Teacher

ADAPTER = "fake_score"


def fake_scores(teacher: Teacher, kind: str, rank: int) -> dict[str, nn.Module]:
    """A trainable network for each of the teacher's experts, highest noise first: fake_score, fake_score_2.

    Each is at first exactly the expert without guidance.

    Args:
        kind: "full", copies in float32, sharded where the experts are; or "lora", adapters of `rank` on the experts
            themselves, which share their weights and go on as they were in the teacher's hands.
    """
    names = ("fake_score", "fake_score_2")
    remove_fake_adapters(teacher)
    experts = [expert.field.transformer for expert in teacher.experts]
    if kind == "lora":
        return {name: Adapted(expert, ADAPTER, rank) for name, expert in zip(names, experts, strict=False)}
    copies = [_trainable_copy(expert) for expert in experts]
    return dict(zip(names, copies, strict=False))


def _trainable_copy(expert: nn.Module) -> nn.Module:
    network = copy_network(expert)
    remove_adapters(network)  # a student's
    return network.float().requires_grad_(True).train()


def remove_fake_adapters(teacher: Teacher) -> None:
    """Leave the experts as they were before "lora" put adapters into them."""
    for expert in teacher.experts:
        remove_adapters(expert.field.transformer, ADAPTER)
