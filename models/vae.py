"""The teacher's VAE: latents to pictures, as `WanPipeline` does it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from models.folding import fold_time


def load_vae(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The frozen VAE of a pipeline on disk, in float32, running single frames through 2-D convolutions."""
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True)
    return fold_time(vae).requires_grad_(False).eval().to(device)


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, C, 1, H, W) → pictures (B, 3, height, width) in [0, 1], float32."""
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    pictures = vae.decode(latents.float() * std + mean, return_dict=False)[0][:, :, 0]  # (B, 3, height, width)
    return (pictures / 2 + 0.5).clamp(0, 1)


def to_pil(pictures: torch.Tensor) -> list[Image.Image]:
    """(B, 3, height, width) in [0, 1] → RGB pictures."""
    pixels = (pictures.cpu().permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(p) for p in pixels]
