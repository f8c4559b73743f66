import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageFont

from sampling.review import MARGIN, _wrap, add_to_manifest, read_manifest, render_page, write_contact_sheet


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
    """The text of the table's cells, with the addresses of their pictures, and every tag of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.table, self._in_cell = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")
            self._in_cell = True
        if tag == "img":
            self.table[-1][-1] += dict(attrs)["src"]

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.table[-1][-1] += data


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


def test_page_is_prompts_by_rounds_teacher_first_then_newest(tmp_path):
    rows = [row_of(i, epoch=e) for e in (1, 2, 10) for i in range(2)]
    rows += [row_of(i, epoch=0, weights="teacher") for i in (1, 0)]
    table = Page(render_page(rows)).table
    assert table[0] == ["Prompt", "teacher", "epoch 10", "epoch 2", "epoch 1"]
    assert [line[0] for line in table[1:]] == ["prompt 0", "prompt 1"]
    files = [[re.match(r"\w+\.png", cell)[0] for cell in line[1:]] for line in table[1:]]
    assert files[1] == [
        f"{name}_rank_0_sample_01.png" for name in ("teacher", "epoch_0010", "epoch_0002", "epoch_0001")
    ]


def test_a_prompt_missing_in_a_round_leaves_its_cell_empty():
    table = Page(render_page([row_of(0), row_of(1, epoch=2)])).table
    assert table[1][1] == "" and table[1][2] and table[2][1] and table[2][2] == ""


def test_prompts_and_errors_are_escaped():
    evil = "<script>alert('1')</script> & \"quoted\" {braces}"
    page = render_page([row_of(0, prompt=evil), row_of(1, ok=False, error=evil)])
    parsed = Page(page)
    assert "script" not in parsed.tags and parsed.tags.count("img") == 1
    assert parsed.table[1][0] == evil and parsed.table[2][1] == f"failed: {evil}"
    assert 'alt="&lt;script&gt;' in page and "failed: 1" in page


def test_page_of_nothing():
    assert Page(render_page([])).table == [["Prompt"]]


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
