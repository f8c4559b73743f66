"""Which of PyTorch's kernels computes a transformer's self-attention, by Diffusers' names.

Kernels of other packages are left out: under autocast Wan's norms hand them q and k in float32 and v in bf16.
"""

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

from config.errors import UserError


def use_attention_backend(backend: str, *networks: nn.Module) -> None:
    """In place; "auto" leaves them as they are. Cross-attention stays with PyTorch's choice: flash kernels take no
    scores, and those of the text carry its padding (models/folding.py)."""
    for network in networks if backend != "auto" else ():
        for block in network.blocks:
            block.attn1.processor._attention_backend = AttentionBackendName(backend)


def check_attention_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compute something small with it, and its gradient. Raises UserError where that cannot be done here."""
    if backend == "auto":
        return
    q, k, v = (torch.randn(1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend)).sum().backward()
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--attention_backend {backend}: does not work here with {dtype} on {device.type} ({reason}); "
            "accepted everywhere: auto, native"
        ) from error
