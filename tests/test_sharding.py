"""Networks spread over ranks: the same weights and pictures as when each rank holds them whole."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from config.config import OptimizationConfig, Phase, load_config
from distillation.objective import settings_of
from distillation.trackers import Trackers
from distillation.trained import Trained
from distributed.process_group import Ranks
from distributed.sharding import copy_network, gradients, whole, whole_weights, wrap
from distributed.stop import StopSignal
from models.teacher import load_transformer
from tests.ranks import run_ranks
from tests.test_train import PROGRAM, torchrun

PROMPTS = ("a cat", "a dog on a hill", "some bird", "a fish", "five green apples")
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False)
STEPS = 5
OBJECTIVES = {
    "velocity": "--teacher_substeps 1 --updates_per_rollout 2 --sample_teacher --sample_batch_size 1",
    "trajectory": "--teacher_substeps 2 --gradient_checkpointing --gradient_accumulation_steps 2",
    "trajectory on its own states": "--teacher_substeps 1 --states student",
    "trajectory from a copy": "--jumps 4 --teach student --teacher_substeps 2",
    "consistency": "--target_decay 0.9 --teacher_substeps 2",
    "consistency on its own pictures": "--states student --target_decay 0",
    "dmd lora": "--fake_lora_rank 2 --fake_updates 2 --anchor_weight 0.1 --contrast_every 2"
    " --gradient_accumulation_steps 2",
    "dmd full": "--fake_score full --fake_updates 1 --teacher_dtype bfloat16",
}
SHARDED = ["--student_sharding", "fsdp", "--teacher_device_strategy", "shard"]


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder for runs, with what they train on."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path


def flags_of(teacher: Path, home: Path, out: str, *more: str, prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    """A run in home/out. AdamW's epsilon is large, or it would amplify what small gradients are rounded by."""
    return [
        "--teacher_path", str(teacher), "--data_path", str(home / "prompts.txt"), "--output_dir", str(home / out),
        "--prompt_cache_dir", str(home / "cache"), "--height", "32", "--width", "32", "--student_steps", "2",
        "--num_steps", str(STEPS), "--steps_per_epoch", str(STEPS), "--batch_size", "2", "--logging_steps", "1",
        "--lr", "1e-2", "--adam_epsilon", "1e-2", "--use_ema", "--sample_teacher_steps", "2", "--score", "none",
        "--sample_prompts", *prompts, *more,
    ]  # fmt: skip


def go(ranks: Ranks, *given: Any) -> None:
    """The whole of `flags_of(*given)`."""
    from train_distillation import train

    config = load_config(flags_of(*given), settings_of)
    with Trackers(config.run, ranks.is_main) as trackers:
        train(config, ranks, trackers, StopSignal())


def _whole_and_sharded(ranks: Ranks, teacher: Path, home: Path, names: list[str]) -> None:
    for name in names:
        own = ["--objective", name.split()[0], *OBJECTIVES[name].split()]
        go(ranks, teacher, home, f"{name}/whole", *own)
        go(ranks, teacher, home, f"{name}/sharded", *own, *SHARDED)


@pytest.mark.parametrize("half", [0, 1])
def test_every_objective_learns_and_draws_the_same_sharded(half, random_pipeline_dir, home):
    names = list(OBJECTIVES)[half::2]
    run_ranks(_whole_and_sharded, 2, random_pipeline_dir, home, names, limit=300)
    for name in names:
        whole, sharded = home / name / "whole", home / name / "sharded"
        same_state(whole, sharded)
        same_pictures(whole, sharded)


def same_state(whole: Path, sharded: Path) -> None:
    """Weights, averages, moments and what objectives keep, in the last checkpoint; what is exported and logged."""
    expected, got = tensors_of(whole / "checkpoints"), tensors_of(sharded / "checkpoints")
    assert expected.keys() == got.keys() and {key.split("/")[1] for key in got} >= {"student", "ema", "trained_student"}
    expected |= tensors_of(whole / "student" / "transformer")
    got |= tensors_of(sharded / "student" / "transformer")
    for name in expected:
        assert (expected[name] - got[name]).abs().max() < 1e-5, f"{whole.parent.name}: {name}"
    rows, sharded_rows = rows_of(whole), rows_of(sharded)
    assert len(rows) == len(sharded_rows) == STEPS and rows[0]["loss"] != rows[-1]["loss"]
    for row, sharded_row in zip(rows, sharded_rows, strict=True):
        assert row == pytest.approx(sharded_row, rel=1e-3, abs=1e-5)


