"""Where frozen networks wait and where they run: the teacher's experts, of which one runs at a time."""

from typing import NamedTuple

import torch
from torch import nn

from distributed.process_group import Ranks
from distributed.sharding import shard_frozen

FILLED = 0.85  # share of a GPU's memory that weights and optimizer may take; activations need the rest


class Placement(NamedTuple):
    """replicate, shard, offload, group_offload or cpu; and why, where it is not what the user asked for."""

    strategy: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.strategy} ({self.why})" if self.why else self.strategy


def choose_placement(asked: str, ranks: Ranks, memory: float | None, experts: list[float], rest: float) -> Placement:
    """What a --teacher_device_strategy comes to on this machine.

    Args:
        memory: bytes of a rank's GPU, None where it is not known.
        experts: bytes of each.
        rest: bytes that a rank needs besides: student, optimizer, …
    """
    if ranks.device.type != "cuda" and asked != "cpu":
        if asked == "shard" and ranks.world_size > 1:
            return Placement("shard")
        why = {"auto": "no CUDA device", "replicate": "", "shard": "one rank alone"}.get(
            asked, f"{asked} needs a CUDA device"
        )
        return Placement("replicate", why)
    if asked == "shard" and ranks.world_size == 1:
        return Placement("replicate", "one rank alone")
    if asked != "auto":
        return Placement(asked)
    if memory is None:
        return Placement("replicate", "as if it fitted: how much memory a GPU has is not known")
    room = FILLED * memory - rest
    has = f"{sum(experts) / 1e9:.3g} GB beside {rest / 1e9:.3g} GB on a GPU of {memory / 1e9:.3g} GB"
    if sum(experts) <= room:
        return Placement("replicate", f"it fits: {has}")
    if ranks.world_size > 1:
        return Placement("shard", f"it does not fit whole: {has}")
    if max(experts) <= room and len(experts) > 1:
        return Placement("offload", f"one expert fits, two do not: {has}")
    return Placement("group_offload", f"not even one expert fits: {has}")


def place(networks: list[nn.Module], strategy: str, ranks: Ranks) -> None:
    """Frozen Diffusers transformers, now on the CPU, to where a strategy wants them. In place; all ranks."""
    if strategy == "offload":
        keep_one_resident(networks, ranks.device)
    for network in networks:
        if strategy == "replicate" and any(p.device != ranks.device for p in network.parameters()):
            network.to(ranks.device)
        elif strategy == "shard":
            shard_frozen(network, ranks)
        elif strategy == "group_offload":
            network.enable_group_offload(
                onload_device=ranks.device,
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=ranks.device.type == "cuda",  # the next block travels while one runs
            )


def keep_one_resident(networks: list[nn.Module], device: torch.device) -> None:
    """Have the network that runs on `device`, and the others in host memory, pinned so that they travel fast.

    Frozen weights never change, so those that leave are not copied back. A network comes when it is called, and stays
    until another one is.
    """
    at_home = {network: _host_copies(network, device) for network in networks}
    resident: list[nn.Module] = []

    def bring_in(network: nn.Module, args: tuple) -> None:
        if network not in at_home or resident == [network]:  # a copy of one has this hook too, and its own weights
            return
        for leaving in resident:  # first: there is no room for two
            for tensor, home in at_home[leaving]:
                tensor.data = home
        for tensor, home in at_home[network]:
            tensor.data = home.to(device, non_blocking=True, copy=True)
        resident[:] = [network]

    for network in networks:
        network.register_forward_pre_hook(bring_in)


def _host_copies(network: nn.Module, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight or buffer, its values in host memory) for all of them."""
    copies = []
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.pin_memory() if device.type == "cuda" else tensor.data
        copies.append((tensor, tensor.data))
    return copies
