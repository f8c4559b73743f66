"""What checkpoints cost the training loop.

    python benchmarks/checkpointing.py

One run of the embedded teacher's recipe, with a checkpoint every few steps. The step after one pays for it twice: it
waits for the copy, and shares the machine with the writing. Both are what it takes longer than the other steps do.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: this folder, where this file would hide the package `sampling`, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import train_distillation
from benchmarks.arguments import at_least_one
from config.config import load_config
from distillation.objective import settings_of
from distillation.trackers import Trackers
from distributed.checkpoint import Checkpoints, list_checkpoints
from distributed.process_group import init_process_group
from distributed.stop import StopSignal

EVERY = 100  # steps between two checkpoints, for which the bar is set
BAR = 0.05  # of the time of those steps
PAUSE = 4  # steps between two checkpoints here: enough for the writing to end before the next one


class Timed(Checkpoints):
    """Keeps the seconds that `save` takes the loop."""

    waited: list[float] = []

    def save(self, *args) -> None:
        started = time.perf_counter()
        super().save(*args)
        self.waited.append(time.perf_counter() - started)


def measure(count: int, folder: Path) -> tuple[float, list[float], list[float], float]:
    """Seconds of a plain step, of each step after a checkpoint, of each wait for one; and a checkpoint's size in MB."""
    flags = [
        "--config", "config/tiny.toml", "--objective", "trajectory", "--updates_per_rollout", "2", "--output_dir",
        str(folder), "--num_steps", str(PAUSE * count + 2), "--checkpointing_steps", str(PAUSE), "--logging_steps", "1",
        "--no_save_samples",
    ]  # fmt: skip
    config = load_config(flags, settings_of)
    ranks = init_process_group(config.run.ddp_timeout)
    train_distillation.set_up_logging(ranks)
    with Trackers(config.run, ranks.is_main) as trackers:
        train_distillation.train(config, ranks, trackers, StopSignal())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]  # the first warms up
    after = [row["step_seconds"] for row in rows if row["step"] % PAUSE == 1]
    plain = median(row["step_seconds"] for row in rows if row["step"] % PAUSE != 1)
    (newest, *_) = reversed(list_checkpoints(folder / "checkpoints"))
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6
    return plain, after, Timed.waited[:-1], size


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--count", type=at_least_one, default=10, help="checkpoints (10)")
    args = parser.parse_args(argv)
    train_distillation.Checkpoints = Timed
    with tempfile.TemporaryDirectory() as folder:
        plain, after, waited, size = measure(args.count, Path(folder))
    cost = max(0.0, median(after) - plain)
    share = cost / (EVERY * plain)
    print(
        f"a plain step {plain:.3f} s; the step after a checkpoint of {size:.0f} MB {median(after):.3f} s, of which "
        f"{median(waited):.3f} s it stands still\n"
        f"a checkpoint every {EVERY} steps costs {share:.2%} (bar ≤ {BAR:.0%}: {'met' if share <= BAR else 'NOT met'})"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
