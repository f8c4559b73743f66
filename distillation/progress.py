"""What is seen of a run while it trains: a progress bar, and every few steps a row of metrics.jsonl and trackers."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from distillation.trackers import Trackers
from distillation.trained import Trained
from distributed.process_group import Ranks, mean_over_ranks


class Progress:
    """Collects each step's figures on the device and reads them only when a row is due.

    Args:
        prompts_per_step: over all ranks, for the speed.
    """

    def __init__(
        self, path: Path, total_steps: int, every: int, prompts_per_step: int, ranks: Ranks, trackers: Trackers
    ) -> None:
        self.path, self.every, self.prompts_per_step = path, every, prompts_per_step
        self.ranks, self.trackers = ranks, trackers
        self.bar = tqdm(total=total_steps, desc="training", unit="step", disable=not ranks.is_main, dynamic_ncols=True)
        self.total_steps, self.skipped = total_steps, 0
        self.nonfinite_steps = 0  # so far
        self._seconds, self._steps, self._sums, self._counts = 0.0, 0, {}, {}
        self._resumed = time.perf_counter()

    def advance(
        self,
        step: int,
        epoch: int,
        phase: int,
        objective: str,
        figures: dict,
        trained: dict[str, Trained],
        ends_phase: bool,
    ) -> None:
        """Count a step and, where a row is due, write it: every so many steps, and at the end of a phase, so that no
        row mixes two. All ranks call it: a row is the mean over them.

        Args:
            figures: scalars on the device; NaN where there is nothing to tell.
        """
        self._steps += 1
        for key, value in figures.items():  # not every step updates every network
            known = ~torch.isnan(value)
            self._sums[key] = self._sums.get(key, 0.0) + torch.where(known, value, 0.0)
            self._counts[key] = self._counts.get(key, 0) + known
        self.bar.update()
        if not self.is_due(step, ends_phase):
            return
        keys = sorted(self._sums)
        sums = torch.stack(
            [
                torch.as_tensor(self._sums[k] / self._counts[k], dtype=torch.float32, device=self.ranks.device)
                for k in keys
            ]
        )
        means = mean_over_ranks(sums).tolist()
        self._seconds += time.perf_counter() - self._resumed
        step_seconds = self._seconds / self._steps
        row = {"step": step, "epoch": epoch, "phase": phase, "objective": objective}
        row |= dict(zip(keys, means, strict=True))
        row |= {"lr" if name == "student" else f"{name}_lr": t.learning_rate for name, t in trained.items()}
        row |= {"step_seconds": step_seconds, "samples_per_second": self.prompts_per_step / step_seconds}
        row |= {"nonfinite_steps": self.nonfinite_steps} if self.nonfinite_steps else {}
        self._seconds, self._steps, self._sums, self._counts = 0.0, 0, {}, {}
        self._resumed = time.perf_counter()
        if self.ranks.is_main:
            self._write(row)
            self.trackers.log(step, row)

    def is_due(self, step: int, ends_phase: bool) -> bool:
        """Whether a row is written after this step: the host then waits for the GPU."""
        return step % self.every == 0 or ends_phase

    def say(self, words: str) -> None:
        """A line above the bar."""
        if self.ranks.is_main:
            self.bar.write(words, file=sys.stderr)

    def skip(self, steps: int) -> None:
        """A phase has ended `steps` before its time: the run is shorter by them."""
        self.skipped += steps
        self.total_steps -= steps
        self.bar.total -= steps

    def state_dict(self) -> dict:
        """This rank's own figures since the last row, and what all ranks have alike."""
        counts = {key: int(n) for key, n in self._counts.items() if n}  # none: all that it was to tell was skipped
        sums = {key: float(self._sums[key]) for key in counts}
        shared = {"skipped": self.skipped, "nonfinite_steps": self.nonfinite_steps}
        return shared | {"steps": self._steps, "sums": sums, "counts": counts}

    def load_state_dict(self, state: dict, step: int) -> None:
        """Go on after `step`."""
        self.skip(state["skipped"])
        self.nonfinite_steps = state["nonfinite_steps"]
        self._steps, self._sums, self._counts = state["steps"], dict(state["sums"]), dict(state["counts"])
        self.bar.n = self.bar.initial = step
        self.bar.refresh()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while pictures are drawn, so that a step's time is a step's."""
        self._seconds += time.perf_counter() - self._resumed
        yield
        self._resumed = time.perf_counter()

    def close(self) -> None:
        self.bar.close()

    def _write(self, row: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # JSON has no NaN and no infinity; fp16's first overflows, which the loss scaler answers, bring some.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(finite) + "\n")
        speed = f"{row['samples_per_second']:.1f} prompts/s"
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses(row).items())
        shown += f", {self.nonfinite_steps} steps skipped" if self.nonfinite_steps else ""
        self.bar.set_postfix_str(f"{row['objective']} {shown}, lr {row['lr']:.2g}, {speed}")


def losses(row: dict) -> dict[str, float]:
    """The losses of a row, the student's first. A row of steps that updated other networks alone has none of its."""
    names = [name for name in row if name == "loss" or name.endswith("_loss")]
    return {name: row[name] for name in sorted(names, key=lambda name: name != "loss")}
