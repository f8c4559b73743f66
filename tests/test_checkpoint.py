"""Checkpoints: whole or not there, found again, and good for going on bit for bit."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config.config import load_config
from config.errors import UserError
from distillation.objective import settings_of
from distillation.trackers import Trackers
from distributed import checkpoint
from distributed.checkpoint import (
    CheckpointFailed,
    Checkpoints,
    find_checkpoint,
    join,
    list_checkpoints,
    read_facts,
    read_part,
    split,
    what_is_broken,
)
from distributed.process_group import Ranks, barrier
from distributed.stop import StopSignal
from tests.ranks import run_ranks

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False)


def state_at(step: int) -> dict:
    return {
        "network": {"layer.weight": torch.full((3, 2), float(step)), "steps": torch.tensor(step)},
        "optimizer": {"moments": {"0": {"exp_avg": torch.ones(2, dtype=torch.bfloat16)}}, "betas": [0.9, 0.99]},
        "counters": {"rate": 0.1 + 0.2, "none": None, "words": ["a", "ü"]},
    }


def save(folder: Path, *steps: int, keep: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep, ALONE)
    for step in steps:
        checkpoints.save(step, state_at(step), {"seconds": step})
    checkpoints.finish()
    return checkpoints


# ------------------------------------------------------------------------------------------------ whole


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, 7)
    folder = find_checkpoint("latest", tmp_path, ALONE)
    assert folder.name == "step_00000007" and not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".pkl")]
    facts = read_facts(folder)
    assert (facts["step"], facts["world_size"], facts["ranks"]) == (7, 1, [{"seconds": 7}])
    network, optimizer = read_part(folder, facts, "network"), read_part(folder, facts, "optimizer")
    assert torch.equal(network["layer.weight"], torch.full((3, 2), 7.0)) and network["steps"].item() == 7
    assert network["steps"].dtype == torch.int64 and network["steps"].shape == ()
    assert optimizer["moments"]["0"]["exp_avg"].dtype == torch.bfloat16 and optimizer["betas"] == [0.9, 0.99]
    assert read_part(folder, facts, "counters") == state_at(7)["counters"], "numbers come back exactly"


def test_split_and_join_are_inverse():
    state = state_at(3)
    parts, facts = split(state)
    back = join(json.loads(json.dumps(facts)), parts)
    assert back.keys() == state.keys() and back["network"]["steps"] is state["network"]["steps"]


def test_training_may_change_what_is_being_written(tmp_path, monkeypatch):
    weights, checkpoints = torch.zeros(4), Checkpoints(tmp_path, None, ALONE)
    write = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *args: (weights.fill_(1), write(*args)))
    checkpoints.save(1, {"network": {"w": weights}}, {})
    checkpoints.finish()
    folder = tmp_path / "step_00000001"
    assert read_part(folder, read_facts(folder), "network")["w"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("keep, left", [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_old_ones_go_when_the_new_one_is_whole(keep, left, tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=keep)
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == left
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_write_that_fails_leaves_the_last_one_and_is_told(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1, keep=1)

    def full_disk(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_json", full_disk)
    checkpoints.save(2, state_at(2), {})
    with pytest.raises(CheckpointFailed, match="step_00000002 could not be written: OSError: .*No space left"):
        checkpoints.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"] and what_is_broken(
        tmp_path / "step_00000001"
    ) is None


def test_a_tensor_that_cannot_be_written_is_told_too(tmp_path):
    """torch's own exception for that is no Exception."""
    checkpoints, limits = save(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # files stay smaller, as on a disk that is full
    try:
        checkpoints.save(2, state_at(2), {})
        with pytest.raises(CheckpointFailed, match="step_00000002 could not be written: .*File too large"):
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


# ------------------------------------------------------------------------------------------------ found again


def break_file(folder: Path, how: str) -> None:
    weights = folder / "network" / "model-00001-of-00001.safetensors"
    if how == "torn":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "flipped":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
    elif how == "missing":
        weights.unlink()
    elif how == "no index":
        (folder / "index.json").unlink()
    else:
        (folder / "index.json").write_text("{}" if how == "empty index" else "[1")


@pytest.mark.parametrize("how", ["torn", "flipped", "missing", "no index", "empty index", "bad index"])
def test_a_broken_one_is_found_out_and_the_one_before_taken(how, tmp_path, caplog):
    save(tmp_path, 1, 2)
    break_file(tmp_path / "step_00000002", how)
    assert find_checkpoint("latest", tmp_path, ALONE).name == "step_00000001"
    assert "step_00000002 cannot be used" in caplog.text
    with pytest.raises(UserError, match="cannot be used"):
        find_checkpoint("step_00000002", tmp_path, ALONE)
    break_file(tmp_path / "step_00000001", how)
    with pytest.raises(UserError, match="all 2 checkpoints .* are broken"):
        find_checkpoint("latest", tmp_path, ALONE)


def test_the_latest_of_none_is_none_and_another_must_be_there(tmp_path):
    assert find_checkpoint("latest", tmp_path / "checkpoints", ALONE) is None
    with pytest.raises(UserError, match="--resume_from_checkpoint step_9: no such folder"):
        find_checkpoint("step_9", tmp_path, ALONE)
    save(tmp_path, 9)
    for asked in ("step_00000009", str(tmp_path / "step_00000009")):
        assert find_checkpoint(asked, tmp_path, ALONE) == tmp_path / "step_00000009"


# ------------------------------------------------------------------------------------------------ bit for bit

RECIPE = """
[[phase]]
objective = "velocity"
updates_per_rollout = 2
rollout_passes = 2
steps = 2
[[phase]]
objective = "trajectory"
jumps = 4
teach = "student"
teacher_substeps = 2
steps = 3
[[phase]]
objective = "consistency"
target_decay = 0.9
teacher_substeps = 2
steps = 3
[[phase]]
objective = "dmd"
fake_score = "lora"
fake_lora_rank = 2
fake_warmup_steps = 1
fake_updates = 2
anchor_weight = 0.1
contrast_every = 1
steps = 3
[[phase]]
objective = "dmd"
fake_score = "full"
fake_updates = 1
contrast_every = 2
contrast_warning = 1e-6
contrast_stop = 1e-6
steps = 50
"""
PROMPTS = ["a cat", "a dog on a hill", "some bird", "a fish", "five green apples"]
STOPS = (1, 4, 7, 9, 10)  # within each phase, and at the end of one
TIMES = {"step_seconds", "samples_per_second"}


def _go(ranks: Ranks, teacher: Path, out: Path, *more: str) -> None:
    from train_distillation import train

    flags = [
        "--config", str(out.parent / "recipe.toml"), "--teacher_path", str(teacher), "--data_path",
        str(out.parent / "prompts.txt"), "--output_dir", str(out), "--height", "32", "--width", "32",
        "--student_steps", "2", "--steps_per_epoch", "5", "--batch_size", "1", "--gradient_accumulation_steps", "2",
        "--logging_steps", "2", "--lr", "1e-3", "--lr_scheduler", "cosine", "--use_ema", "--score", "none",
        "--sample_prompts", *PROMPTS[:3], *more,
    ]  # fmt: skip
    config = load_config(flags, settings_of)
    with Trackers(config.run, ranks.is_main) as trackers:
        train(config, ranks, trackers, StopSignal())


def _straight_and_resumed(ranks: Ranks, teacher: Path, folder: Path, stops: tuple[int, ...], *more: str) -> None:
    straight = folder / "straight"
    _go(ranks, teacher, straight, "--checkpointing_steps", "1", "--checkpoints_total_limit", "99", *more)
    for step in stops:
        out = folder / f"resumed_{step}"
        if ranks.is_main:  # as a run leaves it that is killed a little later
            name = f"step_{step:08d}"
            shutil.copytree(straight / "checkpoints" / name, out / "checkpoints" / name)
            shutil.copy(straight / "metrics.jsonl", out / "metrics.jsonl")
        barrier()
        _go(ranks, teacher, out, "--resume_from_checkpoint", "latest", *more)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_objective_goes_on_bit_for_bit(world_size, random_pipeline_dir, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run_ranks(_straight_and_resumed, world_size, random_pipeline_dir, tmp_path, STOPS)
    last = list_checkpoints(tmp_path / "straight" / "checkpoints")[-1]
    expected, rows = bits_of(last), rows_of(tmp_path / "straight")
    assert len(rows) > 5 and rows[-1]["objective"] == "dmd"
    assert {name.split("/")[0] for name in expected} >= {"student", "ema", "trained_student", "trained_fake_score"}
    for step in STOPS:
        out = tmp_path / f"resumed_{step}"
        assert bits_of(out / "checkpoints" / last.name) == expected, f"resumed after step {step}"
        assert rows_of(out) == rows, f"resumed after step {step}"


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_at_the_same_step_and_prompt(
    before, after, random_pipeline_dir, tmp_path, capfd
):
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "out"
    run_ranks(_go, before, random_pipeline_dir, out, "--num_steps", "3")
    run_ranks(_go, after, random_pipeline_dir, out, "--num_steps", "6", "--resume_from_checkpoint", "latest")
    assert f"written by {before} ranks, now {after}: goes on, but not bit for bit" in capfd.readouterr().out
    assert [row["step"] for row in rows_of(out)] == [2, 3, 4, 6]
    facts = [read_facts(folder) for folder in list_checkpoints(out / "checkpoints")]
    # Two micro-batches of one prompt a rank and step.
    consumed = [each["state"]["prompts"]["consumed"] for each in facts]
    assert consumed == [3 * 2 * before, 3 * 2 * before + 3 * 2 * after]
    assert [(each["step"], each["world_size"], len(each["ranks"])) for each in facts] == [
        (3, before, before), (6, after, after),
    ]  # fmt: skip


BEGUN = {  # flags of a run, and what a resumed one cannot have instead
    "--objective trajectory": {
        "--teach student --teacher_substeps 2": "its phase 1 has teach teacher, not student",
        "--objective velocity": "its phase 1 is trajectory, not velocity",
        "--lora_rank 2": "its student has another shape",
    },
    "--objective consistency --target_decay 0 --teacher_substeps 1": {
        "--target_decay 0.9": "its phase 1 has target_decay 0, not above 0",
    },
    "--objective dmd --fake_lora_rank 2 --fake_updates 1": {
        "--fake_score full": "its phase 1 has fake_score lora, not full",
        "--fake_lora_rank 4": "its phase 1 has fake_lora_rank 2, not 4",
    },
}


@pytest.mark.parametrize("flags", BEGUN)
def test_what_a_checkpoint_s_state_depends_on_cannot_be_changed(flags, random_pipeline_dir, tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run_ranks(_go, 1, random_pipeline_dir, tmp_path / "out", *flags.split(), "--num_steps", "1")
    for changed, words in BEGUN[flags].items():
        more = [*flags.split(), "--num_steps", "2", "--resume_from_checkpoint", "latest", *changed.split()]
        with pytest.raises(UserError, match=f"--resume_from_checkpoint .*: {words}"):
            _go(ALONE, random_pipeline_dir, tmp_path / "out", *more)


def test_what_a_killed_writer_leaves_is_no_checkpoint_and_goes_at_the_next_start(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step_00000002.tmp" / "student").mkdir(parents=True)
    assert find_checkpoint("latest", tmp_path, ALONE).name == "step_00000001"
    Checkpoints(tmp_path, None, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_lora_goes_on_bit_for_bit_and_its_checkpoints_hold_no_base(random_pipeline_dir, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE[: RECIPE.rindex("[[phase]]")])
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    more = ("--lora_rank", "2", "--gradient_checkpointing", "--no_save_samples")
    stops = (4, 7, 10)  # with a copy of the student, with its average, with adapters of a fake score beside it
    run_ranks(_straight_and_resumed, 1, random_pipeline_dir, tmp_path, stops, *more)
    last = list_checkpoints(tmp_path / "straight" / "checkpoints")[-1]
    expected, rows = bits_of(last), rows_of(tmp_path / "straight")
    for step in stops:
        out = tmp_path / f"resumed_{step}"
        assert bits_of(out / "checkpoints" / last.name) == expected, f"resumed after step {step}"
        assert rows_of(out) == rows, f"resumed after step {step}"
    checkpoint = bits_of(tmp_path / "straight" / "checkpoints" / "step_00000007")
    adapters = sum(len(bits) for name, bits in checkpoint.items() if name.startswith("student/"))
    parts = ("student", "ema", "objective", "trained_student")
    held = {part: sum(len(b) for n, b in checkpoint.items() if n.startswith(f"{part}/")) for part in parts}
    assert adapters == 4 * 2 * 3 * (8 * (24 + 24) + 2 * (24 + 64))  # bytes, rank, blocks, attention, feed-forward
    assert held["ema"] == held["objective"] == adapters and held["trained_student"] < 2.5 * adapters


def bits_of(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint."""
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            tensors[f"{file.parent.name}/{name}"] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tensors


def rows_of(folder: Path) -> list[dict]:
    """What was logged, but for what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
