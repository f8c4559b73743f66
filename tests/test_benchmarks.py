"""The yardstick measures what it says: right captions, all forwards, and the literal stock pipeline's pictures."""

import json
import os
import random
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from benchmarks import features, gpu, landscapes, objectives, quality, shapes, training
from config.config import load_config
from config.errors import UserError
from data.scenes import draw, parse_caption
from distillation.objective import settings_of
from distillation.plan import make_plan
from distributed.process_group import Ranks

CAPTIONS = quality.held_out_captions(4, seed=0)


@pytest.fixture(scope="module")
def folded(random_pipeline_dir) -> quality.Measured:
    settings = quality.Settings(seed=5, batch_size=3)
    return quality.measure(random_pipeline_dir, CAPTIONS, 2, 4.0, settings)


def test_a_random_pipeline_is_measured(folded):
    assert folded.right == 0 and len(folded.problems) == len(folded.pictures) == 4
    assert folded.forwards_per_picture == 4 and folded.seconds_per_picture > 0  # 2 steps, with and without the caption


def test_folded_text_and_batches_draw_the_stock_pipelines_pictures(folded, random_pipeline_dir):
    """Also with one call a picture, so that neither folding nor batching nor its neighbours show in a picture."""
    pipeline = WanPipeline.from_pretrained(random_pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    settings = quality.Settings(seed=5, batch_size=1, fold=False)
    literal = quality.measure(pipeline, CAPTIONS, 2, 4.0, settings)
    pairs = [[np.asarray(m.pictures[i], dtype=int) for m in (folded, literal)] for i in range(4)]
    assert max(np.abs(a - b).max() for a, b in pairs) <= 1
    assert min(a.std() for a, _ in pairs) > 2 and np.abs(pairs[0][0] - pairs[1][0]).max() > 20


def test_a_share_is_that_of_the_captions_read_back_right(monkeypatch):
    """With drawn scenes in the pipeline's place, one of them of another caption."""
    pictures = [draw(parse_caption(caption), random.Random(i)) for i, caption in enumerate(CAPTIONS)]
    pictures[2] = pictures[3]
    monkeypatch.setattr(quality, "load", lambda *args: None)
    monkeypatch.setattr(quality, "draw", lambda *args: (pictures, 16, 2.0))
    row = quality.measure("a_student", CAPTIONS, 4, 1.0)
    assert row.right == 0.75 and [p is None for p in row.problems] == [True, True, False, True]
    assert row.right_error == pytest.approx(0.2165, abs=1e-4)
    cells = [cell.strip() for cell in quality.table([row]).splitlines()[-1].split("|")[1:-1]]
    assert cells == ["student a_student", "4", "none", "75.0% ± 21.7%", "4", "0.5000"]
    counts = quality.figures(replace(row, problems=["nothing is red", "nothing is blue", "no shape", None]))
    assert counts["problems"] == {"nothing is <colour>": 2, "no shape": 1} and counts["right"] == 0.25


@pytest.mark.parametrize(
    "problem, kind",
    [
        ("the background is red, not pink", "the background is <colour>, not <colour>"),
        ("a small red star in place of a large red ring", "a {0} in place of a {0}"),
        ("on the right, not in the top right", "<place>, not <place>"),
        ("left of, not above", "<relation>, not <relation>"),
        ("smeared: the red star is blurred by 2.1 pixels", "smeared: the <colour> <shape> is blurred by <n> pixels"),
        ("3 shapes, not 2", "<n> shapes, not <n>"),
    ],
)
def test_kinds_of_problems(problem, kind):
    assert quality.kind_of(problem) == kind.format("<size> <colour> <shape>")


def test_command(random_single_pipeline_dir, tmp_path, capsys):
    teacher, student = str(random_single_pipeline_dir), tmp_path / "student"
    student.symlink_to(random_single_pipeline_dir)
    out = ["--grid", str(tmp_path / "new" / "grid.png"), "--json", str(tmp_path / "figures.json"), "--problems"]
    size = ["--count", "3", "--teacher_steps", "2", "--student_steps", "1", "--threads", "1", "--no_features"]
    quality.main(["--teacher", teacher, "--student", str(student), *size, *out])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(r["role"], r["steps"], r["forwards_per_picture"]) for r in rows] == [("teacher", 2, 4), ("student", 1, 1)]
    assert "captions right" in capsys.readouterr().out and (tmp_path / "new" / "grid.png").stat().st_size > 1000


