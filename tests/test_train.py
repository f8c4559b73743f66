"""The program as people run it: plain python and real torchrun, on a small pipeline with random weights."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from PIL import Image

from config.config import load_config
from config.errors import UserError
from distillation.objective import settings_of
from distillation.plan import check_8bit_adam, check_memory, describe, make_plan
from distillation.run_folder import begin_run
from distributed.process_group import Ranks
from tests.test_review import row_of

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False)
ROOT = Path(__file__).parent.parent
PROGRAM = str(ROOT / "train_distillation.py")
PROMPTS = ["a cat", "a dog on a hill", "some bird", "a fish", "five green apples"]
KEYS = {
    "file", "prompt", "prompt_index", "epoch", "step", "rank", "seed", "sampler", "num_inference_steps", "eta", "shift",
    "weights", "phase", "height", "width", "seconds", "ok", "error", "scores",
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
def test_a_lora_draws_the_same_from_its_card_and_from_its_folder(random_pipeline_dir, tmp_path):
    extra = ["--lora_rank", "4", "--lora_alpha", "2", "--lr", "3e-2", "--use_ema", "--gradient_checkpointing"]
    done = torchrun(PROGRAM, *flags(random_pipeline_dir, tmp_path / "out", *extra))
    assert done.returncode == 0, done.stderr
    student, samples = tmp_path / "out" / "student", tmp_path / "out" / "samples"
    assert {path.name for path in student.iterdir()} == {
        "pytorch_lora_weights.safetensors", "scheduler", "distillation.json", "README.md",
    }  # fmt: skip
    row = next(r for r in read_rows(samples / "manifest.jsonl") if r["epoch"] == 2 and r["rank"] == 1)
    drawn = np.asarray(Image.open(samples / row["file"]), dtype=int)
    card = (student / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    here = {
        '"cuda"': '"cpu"',
        "torch.bfloat16": "torch.float32",
        '"path/to/this/folder"': repr(str(student)),
        f'"{random_pipeline_dir.name}"': repr(str(random_pipeline_dir)),
        '"a prompt"': f"{row['prompt']!r}, generator=torch.Generator().manual_seed({row['seed']})",
        '"picture.png"': repr(str(tmp_path / "picture.png")),
    }
    for there, now in here.items():
        assert there in code, there
        code = code.replace(there, now)
    exec(code, {})
    picture = np.asarray(Image.open(tmp_path / "picture.png"), dtype=int)
    assert np.abs(picture - drawn).max() <= 1
    exec(code.replace("pipe.load_lora_weights(student)", ""), {})
    bare = np.asarray(Image.open(tmp_path / "picture.png"), dtype=int)
    assert np.abs(bare - drawn).max() > 3, "the adapters make a difference"

    again = ["--sample_only", "--student_path", str(student), "--output_dir", str(tmp_path / "again")]
    again += ["--sample_prompts", *PROMPTS[:3]]
    refused = run(PROGRAM, *again)
    assert refused.returncode == 2
    assert f"is a LoRA on {random_pipeline_dir.name}; give that pipeline" in refused.stderr
    done = run(PROGRAM, *again, "--teacher_path", str(random_pipeline_dir))
    assert done.returncode == 0, done.stderr
    alone = Image.open(tmp_path / "again" / "samples" / "epoch_0000_rank_0_sample_02.png")
    assert np.abs(np.asarray(alone, dtype=int) - drawn).max() <= 1


@pytest.mark.torchrun
def test_phases_of_all_objectives_run_through_and_a_drift_of_contrast_ends_one(random_pipeline_dir, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("""
        [[phase]]
        objective = "trajectory"
        states = "student"
        steps = 1
        [[phase]]
        objective = "consistency"
        target_decay = 0.9
        teacher_substeps = 2
        steps = 1
        [[phase]]
        objective = "dmd"
        fake_score = "lora"
        fake_lora_rank = 2
        fake_warmup_steps = 1
        anchor_weight = 0.1
        steps = 2
        [[phase]]
        objective = "dmd"
        fake_score = "full"
        fake_learning_rate = 1e-4
        fake_updates = 2
        contrast_every = 2
        contrast_warning = 1e-6
        contrast_stop = 1e-6
        steps = 50
    """)
    given = flags(random_pipeline_dir, tmp_path / "out", "--config", str(recipe))
    at = given.index("--num_steps")
    done = torchrun(PROGRAM, *given[:at], *given[at + 2 :])
    assert done.returncode == 0, done.stderr
    assert "step 7: contrast is" in done.stderr and "dmd ends here" in done.stderr
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [(row["step"], row["phase"], row["objective"]) for row in rows] == [
        (1, 1, "trajectory"), (2, 2, "consistency"), (3, 3, "dmd"), (4, 3, "dmd"), (5, 4, "dmd"), (6, 4, "dmd"),
        (7, 4, "dmd"),
    ]  # fmt: skip
    assert "loss" not in rows[2] and "anchor" in rows[3] and rows[4]["fake_score_2_lr"] == 1e-4
    drawn = read_rows(tmp_path / "out" / "samples" / "manifest.jsonl")
    phases = {row["step"]: row["phase"] for row in drawn}
    assert phases == {2: "2 consistency", 4: "3 dmd", 6: "4 dmd", 7: "4 dmd"}
    assert "phase 4 dmd" in (tmp_path / "out" / "samples" / "index.html").read_text()


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


@pytest.mark.torchrun
def test_users_mistake_under_torchrun_is_said_once(random_pipeline_dir, tmp_path):
    done = torchrun(PROGRAM, *flags(random_pipeline_dir, tmp_path / "out", "--width", "40"))
    assert done.returncode != 0
    # torchrun adds its own summary, and ends with its own code; the ranks say it once, without a traceback.
    assert done.stderr.count("--width is 40") == 1 and "exitcode  : 2" in done.stderr, done.stderr
    assert "UserError" not in done.stderr


def test_phases_run_one_after_the_other(random_pipeline_dir, tmp_path):
    recipe = tmp_path / "recipe.toml"
    phase = '[[phase]]\nobjective = "{}"\nsteps = {}\nlearning_rate = {}\n'
    recipe.write_text(phase.format("velocity", 2, 1e-3) + phase.format("trajectory", 3, 5e-4))
    argv = flags(random_pipeline_dir, tmp_path / "out", "--config", str(recipe), "--gradient_accumulation_steps", "2")
    for flag in ("--num_steps", "--lr"):
        del argv[(i := argv.index(flag)) : i + 2]
    done = run(PROGRAM, *argv)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [(row["step"], row["phase"], row["objective"], row["lr"]) for row in rows] == [
        (1, 1, "velocity", 1e-3), (2, 1, "velocity", 1e-3),
        (3, 2, "trajectory", 5e-4), (4, 2, "trajectory", 5e-4), (5, 2, "trajectory", 5e-4),
    ]  # fmt: skip
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["resolved"]
    assert [phase["learning_rate"] for phase in facts["phases"]] == [1e-3, 5e-4] and facts["guidance_scale"] == 4


def test_phases_are_checked_before_the_first_one_runs(random_pipeline_dir, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[phase]]\nobjective = "trajectory"\nsteps = 1\n'
        '[[phase]]\nobjective = "velocity"\nsteps = 1\nupdates_per_rollout = 17\n'
    )
    argv = flags(random_pipeline_dir, tmp_path / "out", "--config", str(recipe))
    del argv[(i := argv.index("--num_steps")) : i + 2]
    with pytest.raises(UserError, match="updates_per_rollout 17.* 16 states"):
        plan_of(argv)


def plan_of(argv: list[str]):
    config = load_config(argv, settings_of)
    return config, make_plan(config, ALONE)


def test_what_no_gpu_can_hold_is_refused_with_the_sum(random_pipeline_dir, tmp_path, monkeypatch):
    """Per parameter, in float32: 20 bytes of the student with its average, 8 of the experts."""
    _, plan = plan_of([*flags(random_pipeline_dir, tmp_path / "out"), "--use_ema"])
    student = WanTransformer3DModel.from_pretrained(random_pipeline_dir, subfolder="transformer_2")
    parameters, buffers = (sum(t.numel() for t in tensors) for tensors in (student.parameters(), student.buffers()))
    vae = AutoencoderKLWan.from_pretrained(random_pipeline_dir, subfolder="vae")
    assert plan.memory.least == 28 * parameters + 12 * buffers + sum(p.nbytes for p in vae.parameters())
    for there, fits in {plan.memory.least - 1: False, plan.memory.least: True}.items():
        card = SimpleNamespace(total_memory=there)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        with nullcontext() if fits else pytest.raises(UserError, match="optimizer alone need .* --dry_run says which"):
            check_memory(plan.memory, plan.info, torch.device("cuda"))


def test_a_lora_counts_what_it_trains_and_the_base_once(random_pipeline_dir, tmp_path):
    config, plan = plan_of([*flags(random_pipeline_dir, tmp_path / "out"), "--rank", "4"])
    trained = 4 * 3 * (8 * (24 + 24) + 2 * (24 + 64))  # rank, blocks, attention, feed-forward
    student, teacher = (plan.memory.stages["load"][part] for part in ("student", "teacher"))
    base = WanTransformer3DModel.from_pretrained(random_pipeline_dir / "transformer")
    tensors = [*base.parameters(), *base.buffers()]
    assert (student.weights, teacher.weights) == (4 * trained, 2 * sum(tensor.nbytes for tensor in tensors))
    stage = next(stage for name, stage in plan.memory.stages.items() if name.endswith("backward ends"))
    assert (stage["student"].gradients, stage["student"].optimizer) == (4 * trained, 8 * trained)
    assert "LoRA of rank 4 on the teacher's transformer_2" in describe(plan, config, ALONE)
    _, plan = plan_of([*flags(random_pipeline_dir, tmp_path / "out"), "--rank", "4", "--objective", "consistency"])
    assert any(stage.get("consistency's networks") for stage in plan.memory.stages.values())
    assert all(s["consistency's networks"].weights == 4 * trained for s in list(plan.memory.stages.values())[2:])


def test_8_bit_adam_is_refused_without_a_gpu_or_its_package(random_pipeline_dir, tmp_path, monkeypatch):
    given = [*flags(random_pipeline_dir, tmp_path / "out"), "--use_8bit_adam"]
    with pytest.raises(UserError, match="--use_8bit_adam: needs an NVIDIA GPU, and this run is on cpu"):
        plan_of(given)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(UserError, match="--use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes"):
        check_8bit_adam(torch.device("cuda"))


def test_compile_without_a_compiler_is_a_mistake_that_is_named(random_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    done = run(PROGRAM, *flags(random_pipeline_dir, tmp_path / "out", "--compile"))
    assert done.returncode == 2, done.stderr
    assert "error: --compile: torch.compile does not work here" in done.stderr
    assert "/no/such/compiler" in done.stderr and "needs a C++ compiler such as g++" in done.stderr


def test_a_smaller_student_is_no_lora(random_pipeline_dir, tmp_path):
    path = tmp_path / "half.json"
    path.write_text('{"height": 32, "width": 32, "num_layers": 2}')
    given = [*flags(random_pipeline_dir, tmp_path / "out"), "--student_config", str(path)]
    plan_of(given)
    with pytest.raises(UserError, match="half.json: num_layers is 2, the teacher's is 3; with --lora_rank"):
        plan_of([*given, "--lora_rank", "4"])


def test_two_experts_are_no_student(random_pipeline_dir, tmp_path):
    student = ["--sample_only", "--student_path", str(random_pipeline_dir), "--output_dir", str(tmp_path)]
    done = run(PROGRAM, *student, "--sample_prompts", "a cat")
    assert done.returncode == 2 and "has two experts" in done.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_another_run_s_results_go_only_when_asked(random_pipeline_dir, tmp_path, inside):
    out = tmp_path / "out"
    samples = out / "samples" if inside else tmp_path / "shared_samples"
    samples.mkdir(parents=True)
    drawn, own = samples / "epoch_0001_rank_0_sample_00.png", samples / "my_notes.txt"
    for path in (drawn, own, out / "student" / "model_index.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (samples / "manifest.jsonl").write_text(json.dumps(row_of(0)) + "\n")
    argv = flags(random_pipeline_dir, out, "--sample_dir", str(samples))
    with pytest.raises(UserError, match="holds another run"):
        begin_run(*plan_of(argv), None)
    assert drawn.exists() and not (out / "config.json").exists()
    begin_run(*plan_of([*argv, "--overwrite_output_dir"]), None)
    assert drawn.exists() != inside, "pictures outside the output folder may be another run's"
    assert own.exists() and (out / "student" / "model_index.json").exists() and (out / "config.json").exists()
