"""A disk that is full or cannot be written to: a line that says so, the end on all ranks, a good last checkpoint."""

import subprocess
import time
from pathlib import Path

import pytest

from distributed.checkpoint import list_checkpoints, what_is_broken
from tests.faults.job import RUN_SECONDS

long = pytest.mark.long
FLAGS = (
    "--checkpointing_steps",
    "2",
    "--steps_per_epoch",
    "1000",
    "--logging_steps",
    "1000",
    "--checkpoints_total_limit",
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte of its own, where this may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here (only root may)")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def remount(disk: Path, options: str) -> None:
    """Tried again while a file is being written there."""
    deadline = time.monotonic() + 20
    while (done := subprocess.run(["mount", "-o", f"remount,{options}", disk], capture_output=True)).returncode:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.01)


def assert_failed_whole(job, words: str) -> Path:
    """It ended on all ranks, gave this reason, and its last checkpoint, which is returned, can be gone on from."""
    assert len(job.named()) == 1 and words in job.named()[0] and "rank 0 failed" in job.named()[0], job.words()
    assert job.words().count("exitcode  : 1") == 2, job.words()
    last = list_checkpoints(job.folder / "checkpoints")[-1]
    assert what_is_broken(last) is None
    return last


def assert_goes_on(last: Path, start, folder: str) -> None:
    again = start(*FLAGS, "2", "--resume_from_checkpoint", "latest", folder=folder, steps=str(int(last.name[5:]) + 2))
    assert again.end(RUN_SECONDS) == 0 and f"resumed from {last}" in again.words(), again.words()


def test_a_full_disk(small_disk, start):
    job = start(*FLAGS, "9", folder="disk/out")
    assert job.process.wait(RUN_SECONDS) != 0 and not job.processes()
    last = assert_failed_whole(job, "No space left on device")
    assert not list(last.parent.glob(".*"))
    remount(small_disk, "size=20m")
    assert_goes_on(last, start, "disk/out")


@long
def test_files_that_cannot_grow(start):
    job = start(*FLAGS, "9", fault="full writing 0 4")
    assert job.process.wait(RUN_SECONDS) != 0 and not job.processes()
    last = assert_failed_whole(job, "File too large")
    assert not list(last.parent.glob(".*"))
    assert_goes_on(last, start, "out")


@long
def test_a_disk_that_becomes_read_only(small_disk, start):
    remount(small_disk, "size=20m")
    job = start(*FLAGS, "2", folder="disk/out")
    job.wait_for(lambda: list_checkpoints(job.folder / "checkpoints"))
    remount(small_disk, "ro")
    assert job.process.wait(RUN_SECONDS) != 0 and not job.processes()
    last = assert_failed_whole(job, "Read-only file system")
    remount(small_disk, "rw")
    assert_goes_on(last, start, "disk/out")


@long
def test_a_read_only_folder_is_a_mistake_said_at_the_start(small_disk, start):
    remount(small_disk, "ro")
    job = start("--output_dir", str(small_disk / "out"))
    assert job.end(RUN_SECONDS) != 0 and not job.processes()
    said = f"error: --output_dir {small_disk / 'out'}: cannot be written to (Read-only file system); give a folder"
    assert job.words().count(said) == 1 and "exitcode  : 2" in job.words(), job.words()
