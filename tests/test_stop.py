"""SIGTERM and SIGINT under real torchrun: all ranks finish the step together, write a checkpoint, and can go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed.checkpoint import list_checkpoints, what_is_broken
from tests.test_train import PROGRAM, flags

LIMIT = 90.0  # seconds, until a run has got somewhere
TOO_MANY = "100000"  # steps: more than any test waits for


class Started:
    """The program on two ranks, in the background."""

    def __init__(self, teacher: Path, folder: Path, *more: str) -> None:
        self.folder = folder
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", PROGRAM]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        given = flags(teacher, folder, "--score", "none", *more)
        given[given.index("--num_steps") + 1] = TOO_MANY
        self.said = open(folder.parent / "said.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen([sys.executable, *command, *given], stdout=self.said, stderr=self.said, env=env)

    def wait_for(self, ready) -> None:
        deadline = time.monotonic() + LIMIT
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.words()
            time.sleep(0.05)

    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def ranks(self) -> list[int]:
        """Their process ids."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def words(self) -> str:
        self.said.seek(0)
        return self.said.read()

    def end(self, within: float = 30.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(within)
        finally:
            self.process.kill()


@pytest.fixture
def start(random_pipeline_dir, tmp_path):
    started = []

    def start(*more: str, folder="out") -> Started:
        started.append(Started(random_pipeline_dir, tmp_path / folder, *more))
        return started[-1]

    yield start
    for each in started:
        for pid in each.ranks() if each.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        each.process.kill()


def is_linux() -> bool:
    return Path("/proc/self/task").exists()


pytestmark = [pytest.mark.torchrun, pytest.mark.skipif(not is_linux(), reason="finds the ranks by /proc")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(number, start):
    run = start("--steps_per_epoch", TOO_MANY)
    run.wait_for(lambda: len(run.rows()) > 2)
    os.kill(run.ranks()[1], number)
    assert run.end() == 0, run.words()
    said = run.words()
    assert (
        "stopped; to go on: torchrun --nproc_per_node=2 " in said and said.count("--resume_from_checkpoint latest") == 1
    )
    (checkpoint,) = list_checkpoints(run.folder / "checkpoints")
    last = run.rows()[-1]["step"]
    assert checkpoint.name == f"step_{last:08d}" and what_is_broken(checkpoint) is None

    again = start("--steps_per_epoch", TOO_MANY, "--resume_from_checkpoint", "latest")
    again.wait_for(lambda: again.rows()[-1]["step"] > last + 2)
    os.kill(again.ranks()[0], number)
    assert again.end() == 0, again.words()
    assert f"resumed from {checkpoint}, after step {last}" in again.words()
    steps = [row["step"] for row in again.rows()]
    assert steps == list(range(1, len(steps) + 1)), "each step is logged once"


def test_torchrun_hands_a_signal_on_and_all_ranks_stop_in_time(start):
    run = start("--steps_per_epoch", TOO_MANY)
    run.wait_for(lambda: len(run.rows()) > 1)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0, "torchrun's own exit code tells of the signal"
    (checkpoint,) = list_checkpoints(run.folder / "checkpoints")
    assert what_is_broken(checkpoint) is None and "stopped; to go on" in run.words()


def test_a_signal_while_pictures_are_drawn(start, tmp_path):
    """A round of many pictures, one at a time, is left; the checkpoint is of the step before it."""
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"prompt {i}" for i in range(2000)))
    run = start("--steps_per_epoch", "3", "--sample_prompts", str(many), "--sample_batch_size", "1")
    run.wait_for(lambda: len(list(run.folder.glob("samples/*_rank_1_*.png"))) > 2)
    os.kill(run.ranks()[0], signal.SIGTERM)
    assert run.end() == 0, run.words()
    drawn = len(list(run.folder.glob("samples/*_sample_*.png")))
    (checkpoint,) = list_checkpoints(run.folder / "checkpoints")
    assert checkpoint.name == "step_00000003" and drawn < 2000
    assert not (run.folder / "samples" / "manifest.jsonl").exists(), "the round is drawn again, whole"


def test_a_signal_while_prompts_are_encoded(start, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("\n".join(f"prompt number {i}" for i in range(200_000)))
    run = start("--data_path", str(more))
    run.wait_for(lambda: list(run.folder.glob("prompt_embeddings/*/part-*.safetensors")))
    os.kill(run.ranks()[1], signal.SIGTERM)
    assert run.end() == 0, run.words()
    assert re.search("stopped; to go on", run.words()) and not (run.folder / "checkpoints").exists()
