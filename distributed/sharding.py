"""How a network is spread over the ranks: today each rank holds it whole, and DDP averages the gradients."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed.process_group import Ranks


def wrap(network: nn.Module, ranks: Ranks) -> nn.Module:
    """The network in DDP, starting from rank 0's weights; as it is where there is one rank."""
    if ranks.world_size == 1:
        return network
    device_ids = [ranks.local_rank] if ranks.device.type == "cuda" else None
    # Wan has no buffer that training changes, so none is broadcast. Never static_graph: it breaks under no_sync.
    return DistributedDataParallel(
        network, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )
