"""What people look at: the manifest, a contact sheet a round, and a page that opens from disk."""

import html
import json
import os
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

THUMBNAIL = 256  # pixels, the longer side, on a contact sheet
CAPTION_HEIGHT = 34


def write_review(folder: Path, rows: list[dict]) -> None:
    """Add a round's rows to the manifest and redraw what hangs on it. Rank 0 only; no collective."""
    replaced = {row["file"] for row in rows}
    kept = [row for row in read_manifest(folder) if row["file"] not in replaced]
    manifest = kept + rows
    _write(folder / "manifest.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in manifest))
    if rows:
        prefix = rows[0]["file"].split("_rank_")[0]
        write_contact_sheet(folder / f"{prefix}.png", folder, rows)
    _write(folder / "index.html", render_page(manifest))


def read_manifest(folder: Path) -> list[dict]:
    path = folder / "manifest.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_contact_sheet(path: Path, folder: Path, rows: list[dict]) -> None:
    """All pictures of a round in one, with their prompts; a failed picture leaves its error in its place."""
    width, height = rows[0]["width"], rows[0]["height"]
    scale = (
        max(1, THUMBNAIL // max(width, height)) if max(width, height) < THUMBNAIL else THUMBNAIL / max(width, height)
    )
    w, h = int(width * scale), int(height * scale)
    columns = min(len(rows), max(1, 1600 // w))
    sheet = Image.new("RGB", (columns * (w + 8) + 8, -(-len(rows) // columns) * (h + CAPTION_HEIGHT + 8) + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        x, y = 8 + i % columns * (w + 8), 8 + i // columns * (h + CAPTION_HEIGHT + 8)
        if row["ok"]:
            with Image.open(folder / row["file"]) as picture:
                sheet.paste(
                    picture.resize((w, h), Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS), (x, y)
                )
        else:
            pen.rectangle((x, y, x + w, y + h), outline="red")
            pen.multiline_text((x + 4, y + 4), _wrap(row["error"] or "failed", w - 8, font, 6), fill="red", font=font)
        pen.multiline_text((x, y + h + 2), _wrap(row["prompt"], w, font, 2), fill="black", font=font, spacing=2)
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, path)


def _wrap(text: str, width: int, font, lines: int) -> str:
    """At most `lines` lines of `text`, each no wider than `width` pixels; what does not fit ends in an ellipsis."""
    done, line = [], ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            done.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    done.append(line)
    if len(done) > lines:
        done = [*done[: lines - 1], done[lines - 1] + "…"]
    return "\n".join(done)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Samples</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }}
body {{ margin: 1rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem; vertical-align: top; text-align: left; font-weight: normal }}
thead th {{ position: sticky; top: 0; background: Canvas; font-weight: 600; white-space: nowrap }}
tbody th {{ max-width: 18rem; min-width: 9rem }}
img {{ width: 128px; height: auto; display: block; image-rendering: {rendering} }}
small {{ opacity: .75 }} .failed {{ color: #c22; max-width: 128px; overflow-wrap: anywhere }}
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
    summary = f"{len(manifest)} pictures of {len(cells)} prompts" + (f", {failed} of them failed" if failed else "")
    head = "".join(f"<th>{'teacher' if kind == 'teacher' else f'epoch {epoch}'}</th>" for kind, epoch in rounds)
    small = bool(manifest) and max(manifest[0]["width"], manifest[0]["height"]) < 256
    return _PAGE.format(summary=summary, head=head, body="\n".join(body), rendering="pixelated" if small else "auto")


def _round(row: dict) -> tuple[str, int]:
    return ("teacher", 0) if row["weights"] == "teacher" else ("student", row["epoch"])


def _cell(row: dict) -> str:
    if not row["ok"]:
        return f"<div class=failed>failed: {html.escape(row['error'] or '')}</div>"
    file, prompt = html.escape(row["file"], quote=True), html.escape(row["prompt"], quote=True)
    facts = f"step {row['step']} · seed {row['seed']} · {row['num_inference_steps']} steps"
    return f'<a href="{file}"><img src="{file}" alt="{prompt}" loading="lazy"></a><small>{facts}</small>'


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
