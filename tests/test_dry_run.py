"""--dry_run as people run it: on config files alone, with a verdict, ready flags and an exit code."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import memory as memory_page
from benchmarks import scaling as scaling_page
from benchmarks.shapes import ON_THE_HUB, write_shapes
from config.config import load_config
from config.errors import UserError
from config.settings import read_recipe
from distillation.dry_run import dry_run, stored
from distillation.objective import settings_of
from distillation.plan import gpu_memory

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "config").glob("*.toml"))


def plan(*flags: str) -> int:
    return dry_run(load_config(["--dry_run", *flags], settings_of))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for name in ON_THE_HUB.values():
        write_shapes(folder, name)
    return folder


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_where_it_is_meant_to_run(recipe, shapes, tmp_path):
    settings = read_recipe(str(recipe)).table
    teacher = settings["teacher_path"]
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path / "out")]
    if teacher in ON_THE_HUB:
        flags += ["--teacher_path", str(shapes / ON_THE_HUB[teacher])]
    if "gpu_memory" not in settings:
        flags += ["--gpu_memory", "141"]
    assert plan(*flags) == 0
    assert not (tmp_path / "out").exists()


def test_the_program_prints_the_plan_and_what_would_fit(random_pipeline_dir, tmp_path):
    """As a command: weights are there, prompts are not; 1.3 GB are too few, most of them CUDA's own."""
    command = [
        sys.executable, str(ROOT / "train_distillation.py"), "--teacher_path", str(random_pipeline_dir), "--dry_run",
        "--height", "512", "--width", "512", "--batch_size", "16", "--num_gpus", "2", "--gpu_memory", "1.3",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "does NOT fit: 1.5 GB of 1.3 GB" in done.stdout
    assert "\n  --train_batch_size 1 --gradient_accumulation_steps 16\n" in done.stdout
    assert re.search(r"teacher +0\.\d\d", done.stdout) and "GPU hours" in done.stdout
    assert "not there yet" not in done.stdout and "parameters)" not in done.stdout, "all weights are on the disk"
    assert list(tmp_path.iterdir()) == []


def test_what_is_suggested_fits_when_it_is_passed(random_pipeline_dir, tmp_path, capsys):
    flags = ["--teacher_path", str(random_pipeline_dir), "--height", "512", "--width", "512"]
    large, flags = ["--train_batch_size", "16"], [*flags, "--gpu_memory", "1.3"]
    flags += ["--output_dir", str(tmp_path / "out")]
    assert plan(*flags, *large) == 1
    lines = capsys.readouterr().out.splitlines()
    suggested = lines[lines.index("would fit, the fastest first:") + 1]
    assert suggested.strip().startswith("--")
    assert plan(*flags, *shlex.split(suggested)) == 0


def test_without_a_gpu_there_is_no_verdict(random_pipeline_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan("--teacher_path", str(random_pipeline_dir), "--output_dir", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "--gpu_memory GB gives a verdict" in said and "none given" in said


def test_gpus_are_counted_as_torchrun_starts_them(random_pipeline_dir, tmp_path, capsys, monkeypatch):
    flags = ["--teacher_path", str(random_pipeline_dir), "--output_dir", str(tmp_path / "out"), "--gpu_memory", "80"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert plan(*flags) == 0 and "each of 4 GPU(s)" in capsys.readouterr().out
    assert plan(*flags, "--num_gpus", "16", "--num_nodes", "2") == 0 and "each of 16" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert plan(*flags) == 0 and capsys.readouterr().out == "", "rank 0 speaks"


def test_stored_weights_are_read_from_their_headers(random_pipeline_dir, tmp_path):
    folder = random_pipeline_dir / "transformer"
    assert stored(tmp_path, 1) == "not there yet"
    config = json.loads((folder / "config.json").read_text())
    assert config["num_layers"] == 3 and "of 1 parameters" in stored(folder, 1)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--num_gpus", "3", "--num_nodes", "2"], ['--num_gpus "3"', "multiples of --num_nodes 2"]),
        (["--num_epochs", "2"], ["--num_epochs", "--data_path or --steps_per_epoch"]),
        (["--data_path", "no.txt"], ["--data_path", "no such file"]),
        (["--gpu_memory", "0"], ["--gpu_memory", "> 0"]),
    ],
)
def test_wrong_flags(random_pipeline_dir, flags, parts):
    with pytest.raises(UserError) as raised:
        plan("--teacher_path", str(random_pipeline_dir), *flags)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_a_teacher_without_its_text_encoder_is_refused(shapes, tmp_path):
    home = write_shapes(tmp_path, "wan21_1.3b")
    (home / "text_encoder" / "config.json").unlink()
    with pytest.raises(UserError, match="text_encoder/config.json not found"):
        plan("--teacher_path", str(home))


@pytest.mark.parametrize("page", [memory_page, scaling_page], ids=lambda page: page.PAGE.name)
def test_the_page_is_what_its_command_prints(page, capsys):
    page.main([])
    assert capsys.readouterr().out == page.PAGE.read_text(encoding="utf-8")


def test_gpu_memory_is_of_no_effect_on_a_real_run():
    """It stands in recipes, which also run on other cards."""
    given = ["--teacher_path", "teacher", "--gpu_memory", "80"]
    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    config = load_config([*given, "--dry_run"], settings_of)
    assert gpu_memory(config, torch.device("cuda", 0)) == 80e9
    config = replace(config, run=replace(config.run, dry_run=False))
    assert gpu_memory(config, torch.device("cuda", 0)) == here
