"""Very small pipelines with random weights, one of each family of Wan text-to-video teachers."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from models.teacher import Teacher, inspect_teacher, load_teacher
from models.tiny_wan import build_tokenizer

TEXT_DIM = 16
TRANSFORMER = dict(
    num_attention_heads=2, attention_head_dim=12, ffn_dim=64, num_layers=3, freq_dim=16, text_dim=TEXT_DIM,
    in_channels=16, out_channels=16,
)  # fmt: skip
VAE = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
# Wan2.2-TI2V-5B's VAE: 48 channels, 16× spatial, pixels in 2×2 patches, residual up and down blocks.
TI2V_VAE = VAE | dict(
    decoder_base_dim=8, z_dim=48, in_channels=12, out_channels=12, patch_size=2, is_residual=True,
    scale_factor_spatial=16, temperal_downsample=[False, True, True],
    latents_mean=torch.linspace(-0.5, 0.5, 48).tolist(), latents_std=torch.linspace(0.5, 1.5, 48).tolist(),
)  # fmt: skip


def save_random_pipeline(folder: Path, experts: int, ti2v: bool = False, seed: int = 0) -> Path:
    """A WanPipeline like Wan2.2-A14B (two experts), Wan2.1 (one) or TI2V-5B (one, a timestep for every token)."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    channels = dict(in_channels=48, out_channels=48) if ti2v else {}
    transformers = [WanTransformer3DModel(**TRANSFORMER | channels).eval() for _ in range(experts)]
    vae = AutoencoderKLWan(**TI2V_VAE if ti2v else VAE).eval()
    with torch.no_grad():
        for transformer in transformers:
            transformer.proj_out.weight.mul_(2)
            for block in transformer.blocks:  # else the text hardly shows
                block.attn2.to_v.weight.mul_(8)
                block.attn2.to_out[0].weight.mul_(8)
        vae.decoder.conv_out.weight.mul_(2)  # else every picture is grey
        vae.decoder.conv_out.bias.zero_()
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        expand_timesteps=ti2v,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_pipeline_dir(tmp_path_factory) -> Path:
    """Two experts with boundary_ratio 0.875, as Wan2.2-A14B. Read only."""
    return save_random_pipeline(tmp_path_factory.mktemp("teachers") / "two_experts", experts=2)


@pytest.fixture(scope="session")
def random_single_pipeline_dir(tmp_path_factory) -> Path:
    """One transformer, as Wan2.1. Read only."""
    return save_random_pipeline(tmp_path_factory.mktemp("teachers") / "single", experts=1)


@pytest.fixture(scope="session")
def random_ti2v_pipeline_dir(tmp_path_factory) -> Path:
    """`expand_timesteps` and a 48-channel patchified VAE, 32 pixels a patch, as Wan2.2-TI2V-5B. Read only."""
    return save_random_pipeline(tmp_path_factory.mktemp("teachers") / "ti2v", experts=1, ti2v=True)


@pytest.fixture
def teacher(random_pipeline_dir) -> Teacher:
    """The two experts of `random_pipeline_dir`, guided, a test's own."""
    torch.manual_seed(0)
    info = inspect_teacher(str(random_pipeline_dir))
    return load_teacher(info, torch.device("cpu"), torch.float32, torch.randn(3, TEXT_DIM), 5.0, 2.0)
