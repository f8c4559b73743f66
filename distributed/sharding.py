"""How a network is spread over the ranks.

"ddp": each rank holds it whole, and DDP averages the gradients. "fsdp": of every weight, gradient and moment each rank
holds a slice, and FSDP2 gathers a block's weights when the block runs. "hybrid": the same over the ranks of a node, and
every node alike: slices travel within nodes, only averaged gradients between them.

Every forward of a sharded network is a collective: all ranks must run the same ones.
"""

import copy
import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distributed.process_group import Ranks

# torch 2.13 renamed it, and warns where the old name is used.
KNOWN = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in KNOWN else "broadcast_buffers"


# Wan's answer is a view; nobody changes it in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class _Sharded(NamedTuple):
    """What it takes to make another network that is sharded in the same way."""

    blank: nn.Module  # the network before it was sharded, its weights on the meta device
    mesh: DeviceMesh
    precision: torch.dtype | None


_sharded: WeakKeyDictionary[nn.Module, _Sharded] = WeakKeyDictionary()


# ------------------------------------------------------------------------------------------------ wrapping


def wrap(network: nn.Module, ranks: Ranks, sharding: str = "ddp", precision: torch.dtype | None = None) -> nn.Module:
    """The network as training calls it: on the rank's device, averaging gradients over the ranks. It must be alike on
    all of them.

    One without blocks is a set of adapters: they are few, and DDP averages them, however what they stand on is spread.

    Args:
        sharding: "ddp", "fsdp" or "hybrid"; with one rank all are the same. A network that is sharded stays so.
        precision: what sharded blocks are gathered in; their slices, and what is outside the blocks, stay in float32.
    """
    if isinstance(network, FSDPModule):
        return network
    if ranks.world_size > 1 and sharding != "ddp" and hasattr(network, "blocks"):
        return shard(network, _mesh(ranks, sharding), precision)
    network.to(ranks.device)
    if ranks.world_size == 1:
        return network
    device_ids = [ranks.local_rank] if ranks.device.type == "cuda" else None
    # Wan has no buffer that training changes, so none is broadcast. Never static_graph: it breaks under no_sync.
    return DistributedDataParallel(
        network, device_ids=device_ids, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False}
    )


def shard_frozen(network: nn.Module, ranks: Ranks) -> nn.Module:
    """A frozen network, one slice of every weight a rank. In place; the weights keep their dtypes."""
    return shard(network, _mesh(ranks, "fsdp"))


def shard(network: nn.Module, mesh: DeviceMesh, precision: torch.dtype | None = None) -> nn.Module:
    """FSDP2 by block, then the rest. In place: a block is on the device whole only while it is cut."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    _sharded[network] = _Sharded(copy.deepcopy(network, memo), mesh, precision)
    # Inputs keep their dtypes: Wan computes its timesteps and norms in float32.
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # True for the root too: between two forwards all parameters are slices, as EMA and checkpoints take them.
    rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    return fully_shard(network, mesh=mesh, mp_policy=rest, reshard_after_forward=True)


@cache  # a mesh of nodes has process groups of its own
def _mesh(ranks: Ranks, sharding: str) -> DeviceMesh:
    if sharding == "fsdp":
        # Without names for its dimension: PEFT then knows that a slice is not what a layer computes with.
        return init_device_mesh(ranks.device.type, (ranks.world_size,))
    grid = torch.arange(ranks.world_size).view(-1, ranks.local_world_size)  # (nodes, ranks of a node)
    timeout = timedelta(seconds=ranks.timeout_seconds)  # subgroups do not inherit it
    groups = [dist.new_subgroups_by_enumeration(g.tolist(), timeout=timeout)[0] for g in (grid.T, grid)]
    return DeviceMesh.from_group(groups, ranks.device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))


def is_sharded(network: nn.Module) -> bool:
    """Whether its forward is a collective that all ranks must call: it, or what its adapters stand on, is sharded."""
    return isinstance(getattr(network, "transformer", network), FSDPModule)


def gradients(wrapped: nn.Module, travel: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: whether its gradients, and those before it, are averaged now.

    Where the network is sharded they are cut to slices each time all the same, or each rank would hold them whole; what
    waits is the traffic between nodes.
    """
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_all_reduce(travel)
    elif isinstance(wrapped, DistributedDataParallel) and not travel:
        return wrapped.no_sync()
    return nullcontext()


# ------------------------------------------------------------------------------------------------ copies


@torch.no_grad()
def copy_network(network: nn.Module) -> nn.Module:
    """A copy with weights of its own, spread over the ranks as the network is."""
    if network not in _sharded:
        return copy.deepcopy(network)
    made = _sharded[network]
    new = shard(copy.deepcopy(made.blank), made.mesh, made.precision)
    new.load_state_dict({name: tensor.clone() for name, tensor in network.state_dict().items()}, assign=True)
    return new


# ------------------------------------------------------------------------------------------------ whole tensors


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, put together where ranks hold slices of it. Collective for such a one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's weights, whole. All ranks call it; of a sharded network only rank 0 gets them, on the CPU."""
    if not isinstance(network, FSDPModule):
        return network.state_dict()
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def cut_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a whole tensor that all ranks have, cut as `like` is; all of it where `like` is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def cut_state_like(state: Any, like: Any) -> Any:
    """`cut_like` for every tensor in nested dicts and lists; `like` has the same ones."""
    if isinstance(like, torch.Tensor):
        return cut_like(state, like)
    if isinstance(like, dict):
        return {key: cut_state_like(value, like[key]) for key, value in state.items()}
    if isinstance(like, list) and len(like) == len(state):
        return [cut_state_like(*pair) for pair in zip(state, like, strict=True)]
    return state
