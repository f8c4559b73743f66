"""torchrun --max-restarts: a rank that dies costs the steps since the last checkpoint, and nothing else."""

import pytest

from distributed.checkpoint import list_checkpoints
from tests.faults.job import RUN_SECONDS
from tests.test_checkpoint import bits_of, rows_of

FLAGS = ("--checkpointing_steps", "2", "--steps_per_epoch", "100", "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize(
    "fault",
    [
        "killed training 1 6",
        pytest.param("killed start 0", marks=pytest.mark.long),
        pytest.param("killed writing 0 4", marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_restarts_the_job_which_ends_as_if_nothing_had_happened(fault, start):
    straight = start(*FLAGS, folder="straight", steps="8")
    assert straight.end(RUN_SECONDS) == 0, straight.words()
    job = start(*FLAGS, folder="restarted", steps="8", fault=fault, once=True, launch=["--max-restarts=1"])
    assert job.end(RUN_SECONDS) == 0 and not job.processes(), job.words()
    assert job.faulted.exists() and len(job.named()) <= 1
    assert "resumed from" in job.words() or "start" in fault
    expected, last = (list_checkpoints(each.folder / "checkpoints")[-1] for each in (straight, job))
    assert last.name == "step_00000008" and bits_of(last) == bits_of(expected)
    assert rows_of(job.folder) == rows_of(straight.folder)
