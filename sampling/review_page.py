"""The review page: what it shows, gathered from manifest and metrics, inside the template `review_page.html`."""

import base64
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sampling.scoring import LABELS, alarms, label_of, means

THUMBNAIL = 256  # pixels; larger pictures are shown in this size first
CURVE_POINTS = 400  # a curve is a few hundred pixels wide
DIGITS = 4
TEACHER = ("teacher", 0)
NO_FIGURES = {"score", "ok", "error"}


def render_page(manifest: list[dict], metrics_rows: Sequence[dict] = ()) -> str:
    """The page of all rounds: the template with its data as JSON inside.

    Args:
        manifest: a row a picture.
        metrics_rows: rows of metrics.jsonl, for the curves of loss and speed.
    """
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    data = json.dumps(page_data(manifest, metrics_rows), allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # no prompt may end the script element that it stands in; json escapes all but ASCII
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace("{{policy}}", _policy(template)).replace("{{data}}", data)


def page_data(manifest: list[dict], metrics_rows: Sequence[dict] = ()) -> dict[str, Any]:
    """What the page shows: prompts in their order; rounds, the teacher's first, then the newest first; curves.

    Compact, for tens of thousands of pictures. A round's settings stand once; its `pictures`, one a prompt or None, are
    lists [file, seed, rank, seconds, error, scores]. The error is None for a picture that is there. Scores, one a
    scorer, are [score, figure, …], or the error of a scorer that failed, or None where it was not asked.
    """
    by_round = defaultdict(list)
    for row in manifest:
        by_round[_round(row)].append(row)
    order = sorted(by_round, key=lambda r: (r[0] != "teacher", -r[1]))
    prompts = sorted({_prompt(row) for row in manifest})
    scorers = _scorers(manifest)
    means_by_round = {key: means(by_round[key]) for key in order}
    curves = [
        *(_metric_curve(name, name, metrics_rows) for name in _losses(metrics_rows)),
        *(_score_curve(name, by_round, means_by_round) for name in scorers),
        _metric_curve("speed, samples a second", "samples_per_second", metrics_rows),
    ]
    return {
        "prompts": [prompt for _, prompt in prompts],
        "scorers": [_scorer_data(name, figures) for name, figures in scorers.items()],
        "rounds": [_round_data(key, by_round[key], prompts, scorers, by_round.get(TEACHER, [])) for key in order],
        "phases": _phases(metrics_rows),
        "curves": [curve for curve in curves if any(value is not None for _, value in curve["points"])],
    }


def _policy(template: str) -> str:
    """A Content-Security-Policy: the page's own style and script, pictures beside it, and nothing from a network."""
    sources = []
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    return f"default-src 'none'; img-src 'self' file:; {'; '.join(sources)}; base-uri 'none'; form-action 'none'"


# ------------------------------------------------------------------------------------------------- pictures


def _round(row: dict) -> tuple[str, int]:
    return TEACHER if row["weights"] == "teacher" else ("student", row["epoch"])


def _prompt(row: dict) -> tuple[int, str]:
    return row["prompt_index"], row["prompt"]


def _round_data(
    key: tuple[str, int],
    rows: list[dict],
    prompts: list[tuple[int, str]],
    scorers: dict[str, list[str]],
    teacher_rows: list[dict],
) -> dict[str, Any]:
    first, is_teacher = rows[0], key == TEACHER
    by_prompt = {_prompt(row): row for row in rows}
    phase = first.get("phase")
    return {
        "name": "teacher" if is_teacher else f"epoch {first['epoch']}",
        "teacher": is_teacher,
        "step": first["step"],
        "phase": f"phase {phase}" if phase else "",
        "sampler": first.get("sampler", ""),
        "steps": first["num_inference_steps"],
        "eta": _number(first.get("eta")),
        "shift": _number(first.get("shift")),
        "weights": first["weights"],
        "width": first["width"],
        "height": first["height"],
        "thumbnails": max(first["width"], first["height"]) > THUMBNAIL,
        "warnings": alarms(rows, [] if is_teacher else teacher_rows),
        "pictures": [_picture(by_prompt[prompt], scorers) if prompt in by_prompt else None for prompt in prompts],
    }


def _picture(row: dict, scorers: dict[str, list[str]]) -> list:
    scores = row.get("scores") or {}
    return [
        Path(row["file"]).name,
        row["seed"],
        row.get("rank"),
        _number(row.get("seconds")),
        None if row["ok"] else row["error"] or "",
        [_score(scores.get(name), figures) for name, figures in scorers.items()] if scores else None,
    ]


# ------------------------------------------------------------------------------------------------- scores


def _scorers(manifest: Iterable[dict]) -> dict[str, list[str]]:
    """Scorer → its figures besides the score, over all pictures. Those of LABELS come first."""
    scorers: dict[str, dict[str, None]] = {}
    for row in manifest:
        for name, given in (row.get("scores") or {}).items():
            scorers.setdefault(name, {}).update(dict.fromkeys(given.keys() - NO_FIGURES))
    order = [*(name for name in LABELS if name in scorers), *(name for name in scorers if name not in LABELS)]
    return {name: sorted(scorers[name]) for name in order}


def _scorer_data(name: str, figures: list[str]) -> dict[str, Any]:
    short, rest = LABELS.get(name, (name, ""))
    return {"short": short, "rest": rest, "label": short + rest, "figures": figures}


def _score(given: dict | None, figures: list[str]) -> list | str | None:
    if given is None:
        return None
    if not given["ok"]:
        return given.get("error") or "no reason was given"
    score = _number(given["score"])
    if score is None:
        return f"the score is {given['score']}"
    return [score, *(_figure(given.get(figure)) for figure in figures)]


def _figure(value: Any) -> float | str | None:
    return value if isinstance(value, str) else _number(value)


def _number(value: Any) -> float | None:
    """To DIGITS significant digits; None for what is no finite number, which JSON does not have."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


# ------------------------------------------------------------------------------------------------- curves


def _losses(rows: Iterable[dict]) -> list[str]:
    """`loss`, and those of other networks, such as fake_score_loss."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name == "loss" or name.endswith("_loss")]


def _phases(rows: Iterable[dict]) -> list[tuple[int, str]]:
    """(step, name) where each phase has its first row."""
    phases = {}
    for row in rows:
        if "phase" in row:
            phases.setdefault(f"{row['phase']} {row.get('objective', '')}", row["step"])
    return [(step, name) for name, step in phases.items()]


def _metric_curve(title: str, name: str, rows: Iterable[dict]) -> dict[str, Any]:
    points = [(row["step"], _number(row[name])) for row in rows if name in row]
    return {"title": title, "points": _thin(points), "teacher": None}


def _score_curve(name: str, by_round: dict[tuple, list[dict]], means_by_round: dict[tuple, dict]) -> dict[str, Any]:
    """Means over the pictures that were scored, one a round; the teacher's, where there is one, is a level."""
    points = sorted(
        (by_round[key][0]["step"], _number(mean[name]))
        for key, mean in means_by_round.items()
        if key != TEACHER and name in mean
    )
    teacher = _number(means_by_round.get(TEACHER, {}).get(name))
    return {"title": label_of(name), "points": _thin(points), "teacher": teacher}


def _thin(points: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """At most CURVE_POINTS points: means of neighbours, at the last one's step."""
    each = -(-len(points) // CURVE_POINTS)
    if each <= 1:
        return points
    thinned = []
    for group in (points[i : i + each] for i in range(0, len(points), each)):
        values = [value for _, value in group if value is not None]
        thinned.append((group[-1][0], _number(sum(values) / len(values)) if values else None))
    return thinned
