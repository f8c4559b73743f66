"""The yardstick measures what it says: right captions, all forwards, and the literal stock pipeline's pictures."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from diffusers import WanPipeline

from benchmarks import quality
from data.scenes import draw, parse_caption

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
    size = ["--count", "3", "--teacher_steps", "2", "--student_steps", "1", "--threads", "1"]
    quality.main(["--teacher", teacher, "--student", str(student), *size, *out])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(r["role"], r["steps"], r["forwards_per_picture"]) for r in rows] == [("teacher", 2, 4), ("student", 1, 1)]
    assert "captions right" in capsys.readouterr().out and (tmp_path / "new" / "grid.png").stat().st_size > 1000


def test_a_folder_without_a_pipeline_is_one_line(random_single_pipeline_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        quality.main(["--teacher", str(random_single_pipeline_dir), "--student", str(tmp_path), "--threads", "1"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"error: --student {tmp_path}: ") and said.count("\n") == 1
