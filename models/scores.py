"""Fake scores: networks that learn what the student's pictures are like. They start as the teacher's own experts."""

import copy

from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

from models.teacher import Teacher

ADAPTER = "fake_score"
# Every linear layer of a Wan block: self- and cross-attention, feed-forward.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def fake_scores(teacher: Teacher, kind: str, rank: int) -> dict[str, nn.Module]:
    """A trainable network for each of the teacher's experts, highest noise first: fake_score, fake_score_2.

    Each is at first exactly the expert without guidance.

    Args:
        kind: "full", copies in float32; or "lora", adapters of `rank` on the experts themselves, which share their
            weights and go on as they were in the teacher's hands.
    """
    names = ("fake_score", "fake_score_2")
    remove_adapters(teacher)
    experts = [expert.field.transformer for expert in teacher.experts]
    if kind == "lora":
        return {name: Adapted(expert, rank) for name, expert in zip(names, experts, strict=False)}
    copies = [copy.deepcopy(expert).float().requires_grad_(True).train() for expert in experts]
    return dict(zip(names, copies, strict=False))


def remove_adapters(teacher: Teacher) -> None:
    """Leave the experts as they were before "lora" put adapters into them."""
    for expert in teacher.experts:
        if ADAPTER in getattr(expert.field.transformer, "peft_config", {}):
            expert.field.transformer.delete_adapters(ADAPTER)


class Adapted(nn.Module):
    """A frozen expert with low-rank adapters that are switched on while it is called through here, and only then."""

    def __init__(self, transformer: WanTransformer3DModel, rank: int) -> None:
        super().__init__()
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, init_lora_weights=True)
        transformer.add_adapter(config, adapter_name=ADAPTER)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # adapters are trained in float32 whatever the expert is in
        self.transformer = transformer
        self._adapters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        self._switch_off()

    @property
    def config(self):
        return self.transformer.config

    def forward(self, *args, **kwargs):
        self.transformer.enable_adapters()
        try:
            return self.transformer(*args, **kwargs)
        finally:
            self._switch_off()

    def _switch_off(self) -> None:
        self.transformer.disable_adapters()
        for parameter in self._adapters:
            parameter.requires_grad_(True)  # PEFT freezes what it switches off, and backward is still to come
