"""What people look at: the manifest, a contact sheet a round, and a page that opens from disk."""

import html
import json
import logging
import math
import os
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

log = logging.getLogger(__name__)

THUMBNAIL = 256  # pixels, the longer side, on a contact sheet
SHEET_WIDTH = 1600  # pixels, at most
MARGIN = 12
CAPTION_HEIGHT = 36  # two lines of a prompt


def add_to_manifest(folder: Path, rows: list[dict]) -> None:
    """Rank 0 only; no collective.

    A round that is drawn again, on another number of ranks perhaps, takes the place of the earlier one: rows and files.
    """
    files, prefixes = {row["file"] for row in rows}, {_prefix(row) for row in rows}
    kept = []
    for row in read_manifest(folder):
        if _prefix(row) not in prefixes:
            kept.append(row)
        elif row["file"] not in files:
            (folder / Path(row["file"]).name).unlink(missing_ok=True)
    manifest = kept + rows
    _write(folder / "manifest.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in manifest))


def write_review(folder: Path, rows: list[dict]) -> None:
    """The contact sheet of a round, and the page of all rounds in the manifest. Rank 0 only; no collective."""
    if rows:
        write_contact_sheet(folder / f"{_prefix(rows[0])}.png", folder, rows)
    _write(folder / "index.html", render_page(read_manifest(folder)))


def _prefix(row: dict) -> str:
    return row["file"].split("_rank_")[0]


def read_manifest(folder: Path) -> list[dict]:
    path = folder / "manifest.jsonl"
    if not path.exists():
        return []
    # Not splitlines: JSON leaves some characters as they are that it takes for line ends, such as U+2028.
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:  # somebody's edit; the rounds to come need a manifest all the same
        broken = path.with_name("manifest.jsonl.broken")
        path.replace(broken)
        log.warning("%s: %s; moved to %s, and a new one is begun", path, error, broken.name)
        return []


def remove_rounds(folder: Path) -> None:
    """Delete what rounds have left in the folder: the pictures that its manifest names, sheets, manifest and page."""
    for row in read_manifest(folder):
        (folder / Path(row["file"]).name).unlink(missing_ok=True)
        (folder / f"{_prefix(row)}.png").unlink(missing_ok=True)
    for name in ("manifest.jsonl", "index.html"):
        (folder / name).unlink(missing_ok=True)


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
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.save(temporary, format="PNG", compress_level=1)  # half the time for a tenth more bytes
    os.replace(temporary, path)


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


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Samples</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }}
body {{ margin: 1rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem; vertical-align: top; text-align: left; font-weight: normal }}
thead th {{ position: sticky; top: 0; z-index: 1; background: Canvas; font-weight: 600; white-space: nowrap }}
tbody th {{ position: sticky; left: 0; background: Canvas; max-width: 18rem; min-width: 9rem; overflow-wrap: anywhere }}
img, .failed, small {{ display: block; width: {width}px }}
img {{ height: auto; image-rendering: {rendering} }}
small {{ opacity: .75 }} .failed {{ color: #c22; overflow-wrap: anywhere }}
</style>
<h1>Samples</h1>
<p>{summary}</p>
<table><thead><tr><th>Prompt</th>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
</html>
"""


def render_page(manifest: list[dict]) -> str:
    """Prompts down, rounds across: the teacher first, then epochs, the newest first. All text is escaped."""
    rounds = sorted({_round(row) for row in manifest}, key=lambda r: (r[0] != "teacher", -r[1]))
    cells: dict[tuple[int, str], dict] = defaultdict(dict)
    for row in manifest:
        cells[row["prompt_index"], row["prompt"]][_round(row)] = row
    body = []
    for (_, prompt), by_round in sorted(cells.items()):
        tds = "".join(f"<td>{_cell(by_round[r])}</td>" if r in by_round else "<td></td>" for r in rounds)
        body.append(f"<tr><th scope=row>{html.escape(prompt)}</th>{tds}</tr>")
    failed = sum(not row["ok"] for row in manifest)
    summary = f"Pictures: {len(manifest)}, prompts: {len(cells)}" + (f", failed: {failed}" if failed else "")
    head = "".join(f"<th>{'teacher' if kind == 'teacher' else f'epoch {epoch}'}</th>" for kind, epoch in rounds)
    small = bool(manifest) and max(manifest[0]["width"], manifest[0]["height"]) < 256
    look = dict(width=128, rendering="pixelated") if small else dict(width=240, rendering="auto")
    return _PAGE.format(summary=summary, head=head, body="\n".join(body), **look)


def _round(row: dict) -> tuple[str, int]:
    return ("teacher", 0) if row["weights"] == "teacher" else ("student", row["epoch"])


def _cell(row: dict) -> str:
    if not row["ok"]:
        return f"<div class=failed>failed: {html.escape(row['error'] or '')}</div>"
    file, prompt = html.escape(row["file"], quote=True), html.escape(row["prompt"], quote=True)
    facts = f"step {row['step']} · seed {row['seed']} · {row['num_inference_steps']} steps"
    if row.get("phase"):
        facts += f" · phase {html.escape(row['phase'])}"
    return f'<a href="{file}"><img src="{file}" alt="{prompt}" loading="lazy"></a><small>{facts}</small>'


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