def same_pictures(whole: Path, sharded: Path) -> None:
    pictures = sorted(path.name for path in (whole / "samples").glob("epoch_0001_rank_*.png"))
    pictures += sorted(path.name for path in (whole / "samples").glob("teacher_rank_*.png"))
    assert len(pictures) in (len(PROMPTS), 2 * len(PROMPTS))
    for name in pictures:
        one, other = (np.asarray(Image.open(out / "samples" / name), dtype=int) for out in (whole, sharded))
        assert one.std() > 1 and np.abs(one - other).max() <= 1


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.relative_to(folder)}/{name}": tensor.double()
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def rows_of(out: Path) -> list[dict]:
    """What was logged, but for words and what the clock says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ignored = {"step_seconds", "samples_per_second", "objective"}
    return [{key: value for key, value in row.items() if key not in ignored} for row in rows]


# ------------------------------------------------------------------------------------------------ as people run it


@pytest.mark.torchrun
def test_one_prompt_on_two_ranks_does_not_hang(random_pipeline_dir, home):
    how = ["--student_sharding", "hybrid", "--teacher_device_strategy", "balanced", "--sample_teacher"]
    flags = flags_of(random_pipeline_dir, home, "out", "--teacher_substeps", "1", *how, prompts=PROMPTS[:1])
    done = torchrun(PROGRAM, *flags)
    assert done.returncode == 0, done.stderr
    assert "balanced means shard now" in done.stdout and "teacher shard, student hybrid" in done.stdout
    drawn = {path.name for path in (home / "out" / "samples").glob("*_rank_*.png")}
    assert drawn == {"teacher_rank_0_sample_00.png", "epoch_0001_rank_0_sample_00.png"}


# ------------------------------------------------------------------------------------------------ going on

KILLED = 3  # after this step


def _straight_and_resumed(ranks: Ranks, teacher: Path, home: Path) -> None:
    """A sharded run, and two that go on after its third step: sharded, and whole."""
    own = ["--objective", "dmd", *OBJECTIVES["dmd full"].split(), "--checkpoints_total_limit", "9"]
    go(ranks, teacher, home, "straight", *own, *SHARDED, "--checkpointing_steps", str(KILLED))
    own += ["--resume_from_checkpoint", str(checkpoint_of(home / "straight", KILLED))]
    go(ranks, teacher, home, "sharded", *own, *SHARDED)
    go(ranks, teacher, home, "whole", *own)


def checkpoint_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step_{step:08d}"


def test_goes_on_bit_for_bit_sharded_and_closely_otherwise(random_pipeline_dir, home):
    run_ranks(_straight_and_resumed, 2, random_pipeline_dir, home, limit=300)
    expected = tensors_of(checkpoint_of(home / "straight", STEPS))
    same, close = (tensors_of(checkpoint_of(home / name, STEPS)) for name in ("sharded", "whole"))
    assert expected.keys() == same.keys() == close.keys() and "trained_fake_score" in {k.split("/")[0] for k in same}
    for name, tensor in expected.items():
        assert torch.equal(tensor, same[name]), name
        assert (tensor - close[name]).abs().max() < 1e-5, name
    # One rank alone has other batches; what it goes on from is the same: here it only exports that.
    own = ["--objective", "dmd", *OBJECTIVES["dmd full"].split(), "--num_steps", str(KILLED)]
    own += ["--resume_from_checkpoint", str(checkpoint_of(home / "straight", KILLED))]
    go(ALONE, random_pipeline_dir, home, "alone", *own, *SHARDED)
    averages = tensors_of(checkpoint_of(home / "straight", KILLED) / "ema")
    student = WanTransformer3DModel.from_pretrained(home / "alone" / "student", subfolder="transformer")
    for i, parameter in enumerate(student.parameters()):
        assert torch.equal(parameter.double(), averages[f"./weights.{i}"])


# ------------------------------------------------------------------------------------------------ single parts


def _parts(ranks: Ranks, folder: Path) -> dict:
    """Two nodes of one rank each, as far as hybrid sharding can tell."""
    student = load_transformer(folder, "transformer", torch.float32).requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    wrapped = wrap(student, replace(ranks, local_world_size=1), "hybrid")
    twin = copy_network(student)
    latents, t, text = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.ones(1, 5, 17)
    gradients_of = {}
    for travel in (False, True):
        with gradients(wrapped, travel):
            (wrapped(latents * (1 + ranks.rank), t, text, return_dict=False)[0]).square().mean().backward()
        gradients_of[travel] = whole(student.proj_out.weight.grad) if student.proj_out.weight.grad is not None else None
    student.zero_grad()
    phase = Phase("toy", 5, 0.1, "constant", 0, {})
    steps = []
    for precision in ("fp16", "no"):  # fp16 for its loss scaler; nothing computes in it here
        trained = Trained(student, OptimizationConfig(mixed_precision=precision), phase, ranks, wrapped)
        for spoilt in (1, None):  # the rank whose loss is not finite
            was = whole(student.proj_out.weight.detach()).clone()
            loss = wrapped(latents, t, text, return_dict=False)[0].square().mean()
            trained.scaler.scale(loss * (torch.inf if ranks.rank == spoilt else 1)).backward()
            _, updated = trained.step()
            changed = not torch.equal(whole(student.proj_out.weight.detach()), was)
            steps.append((bool(updated), changed, trained.scaler.get_scale()))
    weights = whole_weights(twin)
    return {
        "steps": steps,
        "hybrid_mesh": student.proj_out.weight.device_mesh.mesh.tolist(),
        "waits": gradients_of[False] is None,
        "gradient": gradients_of[True].tolist(),
        "twin_is_untouched": all(torch.equal(weights[name], before[name]) for name in weights),
        "rank_0_has_it": len(weights),
    }


def test_hybrid_meshes_copies_gradients_that_wait_and_steps_that_are_skipped(random_pipeline_dir):
    first, second = run_ranks(_parts, 2, random_pipeline_dir, limit=300)
    assert first["hybrid_mesh"] == [[0], [1]]
    expected = [(False, False, 2.0**15), (True, True, 2.0**15), (False, False, 1.0), (True, True, 1.0)]
    assert first["steps"] == second["steps"] == expected
    assert first["waits"] and second["waits"], "between nodes gradients travel with the last micro-batch"
    assert first["gradient"] == second["gradient"]
    assert first["twin_is_untouched"] and first["rank_0_has_it"] > 50 and not second["rank_0_has_it"]
