"""Trackers for those who ask for them (--report_to): TensorBoard, Weights & Biases, Trackio.

Each works in a thread of its own, on rank 0: a server that is slow or gone neither holds training up nor ends it. What
they are told stands in metrics.jsonl and the samples folder too, with or without them.
"""

import importlib.util
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from config.config import RunConfig
from config.errors import UserError

log = logging.getLogger(__name__)

CLOSE_SECONDS = 120.0  # for what is still to be uploaded when the run is done, while the other ranks wait
CLOSE_SECONDS_AFTER_FAILURE = 5.0  # the other ranks wait to be told
WANDB_GALLERY = 100  # W&B drops what a list of pictures has beyond 108


class About(NamedTuple):
    """What a tracker is told of a run. `settings` is for reading only, and holds no keys."""

    project: str
    run_name: str
    folder: Path
    settings: dict[str, Any]


class Picture(NamedTuple):
    """`name` is the same in every round that draws the prompt: its number."""

    name: str
    path: Path
    prompt: str


class Tracker(Protocol):
    """Made, called and closed in one thread. `package` is what is imported, `requirement` what pip installs."""

    package: str
    requirement: str

    def __init__(self, about: About) -> None: ...

    def log(self, step: int, figures: dict[str, float]) -> None: ...

    def log_round(self, step: int, group: str, pictures: list[Picture], figures: dict[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


# ---------------------------------------------------------------------------------------------- one class a tracker


class TensorBoard:
    """Event files in output_dir/tensorboard."""

    package = requirement = "tensorboard"

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(about.folder / "tensorboard"))
        self.writer.add_text("settings", f"```\n{json.dumps(about.settings, indent=2)}\n```", 0)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # else it keeps them for two minutes, and a run that is killed takes them along

    def log_round(self, step: int, group: str, pictures: list[Picture], figures: dict[str, float]) -> None:
        for picture in pictures:
            with Image.open(picture.path) as file:
                pixels = np.asarray(file.convert("RGB"))
            # There are no captions: the prompt stands in the name.
            self.writer.add_image(f"{group}/{picture.name} {picture.prompt}", pixels, step, dataformats="HWC")
        self.log(step, figures)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; what it keeps on disk, or all with WANDB_MODE=offline, is in output_dir/wandb."""

    package, requirement = "wandb", "wandb>=0.31"

    def __init__(self, about: About) -> None:
        import wandb

        # In a terminal, init would ask for a key, and write it to a file.
        offline = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        if not offline and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; set WANDB_API_KEY, or WANDB_MODE=offline")
        self.Image = wandb.Image
        self.run = wandb.init(project=about.project, name=about.run_name, dir=str(about.folder), config=about.settings)
        self.open_step = 0

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._log(step, figures, commit=False)

    def log_round(self, step: int, group: str, pictures: list[Picture], figures: dict[str, float]) -> None:
        galleries = {}
        for first in range(0, len(pictures), WANDB_GALLERY):
            part = pictures[first : first + WANDB_GALLERY]
            name = f"{group}_from_{part[0].name}" if first else group
            galleries[name] = [self.Image(str(picture.path), caption=picture.prompt) for picture in part]
        self._log(step, figures | galleries, commit=True)

    def _log(self, step: int, values: dict, commit: bool) -> None:
        """W&B merges what it is told of a step, shows it when the step is closed, by a later one or by `commit`, and
        drops what comes for a closed one, which is therefore put one step late."""
        step = max(step, self.open_step)
        self.run.log(values, step=step, commit=commit)
        self.open_step = step + commit

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """Trackio; local in its own folder, TRACKIO_DIR, unless its environment names a Space or a server."""

    package = requirement = "trackio"

    def __init__(self, about: About) -> None:
        import trackio

        self.Image = trackio.Image
        self.run = trackio.init(project=about.project, name=about.run_name, config=about.settings)
        self.trouble, self.show = None, warnings.showwarning
        warnings.showwarning = self._notice

    def _notice(self, message: Warning | str, *where: Any) -> None:
        """Its log never raises, but warns of each figure and each picture that it loses."""
        if str(message).startswith("trackio.log()"):
            self.trouble = str(message)
        else:
            self.show(message, *where)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._log(step, figures)

    def log_round(self, step: int, group: str, pictures: list[Picture], figures: dict[str, float]) -> None:
        # It takes no lists of pictures.
        named = {f"{group}/{picture.name}": self.Image(picture.path, caption=picture.prompt) for picture in pictures}
        self._log(step, figures | named)

    def _log(self, step: int, values: dict) -> None:
        self.run.log(values, step=step)
        if self.trouble:
            raise RuntimeError(self.trouble)

    def close(self, failed: bool) -> None:
        self.run.finish()
        warnings.showwarning = self.show


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


# ---------------------------------------------------------------------------------------------- all of a run


def chosen_trackers(report_to: Iterable[str]) -> list[str]:
    """The names of the trackers to use; `all` stands for those that are installed.

    Raises UserError where the package of one that is asked for by name is missing.
    """
    for name in TRACKERS:
        if name in report_to and not is_installed(name):
            raise UserError(
                f"--report_to {name}: its package is not installed; run: pip install '{TRACKERS[name].requirement}'"
            )
    return [name for name in TRACKERS if name in report_to or ("all" in report_to and is_installed(name))]


def is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(TRACKERS[name].package)
    # A folder of that name, as wandb leaves in the working directory, is importable too, but has no file of its own.
    return spec is not None and spec.origin is not None


class Trackers:
    """The trackers of a run, as a context: leaving it closes them. None but rank 0's does anything.

    A tracker that fails is said once and dropped.
    """

    def __init__(self, run: RunConfig, is_main: bool) -> None:
        self.names = chosen_trackers(run.report_to) if is_main else []
        self._folder, self._close_seconds = Path(run.output_dir), min(CLOSE_SECONDS, run.ddp_timeout / 4)
        self._project, self._run_name = run.tracker_project_name, run.run_name
        self._workers: list[Worker] = []
        if is_main and "all" in run.report_to:
            log.info("--report_to all: %s", ", ".join(self.names) or f"none of {', '.join(TRACKERS)} is installed")

    def start(self, settings: dict[str, Any]) -> None:
        """Begin a run in each tracker. Returns at once.

        Args:
            settings: all there are, as JSON takes them, for the trackers to show.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        about = About(self._project, self._run_name, self._folder, settings)
        self._workers = [Worker(name, about) for name in self.names]
        for worker in self._workers:
            worker.start()

    def log(self, step: int, row: dict[str, Any]) -> None:
        """The numbers in a row of metrics.jsonl."""
        numbers = {f"train/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._tell(lambda tracker: tracker.log(step, numbers))

    def log_round(self, step: int, rows: list[dict], folder: Path, scores: dict[str, float]) -> None:
        """A round's pictures, every rank's, and what they scored.

        Args:
            rows: of the manifest. Pictures that failed are left out.
            scores: scorer → mean.
        """
        if not self._workers:
            return
        prefix = "teacher_" if any(row["weights"] == "teacher" for row in rows) else ""
        pictures = [
            Picture(f"{row['prompt_index']:03d}", folder / row["file"], row["prompt"])
            for row in rows
            if row["ok"] and (folder / row["file"]).exists()  # another machine's rank may have a disk of its own
        ]
        figures = {f"{prefix}scores/{name}": mean for name, mean in scores.items()}
        self._tell(lambda tracker: tracker.log_round(step, f"{prefix}samples", pictures, figures))

    def close(self, failed: bool = False) -> None:
        """Wait until the trackers have done what they were told, but not for ever."""
        self._tell(lambda tracker: tracker.close(failed))
        seconds = CLOSE_SECONDS_AFTER_FAILURE if failed else self._close_seconds
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.tasks.put(None)
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                log.warning("--report_to %s: not done after %g seconds; it is not waited for", worker.name, seconds)
        self._workers = []

    def _tell(self, task: Callable[[Tracker], None]) -> None:
        for worker in self._workers:
            if worker.is_alive():
                worker.tasks.put(task)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type | None, failure: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=failure is not None)


class Worker(threading.Thread):
    """A tracker at work, until a task is None or the tracker fails."""

    def __init__(self, name: str, about: About) -> None:
        super().__init__(name=name, daemon=True)  # one that hangs shall not keep the program from ending
        self.about, self.tasks = about, SimpleQueue()

    def run(self) -> None:
        try:
            tracker = TRACKERS[self.name](self.about)
            for task in iter(self.tasks.get, None):
                task(tracker)
        except Exception as failure:  # whatever it is, the run is worth more
            words = " ".join(f"{type(failure).__name__}: {failure}".split())
            log.warning("--report_to %s failed and is left out from here on: %s", self.name, words)
