"""Teachers whose transformers were saved quantised, by one of Diffusers' quantisers, which also loads them."""

from pathlib import Path

import torch
from diffusers.quantizers import DiffusersAutoQuantizer

from config.errors import UserError


def check_quantiser(config: dict, source: str, dtype: torch.dtype) -> None:
    """Raises UserError where a `quantization_config` needs a package, a GPU or a dtype that is not here.

    Args:
        source: what errors call the transformer.
    """
    try:
        quantiser = DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
        quantiser.validate_environment(torch_dtype=dtype, from_flax=False, device_map=None)
    except Exception as error:  # each quantiser has its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{source}: quantised by {config.get('quant_method')}, which does not work here: {reason}"
        ) from error


def plain(weight: torch.Tensor) -> torch.Tensor:
    """A weight in ordinary numbers, its own or what a quantiser has packed."""
    if type(weight).__name__ in ("Params4bit", "Int8Params"):  # bitsandbytes, whose packed shapes are not the layers'
        from diffusers.quantizers.bitsandbytes.utils import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, state=getattr(weight, "quant_state", weight))
    # A parameter of another class holds what torchao or quanto have made of it.
    weight = weight.detach()
    return weight if type(weight) is torch.Tensor else weight.dequantize()


def stored_bytes(folder: Path) -> int:
    """Of the weights on disk, which is what they take in memory too; 0 where they are not there."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
