"""A rank that fails or dies, under real torchrun: the job ends soon, and says which rank it was and why."""

import os
import re
import signal
import time

import pytest

from distributed.checkpoint import list_checkpoints, what_is_broken
from tests.faults.job import END_SECONDS, RUN_SECONDS

long = pytest.mark.long
RAISED = "ValueError: a fault put here by the test"
MEMORY = r"RuntimeError: .*can't allocate memory"
KILLED = "ended without a word: killed"
EVERY_STEP = ("--checkpointing_steps", "1", "--steps_per_epoch", "2")


def assert_named(job, rank: int, words: str) -> None:
    """The rank and its error are the program's last words, the only such ones, and the end of torchrun's summary."""
    assert len(job.named()) == 1 and re.match(f"rank {rank} failed: {words}", job.named()[0]), job.words()
    cause = job.root_cause()
    assert f"rank      : {rank} " in cause and re.search("SIGKILL" if words == KILLED else words, cause), job.words()


@pytest.mark.parametrize(
    "fault, words",
    [
        ("raises training 1 3", RAISED),
        ("killed training 0 3", KILLED),
        pytest.param("raises training 0 3", RAISED, marks=long),
        pytest.param("killed training 1 3", KILLED, marks=long),
        pytest.param("memory training 1 3", MEMORY, marks=long),
        pytest.param("raises start 1", RAISED, marks=long),
        pytest.param("killed start 0", KILLED, marks=long),
        pytest.param("raises loading 1", RAISED, marks=long),
        pytest.param("killed loading 1", KILLED, marks=long),
        pytest.param("memory loading 0", MEMORY, marks=long),
        pytest.param("raises encoding 1", RAISED, marks=long),
        pytest.param("killed encoding 1", KILLED, marks=long),
        pytest.param("killed sampling 1", KILLED, marks=long),
        pytest.param("raises checkpointing 1 2", RAISED, marks=long),
        pytest.param("killed checkpointing 0 2", KILLED, marks=long),
        pytest.param("killed writing 0 4", KILLED, marks=long),
    ],
)
def test_the_job_ends_and_names_the_rank_and_its_error(fault, words, start):
    job = start(*EVERY_STEP, fault=fault)
    assert job.end_of_fault() != 0
    assert_named(job, int(fault.split()[2]), words)
    checkpoints = list_checkpoints(job.folder / "checkpoints")
    assert all(what_is_broken(checkpoint) is None for checkpoint in checkpoints)
    if "3" in fault or "2" in fault:
        assert checkpoints, "what was written before the fault is kept"


@long
def test_a_rank_that_fails_while_another_waits_inside_a_forward_is_named(start):
    sharded = ("--student_sharding", "fsdp", "--teacher_device_strategy", "shard")
    job = start(*EVERY_STEP, *sharded, fault="raises training 1 3")
    assert job.end_of_fault() != 0
    assert_named(job, 1, RAISED)


@long
def test_a_rank_that_cannot_draw_its_share_ends_the_run_after_a_checkpoint(start):
    job = start(*EVERY_STEP, fault="raises sampling 1")
    assert job.end_of_fault() != 0
    assert len(job.named()) == 1 and f"RoundFailed: sampling round epoch_0001: rank 1: {RAISED}" in job.named()[0]
    assert [p.name for p in list_checkpoints(job.folder / "checkpoints")][-1:] == ["step_00000002"]


@pytest.mark.parametrize(
    "fault, said",
    [
        ("flag --max_grad_norm=0.5 1", "error: --max_grad_norm is 0.5 on rank 1, but 1.0 on rank 0"),
        pytest.param("version diffusers 1", "error: diffusers is '0.1' on rank 1, but ", marks=long),
    ],
)
def test_ranks_that_were_started_differently_are_refused(fault, said, start):
    job = start(fault=fault)
    assert job.end(RUN_SECONDS) != 0 and not job.processes()
    assert job.words().count(said) == 1 and "exitcode  : 2" in job.words(), job.words()
    assert "Traceback" not in job.words().partition("error: ")[0] and not job.folder.exists()


@long
def test_no_rank_outlives_torchrun(start):
    job = start()
    job.wait_for(lambda: len(job.rows()) > 1)
    job.process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + END_SECONDS
    while job.processes():
        assert time.monotonic() < deadline, job.words()
        time.sleep(0.1)
    assert "because torchrun's store has gone" in job.words()


def test_a_hang_ends_at_the_timeout_and_is_located(start):
    job = start("--ddp_timeout", "5", fault="hangs training 1 3")
    assert job.end_of_fault() != 0
    assert len(job.named()) == 1 and "rank 0 failed: RuntimeError" in job.named()[0] and "imed out" in job.named()[0]
    for text in (job.words().partition("rank 0 failed")[2], job.root_cause()):
        where = r"rank 1 did not come: .*optimization_step \(.*train_distillation.py:\d+\) > faulty \(.*faulty.py:\d+\)"
        assert re.search(where, text), job.words()
        assert re.search(r"rank 0 was waiting for the others in .*optimization_step", text)


@long
def test_a_process_that_is_stopped_is_told_of(start):
    job = start("--ddp_timeout", "5")
    job.wait_for(lambda: len(job.rows()) > 1)
    os.kill(job.ranks()[1], signal.SIGSTOP)
    job.wait_for(lambda: "rank 1 did not come: does not answer" in job.words())
