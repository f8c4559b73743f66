"""What a rank says and does when it ends before its time, in one process; under torchrun: tests/faults."""

import os
import subprocess
import sys
import threading
import time
import traceback

import pytest

from distributed import failure
from distributed.checkpoint import WRITER


@pytest.fixture
def codes(monkeypatch):
    """Exit codes, in place of the exit."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_fail_says_which_rank_and_exits_with_1(monkeypatch, capsys, codes):
    monkeypatch.setenv("RANK", "3")
    error = ValueError("nan\nor so")
    error.add_note("rank 2 did not come")
    failure.fail(error)
    said = capsys.readouterr().err
    assert codes == [1] and said.endswith("rank 3 failed: ValueError: nan or so\nrank 2 did not come\n")


def test_a_checkpoint_in_work_is_waited_for(codes):
    written = []
    threading.Thread(target=lambda: (time.sleep(0.3), written.append(not codes)), name=WRITER).start()
    failure.fail(ValueError("nan"))
    assert written == [True] and codes == [1]


def test_one_rank_alone_has_only_failures_of_its_own(codes):
    failure.stand_back(RuntimeError("connection closed"))
    assert not codes and failure.first_failure("these words") == "these words" and not failure.ended_beside()


def test_a_process_has_ended_when_nobody_has_looked_at_it_yet():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert failure._is_running(process.pid)
    process.stdin.close()
    deadline = time.monotonic() + 30
    while failure._is_running(process.pid):  # a zombie, until it is waited for
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.wait()
    assert not failure._is_running(process.pid)


def frame(file: str, name: str) -> traceback.FrameSummary:
    return traceback.FrameSummary(file, 7, name)


def test_a_place_is_told_by_the_programs_own_calls_and_the_innermost_one():
    own = frame(str(failure.ROOT / "distributed" / "stop.py"), "agreed")
    library = frame("/lib/site-packages/torch/nn/module.py", "forward")
    collective = frame("/lib/site-packages/torch/distributed/c10d.py", "all_reduce")
    launcher = frame("/lib/site-packages/torch/distributed/elastic/errors.py", "wrapper")
    assert failure.place_of([launcher, library, own]) == "agreed (distributed/stop.py:7)"
    assert failure.place_of([own, library]) == "agreed (distributed/stop.py:7) > forward (nn/module.py:7)"
    assert failure.place_of([own, library, collective]) == (
        f"{failure.WAITING}agreed (distributed/stop.py:7) > all_reduce (distributed/c10d.py:7)"
    )
    assert failure.place_of([]) == ""
