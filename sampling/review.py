"""What people look at: the manifest, a contact sheet a round, and a page that opens from disk."""

import itertools
import json
import logging
import math
import shutil
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.files import read_json_lines, whole_file
from sampling.review_page import THUMBNAIL, render_page

log = logging.getLogger(__name__)

NEEDED = {
    "file", "prompt", "prompt_index", "epoch", "step", "seed", "num_inference_steps", "weights", "height", "width",
    "ok", "error",
}  # fmt: skip
THUMBNAILS = "thumbnails"  # a folder beside the pictures
THUMBNAIL_QUALITY = 85  # of JPEG
SHEET_WIDTH = 1600  # pixels, at most
MARGIN = 12
CAPTION_HEIGHT = 36  # two lines of a prompt


def add_to_manifest(folder: Path, rows: list[dict]) -> None:
    """Rank 0 only; no collective.

    A round that is drawn again, on another number of ranks perhaps, takes the place of the earlier one: rows and files.
    """
    _keep_damaged(folder / "manifest.jsonl")
    files, prefixes = {row["file"] for row in rows}, {_prefix(row) for row in rows}
    kept = []
    for row in read_manifest(folder):
        if _prefix(row) not in prefixes:
            kept.append(row)
        elif row["file"] not in files:
            _remove_picture(folder, row["file"])
    manifest = kept + rows
    _write(folder / "manifest.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in manifest))


def write_review(folder: Path, rows: list[dict], metrics: Path | None = None) -> None:
    """The contact sheet of a round, and the page of all rounds in the manifest. Rank 0 only; no collective.

    Args:
        rows: the round's; none for the page alone.
        metrics: metrics.jsonl, for the page's curves; by default the one in the folder or, as a run leaves it, in the
            folder above. Without one there are no curves of loss and speed.
    """
    if rows:
        write_contact_sheet(folder / f"{_prefix(rows[0])}.png", folder, rows)
    manifest = read_manifest(folder)
    _add_thumbnails(folder, manifest)
    # A run that is being stopped, or still writes, leaves a torn row.
    measured = [row for _, row in read_json_lines(metrics or _find_metrics(folder)) if row and "step" in row]
    _write(folder / "index.html", render_page(manifest, measured))


def redraw_review(folder: Path) -> Path:
    """All contact sheets and the page once more, of any samples folder. Returns the page's path."""
    rounds = defaultdict(list)
    for row in read_manifest(folder):
        rounds[_prefix(row)].append(row)
    for prefix, rows in rounds.items():
        write_contact_sheet(folder / f"{prefix}.png", folder, rows)
    write_review(folder, [])
    return folder / "index.html"


def _prefix(row: dict) -> str:
    return row["file"].split("_rank_")[0]


def read_manifest(folder: Path) -> list[dict]:
    """Its rows, but for lines that are torn or somebody's mistake, which are told of. A file is a name in the folder,
    whatever the manifest says: nothing outside is read, written or deleted."""
    path, rows = folder / "manifest.jsonl", []
    for number, (_, row) in enumerate(read_json_lines(path), 1):
        if _is_row(row):
            rows.append(row | {"file": Path(row["file"]).name})
        else:
            log.warning("%s: line %d is no picture's row; left out", path, number)
    return rows


def _is_row(row: dict | None) -> bool:
    return row is not None and row.keys() >= NEEDED


def _keep_damaged(path: Path) -> None:
    """A copy of a manifest with lines that would be lost when it is written again."""
    if all(_is_row(row) for _, row in read_json_lines(path)):
        return
    copies = (path.with_name(f"{path.name}.broken{number or ''}") for number in itertools.count())
    shutil.copy(path, next(copy for copy in copies if not copy.exists()))


def _find_metrics(folder: Path) -> Path:
    beside = folder / "metrics.jsonl"
    return beside if beside.exists() else folder.resolve().parent / "metrics.jsonl"


def remove_rounds(folder: Path) -> None:
    """Delete what rounds have left in the folder: the pictures that its manifest names, sheets, manifest and page."""
    for row in read_manifest(folder):
        _remove_picture(folder, row["file"])
        (folder / f"{_prefix(row)}.png").unlink(missing_ok=True)
    for name in ("manifest.jsonl", "index.html"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or somebody's own pictures are in it
        (folder / THUMBNAILS).rmdir()


def _remove_picture(folder: Path, file: str) -> None:
    """With its thumbnail. Of `file` only the name counts: nothing outside the folder is deleted."""
    (folder / Path(file).name).unlink(missing_ok=True)
    _thumbnail_path(folder, file).unlink(missing_ok=True)


def _thumbnail_path(folder: Path, file: str) -> Path:
    return folder / THUMBNAILS / f"{Path(file).stem}.jpg"


def write_thumbnail(folder: Path, file: str, picture: Image.Image) -> None:
    """The small copy of a picture that the page shows first. A picture of up to THUMBNAIL pixels needs none."""
    if max(picture.size) <= THUMBNAIL:
        return
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    path = _thumbnail_path(folder, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        small.save(temporary, format="JPEG", quality=THUMBNAIL_QUALITY)


def _add_thumbnails(folder: Path, manifest: list[dict]) -> None:
    """Those that are absent, as in a folder from before there were thumbnails."""
    present = {path.name for path in (folder / THUMBNAILS).glob("*.jpg")}
    for row in manifest:
        large = row["ok"] and max(row["width"], row["height"]) > THUMBNAIL
        if large and _thumbnail_path(folder, row["file"]).name not in present:
            try:
                with Image.open(folder / row["file"]) as picture:
                    write_thumbnail(folder, row["file"], picture)
            except OSError as error:  # another machine's picture, or a folder that is read only: the page does without
                log.debug("no thumbnail of %s: %s", row["file"], error)


def write_contact_sheet(path: Path, folder: Path, rows: list[dict]) -> None:
    """All pictures of a round in one, with their prompts; a failed picture leaves its error in its place."""
    scale = THUMBNAIL / max(rows[0]["width"], rows[0]["height"])
    scale = math.floor(scale) if scale > 1 else scale  # small pictures grow by whole pixels, and stay sharp
    w, h = round(rows[0]["width"] * scale), round(rows[0]["height"] * scale)
    lines = -(-len(rows) // max(1, (SHEET_WIDTH - MARGIN) // (w + MARGIN)))
    columns = -(-len(rows) // lines)  # as many in each line as in the others, so 8 are 4 and 4
    size = (MARGIN + columns * (w + MARGIN), MARGIN + lines * (h + CAPTION_HEIGHT + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        x, y = MARGIN + i % columns * (w + MARGIN), MARGIN + i // columns * (h + CAPTION_HEIGHT + MARGIN)
        picture, error = _thumbnail(folder, row, (w, h), scale >= 1)
        if picture:
            sheet.paste(picture, (x, y))
        else:
            pen.rectangle((x, y, x + w - 1, y + h - 1), fill="#fff4f4", outline="#c22")
            text = _wrap(error, w - 16, font, max(1, (h - 16) // 16))
            pen.multiline_text((x + 8, y + 8), text, fill="#c22", font=font)
        pen.multiline_text((x, y + h + 3), _wrap(row["prompt"], w, font, 2), fill="black", font=font, spacing=2)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG", compress_level=1)  # half the time for a tenth more bytes


def _thumbnail(folder: Path, row: dict, size: tuple[int, int], enlarge: bool) -> tuple[Image.Image | None, str]:
    """The picture in `size`, or None and why there is none."""
    if not row["ok"]:
        return None, f"failed: {row['error']}"
    try:
        with Image.open(folder / row["file"]) as picture:
            return picture.resize(size, Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS), ""
    except OSError:  # drawn on a machine with a disk of its own
        return None, f"{row['file']} is not in this folder"


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont, lines: int) -> str:
    """At most `lines` lines of `text`, none wider than `width` pixels; what is left out leaves an ellipsis."""
    done, line = [], ""
    for word in text.split():
        if not line or font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}".strip()
        else:
            done.append(line)
            line = word
    done.append(line)
    kept = done[:lines]
    if len(done) > lines:
        kept[-1] += "…"
    return "\n".join(_shorten(line, width, font) for line in kept)


def _shorten(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    kept = 0
    while font.getlength(f"{line[: kept + 1]}…") <= width:
        kept += 1
    return f"{line[:kept]}…"


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
