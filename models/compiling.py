"""Compiled blocks: torch.compile on what a transformer repeats, which is nearly all that it does."""

import torch
from torch import nn

from config.errors import UserError
from models.adapters import Adapted

# Calls differ in gradient, adapters, dtype and, until shapes are seen to vary, in shape; beyond the limit, 8 by
# default, a block would quietly run as it is.
RECOMPILE_LIMIT = 64


def compile_blocks(*networks: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of transformers, in place; names and weights stay. Before they are wrapped.

    Adapters run in the transformer that they stand in, and are compiled with it.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for network in networks:
        if not isinstance(network, Adapted):
            network.compile_repeated_blocks(backend=backend)


def check_compiler(device: torch.device) -> None:
    """Compile something small. Raises UserError where that cannot be done, such as without a C++ compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever torch.compile's many parts may raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        needed = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler such as gcc"
        raise UserError(f"--compile: torch.compile does not work here ({reason}); it needs {needed}") from error
