"""The exported student is a stock pipeline that draws what the student draws, and names no folder of this machine."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, WanPipeline
from safetensors.torch import load_file

from config.errors import UserError
from models.adapters import Adapted
from models.export import StudentCard, export_lora, export_student
from models.folding import fold_text_attention
from models.student import build_student, read_student_config

TRANSFORMER_CONFIG = "transformer/config.json"


def few_step_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def student_of(folder: Path, pixels_per_patch: int = 16):
    """A two-layer student of a teacher on disk, and that teacher."""
    teacher = WanPipeline.from_pretrained(folder)
    config = json.loads((folder / TRANSFORMER_CONFIG).read_text())
    spec = read_student_config(None, {"transformer": config}, pixels_per_patch, (64, 64))
    student, _ = build_student(spec, teacher.transformer, torch.float32)
    return student.eval(), teacher


def card_of(folder: Path, **changes) -> StudentCard:
    command = [
        "train_distillation.py",
        "--teacher_path",
        str(folder),
        f"--output_dir={folder.parent}",
        "--sample_prompts",
    ]
    return StudentCard(
        teacher=str(folder),
        command=[*command, "A cat's picture"],
        objective="trajectory",
        training_steps=12,
        num_inference_steps=4,
        height=64,
        width=64,
        weights="ema",
        settings={"learning_rate": 1e-4, "teacher_path": folder, "phases": [{"data": str(folder / "prompts.txt")}]},
        **changes,
    )


def rest_of(teacher: WanPipeline) -> dict:
    """What a pipeline has besides its transformers."""
    parts = {name: getattr(teacher, name) for name in ("vae", "text_encoder", "tokenizer")}
    return parts | {"expand_timesteps": teacher.config.expand_timesteps}


def draw(pipe: WanPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    size = dict(num_frames=1, height=64, width=64, num_inference_steps=4)
    return pipe("a red circle", guidance_scale=1.0, generator=generator, **size).frames[0][0]


@pytest.mark.parametrize("family", ["random_pipeline_dir", "random_single_pipeline_dir", "random_ti2v_pipeline_dir"])
def test_the_stock_pipeline_draws_the_students_picture(family, request, tmp_path):
    folder = request.getfixturevalue(family)
    student, teacher = student_of(folder, pixels_per_patch=32)
    expand = teacher.config.expand_timesteps
    expected = draw(WanPipeline(transformer=student, scheduler=few_step_scheduler(), **rest_of(teacher)))
    fold_text_attention(student)  # as in training; nothing of it may show in the export
    export_student(student, few_step_scheduler(), folder, tmp_path / "run" / "student", card_of(folder))
    exported = WanPipeline.from_pretrained(tmp_path / "run" / "student")
    assert exported.transformer_2 is None and exported.config.boundary_ratio is None
    assert exported.config.expand_timesteps == expand and type(exported.scheduler) is DPMSolverMultistepScheduler
    assert expected.std() > 0.01 and np.array_equal(draw(exported), expected)


@pytest.mark.parametrize("family", ["random_single_pipeline_dir", "random_ti2v_pipeline_dir"])
def test_a_lora_and_its_merged_pipeline_draw_alike(family, request, tmp_path):
    folder = request.getfixturevalue(family)
    base, teacher = student_of(folder, pixels_per_patch=32)
    bare = draw(WanPipeline(transformer=base, scheduler=few_step_scheduler(), **rest_of(teacher)))
    student = Adapted(base.requires_grad_(False), "student", rank=3, alpha=1.5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    fold_text_attention(base)
    card = card_of(folder)
    export_student(student, few_step_scheduler(), folder, tmp_path / "merged", card)
    merged = draw(WanPipeline.from_pretrained(tmp_path / "merged"))
    export_lora(
        student, few_step_scheduler(), folder, tmp_path / "lora", dataclasses.replace(card, lora_on="transformer")
    )
    pipe = WanPipeline.from_pretrained(folder, scheduler=few_step_scheduler())
    pipe.load_lora_weights(tmp_path / "lora")
    assert np.abs(draw(pipe) - merged).max() < 1 / 255 < 0.02 < np.abs(bare - merged).max()
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 1.5
    # One takes the other's place, and nothing else's.
    export_lora(
        student, few_step_scheduler(), folder, tmp_path / "merged", dataclasses.replace(card, lora_on="transformer")
    )
    assert not (tmp_path / "merged" / "model_index.json").exists()
    export_student(student, few_step_scheduler(), folder, tmp_path / "lora", card)
    assert (tmp_path / "lora" / "model_index.json").exists()


def test_frozen_parts_are_links_to_the_real_files(random_single_pipeline_dir, tmp_path):
    """Also from a hub snapshot, which is made of symbolic links."""
    snapshot = tmp_path / "snapshot"
    for path in random_single_pipeline_dir.rglob("*.*"):
        link = snapshot / path.relative_to(random_single_pipeline_dir)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    student, _ = student_of(snapshot)
    export_student(student, few_step_scheduler(), snapshot, tmp_path / "student", card_of(snapshot))
    for weights in (
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        exported = tmp_path / "student" / weights
        assert not exported.is_symlink() and exported.samefile(random_single_pipeline_dir / weights)
    transformer = "transformer/diffusion_pytorch_model.safetensors"
    assert not (tmp_path / "student" / transformer).samefile(random_single_pipeline_dir / transformer)


def test_where_links_are_not_possible_files_are_copied(random_single_pipeline_dir, tmp_path, monkeypatch):
    def cross_device(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("models.export.os.link", cross_device)
    student, _ = student_of(random_single_pipeline_dir)
    export_student(student, few_step_scheduler(), random_single_pipeline_dir, tmp_path / "s", card_of(tmp_path))
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "s" / weights).read_bytes() == (random_single_pipeline_dir / weights).read_bytes()
    assert not (tmp_path / "s" / weights).samefile(random_single_pipeline_dir / weights)


def test_no_file_names_a_folder_of_this_machine(random_single_pipeline_dir, tmp_path):
    folder = tmp_path / "secret folder" / "teacher"
    WanPipeline.from_pretrained(random_single_pipeline_dir).save_pretrained(folder)  # notes where it was loaded from
    for config in (
        "vae/config.json",
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        TRANSFORMER_CONFIG,
    ):
        content = json.loads((folder / config).read_text())
        named = {"_name_or_path": str(folder), "name_or_path": "a/hub_id", "special_tokens_map_file": str(folder / "x")}
        (folder / config).write_text(json.dumps(content | named))
    student, _ = student_of(folder)
    export_student(student, few_step_scheduler(), folder, tmp_path / "student", card_of(folder))
    files = [path for path in (tmp_path / "student").rglob("*") if path.is_file()]
    roots = (str(tmp_path), "secret folder/", str(random_single_pipeline_dir.parent), "name_or_path")
    leaks = [(path.name, root) for path in files for root in roots if root.encode() in path.read_bytes()]
    assert len(files) > 8 and leaks == []
    assert json.loads((folder / "vae/config.json").read_text())["_name_or_path"]  # the teacher's own file stays


def test_card(random_single_pipeline_dir, tmp_path):
    student, _ = student_of(random_single_pipeline_dir)
    card = card_of(random_single_pipeline_dir)
    export_student(student, few_step_scheduler(), random_single_pipeline_dir, tmp_path / "student", card)
    text = (tmp_path / "student" / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\n") and "base_model" not in text
    assert """train_distillation.py --teacher_path single --output_dir=""" in text
    assert """--sample_prompts 'A cat'"'"'s picture'""" in text
    assert "num_inference_steps=4" in text and "guidance_scale=1.0" in text and "Training steps: 12" in text
    assert '| phases | `[{"data": "prompts.txt"}]` |' in text
    hub = dataclasses.replace(card, teacher="Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    export_student(student, few_step_scheduler(), random_single_pipeline_dir, tmp_path / "student", hub)
    text = (tmp_path / "student" / "README.md").read_text()
    assert "base_model: Wan-AI/Wan2.2-T2V-A14B-Diffusers\n" in text


def test_a_later_export_replaces_an_earlier_one_whole(random_single_pipeline_dir, tmp_path):
    teacher, target = random_single_pipeline_dir, tmp_path / "student"
    student, _ = student_of(teacher)
    vae = (teacher / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    export_student(student, few_step_scheduler(), teacher, target, card_of(teacher))
    (target / "left_over.txt").write_text("of the earlier export")
    (tmp_path / ".student.new").mkdir()  # left by a run that was killed
    (tmp_path / ".student.old").mkdir()
    with torch.no_grad():
        student.proj_out.bias.fill_(7.0)
    export_student(student, few_step_scheduler(), teacher, target, card_of(teacher), torch.bfloat16)
    weights = load_file(target / "transformer/diffusion_pytorch_model.safetensors")
    assert weights["proj_out.bias"].dtype == torch.bfloat16 and weights["proj_out.bias"].eq(7).all()
    assert weights["scale_shift_table"].dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["student"] and not (target / "left_over.txt").exists()
    assert (teacher / "vae/diffusion_pytorch_model.safetensors").read_bytes() == vae


def test_a_failing_export_leaves_the_earlier_one(random_single_pipeline_dir, tmp_path, monkeypatch):
    teacher, target = random_single_pipeline_dir, tmp_path / "student"
    student, _ = student_of(teacher)
    export_student(student, few_step_scheduler(), teacher, target, card_of(teacher))
    before = {path: path.stat().st_ino for path in target.rglob("*")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.export.model_card", full)
    with pytest.raises(OSError, match="No space left"):
        export_student(student, few_step_scheduler(), teacher, target, card_of(teacher))
    assert {path: path.stat().st_ino for path in target.rglob("*")} == before


def test_what_is_no_export_is_never_replaced(random_single_pipeline_dir, tmp_path):
    teacher = random_single_pipeline_dir
    student, _ = student_of(teacher)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("unsaved")
    for target, message in ((tmp_path / "thesis", "is no exported student"), (teacher, "would replace its teacher")):
        with pytest.raises(UserError, match=message):
            export_student(student, few_step_scheduler(), teacher, target, card_of(teacher))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "unsaved" and (teacher / "transformer").is_dir()