def test_students_are_drawn_as_large_as_they_say(random_single_pipeline_dir, tmp_path):
    sizes = {"wide": (32, 48), "the_same": (32, 48), "tall": (48, 48), "silent": (64, 64)}
    for name, (height, width) in sizes.items():
        shutil.copytree(random_single_pipeline_dir, tmp_path / name, copy_function=os.symlink)
        if name != "silent":
            drawing = {"height": height, "width": width, "num_inference_steps": 3}
            (tmp_path / name / "distillation.json").write_text(json.dumps(drawing))

    def drawn_at(names: list[str], *more: str):
        given = ["--teacher", str(random_single_pipeline_dir), "--student", *(str(tmp_path / name) for name in names)]
        jobs, height, width = quality.make_jobs(quality.build_parser().parse_args([*given, *more]))
        return [job.steps for job in jobs[1:]], height, width

    assert drawn_at(["wide", "the_same"]) == ([[3], [3]], 32, 48)
    assert drawn_at(["silent"]) == ([[4]], 64, 64)
    assert drawn_at(["wide", "tall"], "--height", "96") == ([[3], [3]], 96, 48)
    with pytest.raises(UserError, match="--height: the students draw with 32, 48 pixels; accepted: one for all"):
        drawn_at(["wide", "tall"])


def mean_colours(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.tensor(np.asarray(p)).double().mean((0, 1)) for p in pictures])


def test_command_compares_with_the_teacher_s_other_pictures(random_single_pipeline_dir, tmp_path, monkeypatch):
    """With the pictures' mean colours in the network's place: the teacher against itself is what it should be."""
    monkeypatch.setattr(quality, "Features", lambda device: mean_colours)
    monkeypatch.setattr(quality, "DIVERSITY_CAPTIONS", 2)
    monkeypatch.setattr(quality, "DIVERSITY_SEEDS", 2)
    teacher, out = str(random_single_pipeline_dir), tmp_path / "figures.json"
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fish\n")
    size = ["--teacher_steps", "2", "1", "--threads", "1", "--height", "32", "--width", "48"]
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    quality.main(["--teacher", teacher, "--features", "--json", str(out), *size, *prompts])
    same, fewer = json.loads(out.read_text())["rows"]
    assert same["diversity"] == 1 and fewer["diversity"] != 1 and "right" not in same
    assert same["frechet"] > 0.01 and same["contrast"] != 1  # the other pictures are from other noise


