import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageFont

import train_distillation
from config.errors import UserError
from sampling.review import (
    MARGIN,
    _wrap,
    add_to_manifest,
    read_manifest,
    redraw_review,
    remove_rounds,
    write_contact_sheet,
    write_review,
    write_thumbnail,
)
from sampling.review_page import CURVE_POINTS, page_data, render_page


def row_of(index, epoch=1, weights="raw", rank=0, **changes) -> dict:
    prefix = "teacher" if weights == "teacher" else f"epoch_{epoch:04d}"
    return dict(
        file=f"{prefix}_rank_{rank}_sample_{index:02d}.png", prompt=f"prompt {index}", prompt_index=index, epoch=epoch,
        step=10 * epoch, rank=rank, seed=index, num_inference_steps=4, weights=weights, height=32, width=64, ok=True,
        error=None,
    ) | changes  # fmt: skip


def paint(folder, rows):
    folder.mkdir(exist_ok=True)
    for row in rows:
        if row["ok"]:
            colour = (0, 10 * row["prompt_index"], 200)
            Image.new("RGB", (row["width"], row["height"]), colour).save(folder / row["file"])
    return rows


class Page(HTMLParser):
    """Every tag of a page, and the data that it carries."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.policy, self._is_data = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._is_data = tag == "script" and dict(attrs).get("id") == "data"
        if tag == "meta" and "http-equiv" in dict(attrs):
            self.policy = dict(attrs)["content"]

    def handle_data(self, data):
        if self._is_data:
            self.data = json.loads(data)
            self._is_data = False


def health(score, **changes) -> dict:
    return {"health": dict(score=score, ok=True, error=None, latency_s=0.003, contrast=0.2) | changes}


def test_rows_keep_their_order_and_a_file_drawn_again_replaces_its_row(tmp_path):
    add_to_manifest(tmp_path, paint(tmp_path, [row_of(0), row_of(1)]))
    add_to_manifest(tmp_path, paint(tmp_path, [row_of(0, epoch=2), row_of(1, epoch=2)]))
    add_to_manifest(tmp_path, paint(tmp_path, [row_of(1, step=99), row_of(0, step=99)]))
    manifest = read_manifest(tmp_path)
    assert [(row["epoch"], row["prompt_index"], row["step"]) for row in manifest] == [
        (2, 0, 20), (2, 1, 20), (1, 1, 99), (1, 0, 99),
    ]  # fmt: skip
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_round_drawn_again_on_fewer_ranks_leaves_nothing_of_the_earlier_one(tmp_path):
    add_to_manifest(tmp_path, paint(tmp_path, [row_of(0), row_of(1, rank=1), row_of(0, epoch=2, rank=1)]))
    add_to_manifest(tmp_path, paint(tmp_path, [row_of(0), row_of(1)]))
    names = {p.name for p in tmp_path.glob("*_sample_*.png")}
    assert names == {
        "epoch_0001_rank_0_sample_00.png", "epoch_0001_rank_0_sample_01.png", "epoch_0002_rank_1_sample_00.png",
    }  # fmt: skip
    assert {row["file"] for row in read_manifest(tmp_path)} == names


def test_a_line_break_in_a_prompt_does_not_break_the_manifest(tmp_path):
    rows = [row_of(0, prompt="two\nlines, \u2028 and \x85 too"), row_of(1, prompt="grün, 红")]
    add_to_manifest(tmp_path, paint(tmp_path, rows))
    assert read_manifest(tmp_path) == rows


def test_page_is_prompts_by_rounds_teacher_first_then_newest():
    rows = [row_of(i, epoch=e, phase="2 dmd") for e in (1, 2, 10) for i in range(2)]
    rows += [row_of(i, epoch=0, weights="teacher", num_inference_steps=50) for i in (1, 0)]
    data = Page(render_page(rows)).data
    assert data["prompts"] == ["prompt 0", "prompt 1"]
    assert [r["name"] for r in data["rounds"]] == ["teacher", "epoch 10", "epoch 2", "epoch 1"]
    assert [r["teacher"] for r in data["rounds"]] == [True, False, False, False]
    assert [(r["steps"], r["step"], r["phase"]) for r in data["rounds"][:2]] == [(50, 0, ""), (4, 100, "phase 2 dmd")]
    assert [r["pictures"][1][:2] for r in data["rounds"]] == [
        [f"{name}_rank_0_sample_01.png", 1] for name in ("teacher", "epoch_0010", "epoch_0002", "epoch_0001")
    ]


def test_a_prompt_missing_in_a_round_leaves_its_place_empty():
    rounds = page_data([row_of(0), row_of(1, epoch=2)])["rounds"]
    assert [[bool(picture) for picture in r["pictures"]] for r in rounds] == [[False, True], [True, False]]


def test_a_failed_picture_has_its_error_and_a_failed_score_no_number():
    rows = [
        row_of(0, scores=health(0.97531)),
        row_of(1, scores=health(0.0, ok=False, error="TimeoutError: no answer", contrast=None)),
        row_of(2, scores=health(math.nan)),
        row_of(3, ok=False, error="out of memory"),
        row_of(4, ok=False, error=None),
    ]
    data = page_data(rows)
    assert data["scorers"] == [{"short": "health", "rest": "", "label": "health", "figures": ["contrast", "latency_s"]}]
    pictures = data["rounds"][0]["pictures"]
    assert [p[5] for p in pictures] == [
        [[0.9753, 0.2, 0.003]], ["TimeoutError: no answer"], ["the score is nan"], None, None,
    ]  # fmt: skip
    assert [p[4] for p in pictures] == [None, None, None, "out of memory", ""]


def test_fidelity_is_called_likeness_and_scorers_have_one_order():
    done = dict(score=1.0, ok=True, error=None)
    rows = [row_of(0, weights="teacher", scores={"vlm": done}), row_of(0, scores={"vlm": done, "fidelity": done})]
    assert [s["label"] for s in page_data(rows)["scorers"]] == ["likeness to the teacher", "vlm"]


def test_what_is_wrong_with_a_round_stands_with_it():
    rows = [row_of(i, epoch=0, weights="teacher", scores=health(1.0)) for i in range(2)]
    rows += [row_of(i, scores=health(0.5, contrast=0.05)) for i in range(2)]
    assert [r["warnings"] for r in page_data(rows)["rounds"]] == [[], ["contrast is 25% of the teacher's"]]


def test_hostile_text_stays_inside_the_data():
    evil = "</script><script>alert('1')</script><!-- & \"quoted\" {{data}} {{policy}} \u2028"
    plain, page = render_page([]), render_page([row_of(0, prompt=evil), row_of(1, ok=False, error=evil)])
    assert Page(page).tags == Page(plain).tags
    assert Page(page).data["prompts"][0] == evil and Page(page).data["rounds"][0]["pictures"][1][4] == evil
    assert "\u2028" not in page and "{{" not in plain


def test_nothing_but_the_page_and_its_pictures_is_loaded():
    page = render_page([row_of(0)])
    assert Page(page).policy.startswith("default-src 'none'; img-src 'self' file:; style-src 'sha256-")
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|https?://(?!www\.w3\.org/2000/svg)", page)


def test_page_of_nothing():
    data = Page(render_page([])).data
    assert data == {"prompts": [], "scorers": [], "rounds": [], "phases": [], "curves": []}


# ------------------------------------------------------------------------------------------------ curves


def test_curves_of_losses_scores_and_speed():
    metrics = [
        dict(step=10, phase=1, objective="velocity", loss=2.0, samples_per_second=20.0, lr=1e-4),
        dict(step=20, phase=2, objective="dmd", loss=math.inf, loss_step_0=1.0, fake_score_loss=0.123456),
    ]
    rows = [row_of(0, epoch=0, weights="teacher", step=0, scores=health(1.0))]
    for epoch, scores in {2: (0.8, 0.6), 1: (0.5, 0.3)}.items():
        rows += [row_of(i, epoch=epoch, scores=health(score)) for i, score in enumerate(scores)]
        rows.append(row_of(2, epoch=epoch, scores=health(0.0, ok=False, error="late")))
    data = page_data(rows, metrics)
    curves = {curve["title"]: curve for curve in data["curves"]}
    assert {title: curve["points"] for title, curve in curves.items()} == {
        "loss": [(10, 2.0), (20, None)],
        "fake_score_loss": [(20, 0.1235)],
        "health": [(10, 0.4), (20, 0.7)],
        "speed, samples a second": [(10, 20.0)],
    }
    assert curves["health"]["teacher"] == 1.0 and data["phases"] == [(10, "1 velocity"), (20, "2 dmd")]


def test_a_long_curve_is_thinned_to_means():
    points = page_data([], [dict(step=i, loss=float(i % 2)) for i in range(10_000)])["curves"][0]["points"]
    assert len(points) <= CURVE_POINTS and points[-1][0] == 9999
    assert all(0.4 < value < 0.6 for _, value in points)


@pytest.mark.parametrize("where", ["samples/metrics.jsonl", "metrics.jsonl", "elsewhere.jsonl"])
def test_metrics_are_found_and_a_torn_row_is_left_out(where, tmp_path):
    folder = tmp_path / "samples"
    add_to_manifest(folder, paint(folder, [row_of(0)]))
    (tmp_path / where).write_text('{"step": 1, "loss": 0.5}\n[]\n{"step": 2, "loss": 0.25}\n{"step": 3, "lo')
    write_review(folder, [], tmp_path / where if where.startswith("elsewhere") else None)
    assert Page((folder / "index.html").read_text()).data["curves"][0]["points"] == [[1, 0.5], [2, 0.25]]


# ------------------------------------------------------------------------------------------------ thumbnails


def test_large_pictures_have_thumbnails_and_small_ones_none(tmp_path):
    rows = paint(tmp_path, [row_of(0, width=800, height=400), row_of(1, width=256, height=256, epoch=2)])
    rows.append(row_of(2, width=800, height=400))  # another machine's
    add_to_manifest(tmp_path, rows)
    write_review(tmp_path, [])
    assert os.listdir(tmp_path / "thumbnails") == ["epoch_0001_rank_0_sample_00.jpg"]
    with Image.open(tmp_path / "thumbnails" / "epoch_0001_rank_0_sample_00.jpg") as small:
        assert small.size == (256, 128)
    data = Page((tmp_path / "index.html").read_text()).data
    assert [r["thumbnails"] for r in data["rounds"]] == [False, True]


def test_a_thumbnail_that_is_there_is_kept_and_one_drawn_again_replaced(tmp_path):
    row = row_of(0, width=512, height=512)
    for colour in ("red", "blue"):
        write_thumbnail(tmp_path, row["file"], Image.new("RGB", (512, 512), colour))
    add_to_manifest(tmp_path, paint(tmp_path, [row]))
    write_review(tmp_path, [])
    with Image.open(tmp_path / "thumbnails" / "epoch_0001_rank_0_sample_00.jpg") as small:
        assert small.getpixel((9, 9))[2] > 250 and small.getpixel((9, 9))[1] < 5


def test_thumbnails_go_with_their_pictures(tmp_path):
    large = dict(width=512, height=512)
    add_to_manifest(tmp_path, paint(tmp_path, [row_of(0, **large), row_of(1, rank=1, **large)]))
    write_review(tmp_path, [])
    add_to_manifest(tmp_path, paint(tmp_path, [row_of(0, **large)]))  # the round again, on one rank
    assert os.listdir(tmp_path / "thumbnails") == ["epoch_0001_rank_0_sample_00.jpg"]
    remove_rounds(tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ --review


def test_review_draws_all_sheets_and_the_page_again_and_needs_no_other_flag(tmp_path, capsys):
    add_to_manifest(tmp_path, paint(tmp_path, [row_of(0), row_of(0, epoch=2)]))
    train_distillation.run(["--review", str(tmp_path)])
    assert capsys.readouterr().out == f"review page: {tmp_path / 'index.html'}\n"
    for name in ("epoch_0001.png", "epoch_0002.png", "index.html"):
        assert (tmp_path / name).stat().st_size > 100
    (tmp_path / "epoch_0001_rank_0_sample_00.png").unlink()
    assert redraw_review(tmp_path) == tmp_path / "index.html"


@pytest.mark.parametrize("folder, problem", [("nowhere", "no such folder"), (".", "holds no manifest.jsonl")])
def test_review_of_no_samples_folder(folder, problem, tmp_path):
    with pytest.raises(UserError, match=f"--review .*: {problem}; give a folder of samples"):
        train_distillation.run(["--review", str(tmp_path / folder)])


# ------------------------------------------------------------------------------------------------ contact sheets


def test_contact_sheet_shows_every_picture_and_why_one_is_missing(tmp_path):
    rows = paint(tmp_path, [row_of(i) for i in range(8)])
    rows[3] |= dict(ok=False, error="RuntimeError: a long story " + "and so on " * 50)
    (tmp_path / rows[5]["file"]).unlink()  # another machine's
    write_contact_sheet(tmp_path / "sheet.png", tmp_path, rows)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    width, height, line = 256, 128, 128 + 36 + MARGIN  # four times the picture; at most five side by side
    assert sheet.shape == (MARGIN + 2 * line, MARGIN + 4 * (width + MARGIN), 3)
    for i, row in enumerate(rows):
        x, y = MARGIN + i % 4 * (width + MARGIN), MARGIN + i // 4 * line
        place = sheet[y : y + height, x : x + width]
        if i in (3, 5):
            assert place[0, 0].tolist() == [204, 34, 34] and place.std() > 5
        else:
            assert (place == [0, 10 * row["prompt_index"], 200]).all()
        assert sheet[y + height : y + height + 36, x : x + width].min() < 128  # its prompt
    assert (sheet[:, :MARGIN] == 255).all()


@pytest.mark.parametrize(
    "size, thumbnail", [((480, 832), (148, 256)), ((1024, 1024), (256, 256)), ((100, 60), (200, 120))]
)
def test_contact_sheet_scales(size, thumbnail, tmp_path):
    rows = paint(tmp_path, [row_of(0, height=size[0], width=size[1])])
    write_contact_sheet(tmp_path / "sheet.png", tmp_path, rows)
    width, height = Image.open(tmp_path / "sheet.png").size
    assert (height - 2 * MARGIN - 36, width - 2 * MARGIN) == thumbnail


def test_captions_fit():
    font = ImageFont.load_default(12)
    for text in ("short", "many words " * 30, "x" * 500, "", "a " + "y" * 300 + " b c"):
        lines = _wrap(text, 120, font, 2).split("\n")
        assert len(lines) <= 2 and all(font.getlength(line) <= 120 for line in lines)
    assert _wrap("many words " * 30, 120, font, 2).endswith("…") and _wrap("a b", 120, font, 2) == "a b"
