"""The program as people run it: plain python and real torchrun, on a small pipeline with random weights."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from config.config import load_config
from distillation.objective import settings_of
from train_distillation import write_run_facts

ROOT = Path(__file__).parent.parent
PROGRAM = str(ROOT / "train_distillation.py")
PROMPTS = ["a cat", "a dog on a hill", "some bird", "a fish", "five green apples"]
KEYS = {
    "file", "prompt", "prompt_index", "epoch", "step", "rank", "seed", "sampler", "num_inference_steps", "eta", "shift",
    "weights", "height", "width", "seconds", "ok", "error", "scores",
}  # fmt: skip


def run(*command: str, timeout: float = 120) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=timeout)


def torchrun(script: str, *flags: str, ranks: int = 2) -> subprocess.CompletedProcess:
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script, *flags)


def flags(teacher: Path, folder: Path, *more: str) -> list[str]:
    data = folder.parent / "prompts.txt"
    data.write_text("\n".join(PROMPTS), encoding="utf-8")
    return [
        "--teacher_path", str(teacher), "--data_path", str(data), "--output_dir", str(folder), "--height", "32",
        "--width", "32", "--num_steps", "4", "--steps_per_epoch", "2", "--batch_size", "2", "--logging_steps", "1",
        "--lr", "1e-3", "--save_samples", "--sample_prompts", *PROMPTS[:3], *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(random_pipeline_dir, tmp_path_factory) -> Path:
    """The output folder of a run on two ranks, with EMA and the teacher's pictures."""
    folder = tmp_path_factory.mktemp("run") / "out"
    extra = ["--use_ema", "--sample_teacher", "--sample_teacher_steps", "4", "--distributed"]
    done = torchrun(PROGRAM, *flags(random_pipeline_dir, folder, *extra))
    assert done.returncode == 0, done.stderr
    return folder


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.torchrun
def test_every_rank_draws_its_share_of_every_round(two_ranks):
    samples = two_ranks / "samples"
    names = {f"rank_{rank}_sample_{i:02d}.png" for rank, i in [(0, 0), (0, 1), (1, 0)]}
    expected = {f"{prefix}_{name}" for prefix in ("epoch_0001", "epoch_0002", "teacher") for name in names}
    assert {path.name for path in samples.glob("*_rank_*.png")} == expected
    rows = read_rows(samples / "manifest.jsonl")
    assert {row["file"] for row in rows} == expected
    assert all(row.keys() == KEYS and row["ok"] for row in rows)
    assert [row["prompt"] for row in rows if row["epoch"] == 2] == PROMPTS[:3]
    assert (samples / "index.html").exists() and (samples / "epoch_0002.png").exists()
    assert not list(samples.glob(".*")), "temporary files were left"


@pytest.mark.torchrun
def test_metrics_and_resolved_settings_are_left_behind(two_ranks):
    rows = read_rows(two_ranks / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"epoch", "loss", "lr", "grad_norm", "step_seconds", "samples_per_second"} <= rows[0].keys()
    facts = json.loads((two_ranks / "config.json").read_text())
    assert facts["settings"]["optimization"]["learning_rate"] == 1e-3
    assert facts["versions"]["torch"] == torch.__version__


@pytest.mark.torchrun
def test_stock_pipeline_redraws_a_picture_from_its_manifest_row(two_ranks):
    rows = read_rows(two_ranks / "samples" / "manifest.jsonl")
    row = next(r for r in rows if r["epoch"] == 2 and r["rank"] == 1)
    pipeline = WanPipeline.from_pretrained(two_ranks / "student")
    pipeline.set_progress_bar_config(disable=True)
    [[picture]] = pipeline(
        row["prompt"],
        num_frames=1,
        height=row["height"],
        width=row["width"],
        num_inference_steps=row["num_inference_steps"],
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(row["seed"]),
        output_type="pil",
    ).frames
    drawn = np.asarray(Image.open(two_ranks / "samples" / row["file"]), dtype=int)
    assert np.abs(np.asarray(picture, dtype=int) - drawn).max() <= 1


@pytest.mark.torchrun
def test_finished_student_draws_on_any_number_of_ranks(two_ranks, tmp_path):
    done = run(
        PROGRAM, "--sample_only", "--student_path", str(two_ranks / "student"), "--output_dir", str(tmp_path),
        "--sample_prompts", *PROMPTS[:3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = np.asarray(Image.open(tmp_path / "samples" / "epoch_0000_rank_0_sample_02.png"), dtype=int)
    shared = np.asarray(Image.open(two_ranks / "samples" / "epoch_0002_rank_1_sample_00.png"), dtype=int)
    assert np.abs(alone - shared).max() <= 1


@pytest.mark.torchrun
def test_failing_rank_ends_the_job_within_seconds_and_is_named(random_pipeline_dir, tmp_path):
    started = time.monotonic()
    done = torchrun(str(ROOT / "tests" / "faulty_rank.py"), *flags(random_pipeline_dir, tmp_path / "out"))
    assert done.returncode != 0
    assert "rank 1 failed: RuntimeError: a fault put here by the test" in done.stderr
    assert time.monotonic() - started < 60
    assert read_rows(tmp_path / "out" / "metrics.jsonl"), "what was written before the fault is kept"


def test_second_run_encodes_nothing_and_the_same_seed_trains_the_same(random_pipeline_dir, tmp_path):
    first = run(PROGRAM, *flags(random_pipeline_dir, tmp_path / "out"))
    assert first.returncode == 0 and "Encoding prompts" in first.stderr, first.stderr
    losses = [row["loss"] for row in read_rows(tmp_path / "out" / "metrics.jsonl")]
    refused = run(PROGRAM, *flags(random_pipeline_dir, tmp_path / "out"))
    assert refused.returncode == 2 and "holds another run" in refused.stderr
    second = run(PROGRAM, *flags(random_pipeline_dir, tmp_path / "out", "--overwrite_output_dir"))
    assert second.returncode == 0 and "Encoding prompts" not in second.stderr, second.stderr
    assert [row["loss"] for row in read_rows(tmp_path / "out" / "metrics.jsonl")] == losses


def test_users_mistake_is_one_line_and_exit_code_2(random_pipeline_dir, tmp_path):
    for extra, named in {
        ("--student_step", "3"): "--student_step",
        ("--mixed_precision", "fp16"): "--mixed_precision fp16",
        ("--teacher_path", str(tmp_path / "missing")): "--teacher_path",
        ("--width", "40"): "40",
    }.items():
        done = run(PROGRAM, *flags(random_pipeline_dir, tmp_path / "out", *extra))
        assert done.returncode == 2, done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", [True, False])
def test_overwriting_a_run_removes_its_own_pictures_alone(tmp_path, inside):
    out = tmp_path / "out"
    samples = out / "samples" if inside else tmp_path / "shared_samples"
    samples.mkdir(parents=True)
    (samples / "manifest.jsonl").touch()
    argv = [*flags(tmp_path / "teacher", out), "--sample_dir", str(samples), "--overwrite_output_dir"]
    write_run_facts(load_config(argv, settings_of), out)
    assert samples.exists() != inside
