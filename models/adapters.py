"""Low-rank adapters on a frozen transformer: several networks over weights that are held once.

Every set of adapters is an `Adapted`, a network of its own to whatever trains, averages, wraps or saves it. PEFT's
layers stand in the one transformer that they share, all switched off but for a call's own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted here
# Every linear layer of a Wan block: self- and cross-attention, feed-forward.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


class Adapted(nn.Module):
    """A frozen transformer with low-rank adapters of its own, switched on while it is called through here, and only
    then. At first it computes what the transformer does.

    The adapters, in float32, are all that it has of parameters and state. The transformer is no part of it: nothing
    that is done to this module but a call touches the weights that others share.

    Args:
        name: of the adapters; earlier ones of that name are taken off.
        alpha: adapters weigh alpha / rank; by default 1.
    """

    def __init__(self, transformer: WanTransformer3DModel, name: str, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        remove_adapters(transformer, name)
        trained = [p for p in transformer.parameters() if p.requires_grad]
        config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=LORA_TARGETS)
        transformer.add_adapter(config, adapter_name=name)
        for parameter in trained:  # other adapters, which PEFT has frozen
            parameter.requires_grad_(True)
        self.name = name
        self._hidden = (transformer,)  # in a tuple, else PyTorch would take it for a part
        self._layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
        for layer in self._layers:
            layer._active_adapter = []
        for key, parameter in transformer.named_parameters():
            if f".{name}." in key:
                parameter.data = parameter.data.float()
                own = key.removesuffix(f".{name}.weight").replace(".", "/")  # PyTorch allows no dots
                self.register_parameter(own, parameter)

    @property
    def transformer(self) -> WanTransformer3DModel:
        """The one that is shared, with everybody's adapters in it."""
        return self._hidden[0]

    def forward(self, *args, **kwargs):
        with _switched(self._layers, [self.name]):
            return self.transformer(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        self.transformer.enable_gradient_checkpointing(_checkpoint)

    def __deepcopy__(self, memo: dict) -> "Snapshot":
        return Snapshot(self)

    def lora(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The adapters and their settings, as Diffusers' `save_lora_weights` takes them."""
        config = self.transformer.peft_config[self.name]
        return get_peft_model_state_dict(self.transformer, adapter_name=self.name), config.to_dict()

    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and weight of a stock transformer that computes the same; what has adapters is in float32."""
        layers = {name: m for name, m in self.transformer.named_modules() if isinstance(m, LoraLayer)}
        for key, weight in self.transformer.state_dict().items():
            layer, _, kind = key.rpartition(".base_layer.")
            if layer in layers:
                merged = weight.float() + layers[layer].get_delta_weight(self.name) if kind == "weight" else weight
                yield f"{layer}.{kind}", merged.detach()
            elif ".lora_" not in key:
                yield key, weight


class Snapshot(nn.Module):
    """An `Adapted` as it was when this was made, frozen: a copy of its adapters, lent to it for each call."""

    def __init__(self, network: Adapted) -> None:
        super().__init__()
        self._hidden = (network,)
        for name, parameter in network.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))

    @torch.no_grad()  # a backward would find the adapters of today
    def forward(self, *args, **kwargs):
        self._swap()
        try:
            return self._hidden[0](*args, **kwargs)
        finally:
            self._swap()

    def _swap(self) -> None:
        for own, theirs in zip(self.parameters(), self._hidden[0].parameters(), strict=True):
            own.data, theirs.data = theirs.data, own.data


def remove_adapters(transformer: nn.Module, *names: str) -> None:
    """Take adapters off a transformer, as far as it has them; all where none is named."""
    for name in names or list(getattr(transformer, "peft_config", {})):
        if name in getattr(transformer, "peft_config", {}):
            transformer.delete_adapters(name)


@contextmanager
def _switched(layers: list[LoraLayer], names: list[str]) -> Iterator[None]:
    """Within, these adapters are on and no others; afterwards those that were on before."""
    before = [layer._active_adapter for layer in layers]
    # Not by PEFT's `set_adapter`: that also freezes what it switches off, whose backward is still to come.
    for layer in layers:
        layer._active_adapter = names
    try:
        yield
    finally:
        for layer, were_on in zip(layers, before, strict=True):
            layer._active_adapter = were_on


def _checkpoint(block: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """Diffusers' gradient checkpointing, recomputing with the adapters that are on now: in backward none is."""
    layers = [module for module in block.modules() if isinstance(module, LoraLayer)]
    names = layers[0]._active_adapter if layers else []

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with _switched(layers, names):
            return block(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False)
