"""A small job that is killed and stopped at random moments, started again each time, and ends with the very weights and
rows of an undisturbed run.

    python -m tests.faults.soak --restarts 30 --seed 0      (make soak)

Exit code 1 where anything differs, anything is left behind, or time was up before so many restarts.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from distributed.checkpoint import list_checkpoints
from tests.conftest import save_random_pipeline
from tests.faults.job import START_SECONDS, Job
from tests.test_checkpoint import bits_of, rows_of

STEPS_PER_LIFE = 12  # on the average at most, so that the job outlives its restarts
FLAGS = (
    "--steps_per_epoch", "20", "--sample_batch_size", "1", "--batch_size", "1", "--student_steps", "2",
    "--teacher_substeps", "1", "--checkpointing_steps", "3", "--logging_steps", "5", "--use_ema",
    "--resume_from_checkpoint", "latest",
)  # fmt: skip
FAULTS = {
    "SIGKILL to a rank": (signal.SIGKILL, True),
    "SIGTERM to a rank": (signal.SIGTERM, True),
    "SIGTERM to torchrun": (signal.SIGTERM, False),
    "SIGINT to torchrun": (signal.SIGINT, False),
    "SIGKILL to torchrun": (signal.SIGKILL, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None, help="of faults and moments (default: a new one)")
    parser.add_argument("--minutes", type=float, default=20.0, help="after so many no fault comes any more")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}, {args.restarts} restarts", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(soak(Path(folder), args.restarts, random.Random(seed), time.monotonic() + 60 * args.minutes))


def soak(folder: Path, restarts: int, chance: random.Random, deadline: float) -> int:
    """The exit code."""
    teacher = save_random_pipeline(folder / "teacher", experts=1)
    steps = str(STEPS_PER_LIFE * restarts + 20)
    straight = Job(teacher, folder / "straight", folder, *FLAGS, steps=steps)
    started = time.monotonic()
    straight.wait_for(lambda: straight.rows())
    start_seconds = time.monotonic() - started
    code = straight.process.wait()
    assert code == 0, straight.words()

    lives = 0
    while True:
        job = Job(teacher, folder / "disturbed", folder, *FLAGS, steps=steps)
        last_life = lives == restarts or time.monotonic() > deadline
        what = "left alone" if last_life else disturb(job, chance, start_seconds)
        code = job.process.wait(None if last_life else START_SECONDS)
        left_since = time.monotonic()
        while job.processes() and time.monotonic() < left_since + 15:
            time.sleep(0.1)
        print(f"{lives:3d}  {what}, exit code {code}, {last_step(job)} steps logged", flush=True)
        if job.processes() or (last_life and code):
            print(job.words())
            job.kill()
            return 1
        if last_life:
            break
        lives += 1

    ends = [list_checkpoints(each.folder / "checkpoints")[-1] for each in (straight, job)]
    same = {
        "weights": ends[0].name == ends[1].name and bits_of(ends[0]) == bits_of(ends[1]),
        "rows": rows_of(straight.folder) == rows_of(job.folder),
        "pictures": pictures(straight) == pictures(job),
        "no temporary files": not list((job.folder / "checkpoints").glob(".*")),
        f"{restarts} restarts": lives == restarts,
    }
    print(f"after {lives} restarts: " + ", ".join(f"{name}: {'yes' if it else 'NO'}" for name, it in same.items()))
    return 0 if all(same.values()) else 1


def disturb(job: Job, chance: random.Random, start_seconds: float) -> str:
    """A fault at a random moment, while the job starts or after some steps; in words."""
    name = chance.choice(list(FAULTS))
    while_starting, wait, rank = chance.random() < 0.3, chance.random(), chance.randrange(2)
    further = chance.randrange(STEPS_PER_LIFE)
    if while_starting:
        moment = f"{wait * start_seconds:.1f} s after the start"
        time.sleep(wait * start_seconds)
    else:
        before = last_step(job)
        moment = f"{wait:.2f} s after step {before + further} or so"
        deadline = time.monotonic() + START_SECONDS
        while last_step(job) < before + further and job.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(wait)
    number, to_rank = FAULTS[name]
    ranks = job.ranks() if to_rank and job.process.poll() is None else []
    pid = ranks[rank % len(ranks)] if ranks else job.process.pid
    if job.process.poll() is None:
        os.kill(pid, number)
    return f"{name}{'' if ranks or not to_rank else ' (none yet: to torchrun)'} {moment}"


def last_step(job: Job) -> int:
    """As the checkpoints tell, and the rows."""
    saved = [int(path.name[5:]) for path in list_checkpoints(job.folder / "checkpoints")]
    return max([0, *saved, *(row["step"] for row in job.rows())])


def pictures(job: Job) -> dict[str, bytes]:
    """Their pixels: the text beside them says how long each has taken."""
    return {path.name: Image.open(path).tobytes() for path in job.folder.glob("samples/*_rank_*.png")}


if __name__ == "__main__":
    main()