def test_a_folder_without_a_pipeline_is_one_line(random_single_pipeline_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        quality.main(["--teacher", str(random_single_pipeline_dir), "--student", str(tmp_path), "--threads", "1"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"error: --student {tmp_path}: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--height", "100"], "--height is 100; accepted are multiples of 16"),
        (["--guidance_scale_2", "2"], "--guidance_scale_2: .* has one expert"),
        (["--grid", "out.jpeg"], "--grid out.jpeg: accepted is a name that ends in .png"),
        (["--count", "1", "--features"], "Fréchet distance needs two captions or more"),
        (["--dtype", "float16"], "--dtype float16: a CPU cannot run it"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_is_drawn(
    flags, words, random_single_pipeline_dir, monkeypatch, capsys
):
    monkeypatch.setattr(quality, "load", lambda *given: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as ended:
        quality.main(["--teacher", str(random_single_pipeline_dir), "--threads", "1", *flags])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.match(f"error: {words}", said) and said.count("\n") == 1


def test_both_experts_guidance_is_told():
    row = quality.Measured("a_teacher", "teacher", 50, 4.0, [], None, 0, 0.0)
    assert row.guidance == "4" and replace(row, guidance_scale_2=2.5).guidance == "4 / 2.5"
    assert replace(row, guidance_scale=1.0, guidance_scale_2=2.5).guidance == "none"


# ------------------------------------------------------------------------------------------------ features


def test_frechet_distance_is_the_formula_s():
    torch.manual_seed(0)
    a, b = torch.randn(200, 5).double(), torch.randn(150, 5).double() @ torch.randn(5, 5).double() + 0.3
    covariances = [torch.cov(x.T) for x in (a, b)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ values.sqrt().diag() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * shared
    assert features.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert features.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert features.frechet_distance(a, a + 0.5) == pytest.approx(5 * 0.25, rel=1e-9)


def test_mean_distance_counts_pairs_of_one_group_alone():
    points = torch.tensor([[0.0], [1.0], [3.0], [100.0], [100.0], [106.0]]).double()
    assert features.mean_distance(points, 3) == pytest.approx((2 + 4) / 2)  # (1 + 2 + 3) / 3 and (0 + 6 + 6) / 3


def test_contrast_and_saturation_of_known_pictures():
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 200
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 150
    pictures = [Image.fromarray(half), Image.fromarray(red)]
    assert features.contrast(pictures) == pytest.approx(50) and features.saturation(pictures) == pytest.approx(75)


def test_features_of_a_picture_do_not_depend_on_its_batch():
    pytest.importorskip("efficientnet_lite_pytorch")
    pictures = [draw(parse_caption(caption), random.Random(0)) for caption in CAPTIONS]
    network = features.Features()
    together, alone = network(pictures), network(pictures, batch_size=1)
    assert together.shape == (4, 1280)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
    assert torch.cdist(together, together).sum() / 12 > 1


# ------------------------------------------------------------------------------------------------ speed


def test_a_training_step_beside_its_network_calls(capsys):
    flags = ["--train_batch_size", "1", "--teacher_substeps", "1", "--student_steps", "1"]
    training.main(["--objectives", "velocity", "--count", "2", *flags])
    name, step, alone, ratio, _ = cells(capsys.readouterr().out.splitlines()[-1])
    assert name == "velocity" and float(step) > 0 and float(alone) > 0 and float(ratio) > 0


def test_a_step_s_ratio_is_taken_step_by_step_when_warm():
    watch = training.Watch(torch.device("cpu"), steps=[9.0, 9.0, 2.0, 4.0, 12.0], alone=[1.0, 1.0, 1.0, 4.0, 4.0])
    assert watch.medians() == (4.0, 4.0, 2.0)


def test_all_calls_of_a_step_are_made_again():
    """Those of the teacher, and the student's with its backward; weights and gradients stay as they are."""
    calls, network = [], torch.nn.Linear(2, 2)
    watch = training.Watch(torch.device("cpu"))

    def field(x):
        calls.append(torch.is_grad_enabled())
        return network(x)

    watch.calls = [(SimpleNamespace(transformer=network), (torch.ones(1, 2),), gradient) for gradient in (False, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ask", lambda velocity, x: field(x))
        watch.between_steps()
    assert calls == [False, True] and len(watch.steps) == len(watch.alone) == 1 and not watch.calls
    assert network.weight.grad is None


def test_a_gpu_s_figures_at_small_shapes(monkeypatch, capsys):
    transformer = dict(num_layers=3, num_attention_heads=1, ffn_dim=64, in_channels=16, out_channels=16)
    vae = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    monkeypatch.setitem(shapes.TEACHERS, "small", (transformer, vae, 2, 3.0))
    for name, value in {"TEACHER_STEPS": 2, "PICTURES": 2, "PRODUCT": {"cpu": 128}}.items():
        monkeypatch.setattr(gpu, name, value)
    what = ["--teachers", "small", "--sizes", "40x64", "--objectives", "trajectory", "--blocks", "1", "--repeats", "1"]
    gpu.main(["--device", "cpu", *what])
    said = capsys.readouterr().out
    rows = {cells(line)[1]: cells(line) for line in said.splitlines() if line.startswith("| 32×64 ")}
    assert rows.keys() == set(gpu.BACKENDS) and float(rows["native"][3]) > 0
    assert rows["_native_cudnn"][2].startswith("not here: No viable backend")
    step = cells(next(line for line in said.splitlines() if line.startswith("| trajectory ")))
    assert float(step[1]) > 0 and step[4] == "not measured" and float(step[5]) > 0
    assert "small: 3 of 3 blocks" in said and "small: 1 blocks a network, 32×64" in said
    assert "differ by at most 1 of 255" in said or "differ by at most 0 of 255" in said


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_another_teacher_in_the_same_layout(tmp_path, monkeypatch, capsys):
    """All stages, a step each: what is written is a pipeline that the yardstick draws with."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    steps = dict.fromkeys(landscapes.STEPS, 1)
    monkeypatch.setattr(landscapes, "STEPS", steps)
    landscapes.main(["--output", str(tmp_path), "--bank", "64"])
    known, held_out = ((tmp_path / f"{name}.txt").read_text().splitlines() for name in ("prompts", "held_out"))
    assert not set(known) & set(held_out) and len(set(known)) == len(known) == 800
    (tmp_path / "few.txt").write_text("\n".join(held_out[:2]))
    size = ["--prompts", str(tmp_path / "few.txt"), "--teacher_steps", "1", "--threads", "1", "--no_features"]
    quality.main(["--teacher", str(tmp_path / "teacher"), *size, "--height", "64", "--width", "64"])
    assert "| teacher" in capsys.readouterr().out
    tokenizer = landscapes.build_tokenizer()
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer([*known, *held_out]).input_ids)


@pytest.mark.parametrize("field, other", [("sky", "pink"), ("ground", "red"), ("ridge", "mountains"), ("disc", "sun")])
def test_a_landscape_shows_what_its_caption_says(field, other):
    one = landscapes.Landscape("green", "plains", "blue", "large", "moon", "high", "on the left")
    assert one.caption == "green plains under a blue sky with a large moon high on the left"
    another = one._replace(**{field: other})
    pictures = [np.asarray(landscapes.draw(which, random.Random(0)), dtype=int) for which in (one, another)]
    changed = np.abs(pictures[0] - pictures[1]).max(2) > 20
    where = {"sky": changed[:8, 40:], "ground": changed[-6:], "ridge": changed[36:56], "disc": changed[8:18, 8:18]}
    assert where[field].mean() > 0.2


@pytest.mark.parametrize("name", [*objectives.RECIPES, *objectives.SEARCH])
def test_the_recipes_of_every_objective_are_accepted(name, tmp_path):
    config = load_config([*objectives.flags_of(name, tmp_path), "--output_dir", str(tmp_path)], settings_of)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False)
    assert [p.objective for p in make_plan(config, ranks).phases] == [
        p["objective"] for p in objectives.recipe_of(name)[1]
    ]


def test_a_student_of_another_recipe_is_trained_anew(tmp_path, monkeypatch):
    student, trained = tmp_path / "velocity_3" / "student", []

    def run(command, **about):
        trained.append(command)
        student.mkdir(parents=True, exist_ok=True)
        (student / "model_index.json").touch()

    def times() -> int:
        assert objectives.train("velocity", 3, tmp_path) == student
        return len(trained)

    monkeypatch.setattr(objectives.subprocess, "run", run)
    assert times() == times() == 1
    (student / "model_index.json").unlink()
    assert times() == 2
    steps, phases = objectives.RECIPES["velocity"]
    monkeypatch.setitem(objectives.RECIPES, "velocity", (steps, [objectives.phase("velocity", 7)]))
    assert times() == times() == 3
    monkeypatch.setitem(objectives.RECIPES, "velocity", (2, [objectives.phase("velocity", 7)]))
    assert times() == 4


def test_what_an_objective_costs_and_how_its_seeds_differ():
    """The demo's: 120 steps × 32 prompts × 16 guided forwards, each of two."""
    assert objectives.teacher_forwards("trajectory") == 120 * 32 * 16 * 2
    # A guided forward a step, and 16 in every 20th to look at contrast; none while the fake score warms up.
    assert objectives.teacher_forwards("dmd") == 60 * 32 * 2 + 3 * 32 * 16 * 2
    assert objectives.teacher_forwards("trajectory, then dmd") == (120 * 16 + 50 + 2.5 * 16) * 32 * 2
    shares = {"diversity": 1.0, "contrast": 0.9, "saturation": 1.1}
    row = {"role": "student", "captions": 8, "steps": 4, "right": 0.5, "frechet": 2.0} | shares
    teacher = row | {"role": "teacher", "right": 0.9}
    rows = [teacher, teacher | {"steps": 2, "frechet": 7.0}, row, row | {"right": 0.75, "frechet": 3.0}]
    few, last = objectives.table(["velocity"], 2, rows).splitlines()[-2:]
    assert cells(few) == ["teacher, guided", "2", "-", "90.0", "3.50", "1.00", "0.90", "1.10"]
    assert cells(last)[3:6] == ["62.5 (50.0 to 75.0)", "1.25 (1.00 to 1.50)", "1.00 (1.00 to 1.00)"]
