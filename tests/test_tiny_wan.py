"""The embedded teacher in the repository: what it is."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from data.scenes import SIZE, random_scenes, reads_as
from models.tiny_wan import HOME, build_tokenizer, measure_vae


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(HOME)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_is_of_wan22_a14b_make_and_small(pipeline):
    assert pipeline.config.boundary_ratio == 0.875
    assert type(pipeline.transformer).__name__ == type(pipeline.transformer_2).__name__ == "WanTransformer3DModel"
    assert type(pipeline.text_encoder).__name__ == "UMT5EncoderModel" and pipeline.tokenizer.is_fast
    assert pipeline.vae.config.z_dim == 16 and pipeline.vae_scale_factor_spatial == 8
    assert pipeline.scheduler.config.use_flow_sigmas and pipeline.scheduler.config.flow_shift == 3.0
    assert sum(f.stat().st_size for f in HOME.rglob("*") if f.is_file()) <= 24e6


def test_carries_no_path_of_a_machine():
    for file in HOME.rglob("*.json"):
        if file.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(file.read_text())
            assert str(Path.home()) not in file.read_text()


def test_tokenizer_on_disk_is_the_one_in_the_code(pipeline):
    caption = "a small red star left of a large blue ring on a yellow background; Ünusual words, 7"
    assert pipeline.tokenizer(caption).input_ids == build_tokenizer()(caption).input_ids


def test_experts_differ(pipeline):
    high, low = pipeline.transformer.state_dict(), pipeline.transformer_2.state_dict()
    assert high.keys() == low.keys() and not all(high[name].equal(low[name]) for name in high)


def test_vae_gives_pictures_back():
    assert measure_vae(HOME, count=64) >= 28  # dB


def test_draws_what_it_is_told(pipeline):
    captions = [scene.caption for scene in random_scenes(6, seed=7, held_out=True)]
    frames = pipeline(
        captions,
        num_frames=1,
        height=SIZE,
        width=SIZE,
        num_inference_steps=20,
        guidance_scale=4.0,
        guidance_scale_2=2.0,
        generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
        output_type="pil",
    ).frames
    right = [reads_as(frame[0], caption) for frame, caption in zip(frames, captions, strict=True)]
    assert sum(right) >= 5
