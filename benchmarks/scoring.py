"""What scoring adds to a sampling round, and how fast the review page opens.

    python benchmarks/scoring.py

A judge that takes its time answers on this machine, over HTTP. The round is drawn alone and with the judge, in turns:
scores are asked for while the next pictures are drawn, so the longer of drawing and judging should be all that is paid.
"""

import argparse
import io
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: this folder, where this file would hide the package `sampling`, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import transformers

from benchmarks.arguments import at_least_one
from benchmarks.page import measure_page
from benchmarks.sampling import Student, load_student
from config.errors import UserError
from distributed.process_group import Ranks
from models.teacher import inspect_teacher
from sampling.in_flight import Scoring
from sampling.parallel import ParallelSampler
from sampling.scoring import Judge
from tests.judge import judge_server

PICTURES = 64
ROUND_BAR = 1.2  # of the longer of drawing and judging
PAGE_BAR = 2.0  # seconds
SIZES = (64, 256)  # pixels: one where judging takes longer, which has the bar, one where drawing does
BATCH = 8  # pictures drawn together: the first are judged while the others are drawn


def serve(delay: float, pipe: Connection) -> None:
    with judge_server(delay) as server:
        pipe.send(server.url)
        pipe.recv()


@contextmanager
def judge_process(delay: float) -> Iterator[str]:
    """The address of a judge in a process of its own: its work is not to count as the sampler's."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(delay, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def draw(student: Student, size: int, steps: int, folder: Path, scoring: Scoring | None) -> float:
    """Seconds of a round on one rank."""
    round_ = student.round_of(size, steps)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False)
    shape = student.info.latent_shape(size, size)
    sampler = ParallelSampler(student.vae, shape, folder, ranks, BATCH, scoring)
    started = time.perf_counter()
    with redirect_stderr(io.StringIO()):  # progress bars
        rows = sampler.draw(round_, student.field, student.text)
    seconds = time.perf_counter() - started
    sampler.finish()
    judged = [row.scores.get("vlm", {}).get("ok") for row in rows]
    if not all(row.ok for row in rows) or scoring and not all(judged):
        raise RuntimeError("pictures or scores failed; their figures would mean nothing")
    return seconds


def measure_rounds(args: argparse.Namespace) -> list[str]:
    os.environ.setdefault("OPENAI_API_KEY", "none")
    student = load_student(inspect_teacher("models/tiny_wan"), PICTURES)
    judging = args.seconds * PICTURES / args.max_concurrent_evals
    lines = [f"{PICTURES} pictures, a judge that takes {args.seconds:g} s each, {args.max_concurrent_evals} at once"]
    for size in SIZES:
        alone, scored = [], []
        with judge_process(args.seconds) as url, tempfile.TemporaryDirectory() as folder:
            scoring = Scoring([Judge("judge", url, 60)], args.max_concurrent_evals)
            for _ in range(args.repeats + 1):
                alone.append(draw(student, size, args.steps, Path(folder) / "alone", None))
                scored.append(draw(student, size, args.steps, Path(folder) / "scored", scoring))
        drawing, whole = median(alone[1:]), median(scored[1:])  # the first of each warms up
        ratio = whole / max(drawing, judging)
        lines.append(
            f"  {size}×{size}: drawing alone {drawing:.2f} s, judging alone {judging:.2f} s, together {whole:.2f} s = "
            f"{ratio:.2f}× the longer of them"
        )
        if judging > drawing:  # else the last pictures are judged when all is drawn, however fast that is
            lines[-1] += f" (bar ≤ {ROUND_BAR}×: {'met' if ratio <= ROUND_BAR else 'NOT met'})"
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=2.0, help="that the judge takes for a picture (2)")
    parser.add_argument("--max_concurrent_evals", type=at_least_one, default=32, help="questions at the same time (32)")
    parser.add_argument("--steps", type=at_least_one, default=4, help="a picture (4)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="of each side; medians count (3)")
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        print("\n".join(measure_rounds(args)))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    seconds = measure_page(prompts=200, epochs=100)
    met = "met" if seconds < PAGE_BAR else "NOT met"
    print(f"review page of 200 × 100 pictures: opens in {seconds:.2f} s (bar < {PAGE_BAR:g} s: {met})")


if __name__ == "__main__":
    main(sys.argv[1:])
