"""How a network is spread over the ranks: today each rank holds it whole, and DDP averages the gradients."""

import inspect

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed.process_group import Ranks

# torch 2.13 renamed it, and warns where the old name is used.
KNOWN = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in KNOWN else "broadcast_buffers"


def wrap(network: nn.Module, ranks: Ranks) -> nn.Module:
    """The network in DDP, starting from rank 0's weights; as it is where there is one rank."""
    if ranks.world_size == 1:
        return network
    device_ids = [ranks.local_rank] if ranks.device.type == "cuda" else None
    # Wan has no buffer that training changes, so none is broadcast. Never static_graph: it breaks under no_sync.
    return DistributedDataParallel(
        network, device_ids=device_ids, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False}
    )
