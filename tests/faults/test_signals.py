"""SIGTERM and SIGINT under real torchrun: all ranks finish the step together, write a checkpoint, and can go on."""

import os
import re
import signal
import time

import pytest

from distributed.checkpoint import list_checkpoints, what_is_broken
from tests.faults.job import RUN_SECONDS, TOO_MANY


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
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


@pytest.mark.long
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


long = pytest.mark.long


@long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_ranks_import(number, start):
    run = start()
    run.wait_for(lambda: len(run.ranks()) == 2)
    time.sleep(1)
    run.process.send_signal(number)
    assert run.end() != 0, run.words()
    assert not run.processes() and not run.folder.exists()


@long
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_to_one_rank_before_the_group_exists_ends_the_job(number, start):
    run = start(fault=f"{number} group 1")
    assert run.end_of_fault() != 0 and not run.folder.exists()
    words = run.words() if number == "SIGINT" else run.root_cause()
    assert ("stopped before anything was begun" if number == "SIGINT" else "Signal 15 (SIGTERM)") in words, run.words()


@pytest.mark.parametrize("where", ["loading", pytest.param("start", marks=long)])
def test_a_signal_to_one_rank_before_the_first_step_stops_all(where, start):
    run = start(fault=f"SIGTERM {where} 1")
    assert run.end(RUN_SECONDS) == 0 and not run.processes(), run.words()
    assert "stopped; to go on: torchrun --nproc_per_node=2 " in run.words() and not run.rows()
    assert not (run.folder / "checkpoints").exists()
