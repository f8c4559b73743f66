"""How soon the review page of a long run can be used, in a real headless Chromium.

    python benchmarks/page.py

A folder of samples is made: 200 prompts, 100 epochs and the teacher, 20,200 pictures of 512×512 with thumbnails, each
under its own name (hard links to a few PNGs), with scores, and metrics of 10,000 steps. Measured, each time in a fresh
browser profile: the seconds from the start of navigation until every picture in the window is drawn, and until a click
on one of them has opened it large.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: this folder, where this file would hide the package, gives way to the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from benchmarks.arguments import at_least_one
from config.errors import UserError
from sampling.review import THUMBNAILS, add_to_manifest, write_review, write_thumbnail

BAR = 2.0  # seconds
PIXELS = 512  # either way: large enough for thumbnails
DISTINCT = 8  # PNGs; the others are links to them
WINDOW = {"width": 1440, "height": 900}
TIMEOUT = 60_000  # milliseconds
# Every picture that is in the table's window has been drawn, and there are some.
FILLED = """() => {
    const window = document.getElementById("scroller").getBoundingClientRect();
    const images = [...document.querySelectorAll("#rows img")].filter(image => {
        const place = image.getBoundingClientRect();
        return place.top < window.bottom && place.bottom > window.top
            && place.left < window.right && place.right > window.left;
    });
    return images.length > 0 && images.every(image => image.complete && image.naturalWidth > 0);
}"""
OPENED = "() => [...document.querySelectorAll('dialog[open] img')].some(i => i.complete && i.naturalWidth > 0)"


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def measure_page(prompts: int = 200, epochs: int = 100, repeats: int = 3) -> float:
    """Median seconds from navigation until the table's first screen is drawn and a click has opened a picture.

    Raises UserError where there is no Chromium, or no playwright to drive it with.
    """
    filled, usable = measure(prompts, epochs, repeats)
    return median(usable)


def measure(prompts: int, epochs: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds until the first screen is drawn, and until a click has opened a picture, `repeats` times."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("the page cannot be measured: playwright is not installed (requirements.txt)") from None
    chromium = find_chromium()
    if not chromium:
        raise UserError("the page cannot be measured: no chromium found; install Debian's package chromium, or another")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        make_samples(Path(folder), prompts, epochs)
        turns = []
        for _ in range(repeats):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport=WINDOW)
            turns.append(open_page(page, Path(folder, "index.html")))
            browser.close()
    return tuple(map(list, zip(*turns, strict=True)))


def open_page(page, path: Path) -> tuple[float, float]:
    started = time.perf_counter()
    page.goto(path.as_uri(), wait_until="commit", timeout=TIMEOUT)
    page.wait_for_function(FILLED, timeout=TIMEOUT)
    filled = time.perf_counter() - started
    page.locator("#rows .picture").nth(1).click()
    page.wait_for_function(OPENED, timeout=TIMEOUT)
    return filled, time.perf_counter() - started


# ------------------------------------------------------------------------------------------------- the folder


def make_samples(folder: Path, prompts: int, epochs: int) -> None:
    """Pictures, thumbnails, manifest, metrics and page, as a run leaves them."""
    rows = list(make_rows(prompts, epochs))
    noise = np.random.default_rng(0)
    for i, row in enumerate(rows):
        small = Path(row["file"]).with_suffix(".jpg")
        if i < DISTINCT:
            coarse = noise.integers(0, 256, (16, 16, 3), np.uint8)
            picture = Image.fromarray(coarse).resize((PIXELS, PIXELS))
            picture.save(folder / row["file"])
            write_thumbnail(folder, row["file"], picture)
        else:
            first = Path(rows[i % DISTINCT]["file"])
            os.link(folder / first, folder / row["file"])
            os.link(folder / THUMBNAILS / first.with_suffix(".jpg"), folder / THUMBNAILS / small)
    steps = range(10, 100 * epochs + 1, 10)
    metrics = [{"step": s, "phase": 1, "objective": "dmd", "loss": 1 / s, "samples_per_second": 20.0} for s in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    add_to_manifest(folder, rows)
    write_review(folder, [])


def make_rows(prompts: int, epochs: int) -> Iterator[dict]:
    """Manifest rows of the teacher's round, numbered 0 here, and of `epochs` rounds of a student."""
    words = "a small lighthouse on a cliff above a calm sea at dusk, seen from a boat, soft light, fine detail"
    chance = np.random.default_rng(1)
    for epoch in range(epochs + 1):
        prefix = f"epoch_{epoch:04d}" if epoch else "teacher"
        for index in range(prompts):
            health, likeness, judged = (float(x) for x in chance.random(3))
            done = {"ok": True, "error": None, "latency_s": 0.0031}
            figures = {"contrast": health / 3, "sharpness": health / 9, "saturation": health / 4, "distinctness": 0.2}
            scores = {
                "health": {"score": health, **done, **figures},
                "fidelity": {"score": likeness, **done, "psnr": 30 * likeness, "ssim": likeness},
                "vlm": {"score": 10 * judged, **done, "reason": "All is there; the light is a little flat."},
            }
            yield {
                "file": f"{prefix}_rank_{index % 8}_sample_{index // 8:02d}.png",
                "prompt": f"{words}, number {index}",
                "prompt_index": index,
                "epoch": epoch,
                "step": 100 * epoch,
                "rank": index % 8,
                "seed": index,
                "sampler": "ddim",
                "num_inference_steps": 4 if epoch else 50,
                "eta": 0.0,
                "shift": 3.0,
                "weights": "ema" if epoch else "teacher",
                "height": PIXELS,
                "width": PIXELS,
                "phase": "1 dmd" if epoch else "",
                "seconds": 0.2,
                "ok": True,
                "error": None,
                "scores": scores,
            }


# -------------------------------------------------------------------------------------------------- command line


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=at_least_one, default=200, help="(200)")
    parser.add_argument("--epochs", type=at_least_one, default=100, help="(100)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="medians count (3)")
    args = parser.parse_args(argv)
    try:
        filled, usable = (median(seconds) for seconds in measure(args.prompts, args.epochs, args.repeats))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    print(
        f"{args.prompts} prompts × {args.epochs} epochs, medians of {args.repeats}\n"
        f"first screen of the table drawn: {filled:.2f} s after navigation\n"
        f"a click has opened a picture:    {usable:.2f} s (bar: < {BAR:g} s{'' if usable < BAR else ', NOT MET'})"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
