"""The published Wan teachers as config files without weights: enough for --dry_run, which needs shapes alone.

    python benchmarks/shapes.py outputs/shapes        # outputs/shapes/a14b, ti2v_5b, wan21_1.3b, wan21_14b

The numbers are those of Diffusers' conversion of each (scripts/convert_wan_to_diffusers.py).
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a file: this folder, where this file would hide other packages, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import UMT5Config

COMMON = dict(
    patch_size=[1, 2, 2], attention_head_dim=128, text_dim=4096, freq_dim=256, cross_attn_norm=True,
    qk_norm="rms_norm_across_heads", eps=1e-6,
)  # fmt: skip
WAN_14B = dict(num_layers=40, num_attention_heads=40, ffn_dim=13824, in_channels=16, out_channels=16)
WAN_5B = dict(num_layers=30, num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48)
WAN_1_3B = dict(num_layers=30, num_attention_heads=12, ffn_dim=8960, in_channels=16, out_channels=16)
VAE_2_1 = dict(base_dim=96, z_dim=16)
VAE_2_2 = dict(
    base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
    scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
)  # fmt: skip
UMT5_XXL = dict(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
TEACHERS = {  # transformer, VAE, number of experts, scheduler's shift
    "a14b": (WAN_14B, VAE_2_1, 2, 3.0),
    "ti2v_5b": (WAN_5B, VAE_2_2, 1, 5.0),
    "wan21_1.3b": (WAN_1_3B, VAE_2_1, 1, 3.0),
    "wan21_14b": (WAN_14B, VAE_2_1, 1, 3.0),
}

ON_THE_HUB = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "a14b",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "ti2v_5b",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan21_1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan21_14b",
}


def write_shapes(folder: Path, name: str) -> Path:
    """A teacher's config files in `folder/name`, as the pipeline on the hub has them."""
    transformer, vae, experts, shift = TEACHERS[name]
    home = Path(folder) / name
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    parts = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}
    parts |= {"transformer_2": "WanTransformer3DModel"} if experts == 2 else {}
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.875 if experts == 2 else None,
        "expand_timesteps": name == "ti2v_5b",
        **{part: ["diffusers", kind] for part, kind in parts.items()},
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
    }
    configs = {part: transformer | COMMON for part in parts if part.startswith("transformer")} | {"vae": vae}
    for part, config in configs.items():
        kind = AutoencoderKLWan if part == "vae" else WanTransformer3DModel
        _write(home / part / "config.json", {"_class_name": kind.__name__} | config)
    _write(home / "text_encoder" / "config.json", UMT5Config(**UMT5_XXL).to_dict())
    scheduler.save_pretrained(home / "scheduler")
    _write(home / "model_index.json", index)
    return home


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where they go")
    folder = parser.parse_args(argv).folder
    for name in TEACHERS:
        print(write_shapes(folder, name))


if __name__ == "__main__":
    main(sys.argv[1:])
