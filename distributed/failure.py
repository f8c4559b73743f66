"""What happens when a rank ends before its time: it says why, last of all, and the others end with it.

A rank that waits in a collective cannot tell a dead rank from a slow one; over NCCL it would wait for --ddp_timeout. So
a thread of each rank looks every second whether the ranks beside it are alive, and whether one has left its last words
in the store. torchrun looks too, but at its own machine alone, and its SIGTERM does not reach Python code that is
inside a collective.
"""

import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from distributed.checkpoint import WRITER
from distributed.process_group import PeerFailed, Ranks, barrier, gather_objects, is_alone, store

FIRST = "words of the first rank that failed"  # keys of the store
PLACE = "place of rank"
LOOK_SECONDS = 1.0  # between two looks at the others
NOTICE_SECONDS = 2.0  # until a death is seen beside it, and told to other machines
GRACE_SECONDS = 5.0  # for torchrun to end this process, before it ends itself
PLACES_SECONDS = 3.0  # for the others to say where they are
WRITER_SECONDS = 8.0  # for a checkpoint that is being written
FRAMES_SHOWN = 5
WAITING = "waiting for the others in "
ROOT = Path(__file__).parent.parent

_beside: dict[int, int] = {}  # rank → process id, of the others on this machine
_wake, _over = threading.Event(), threading.Event()
_place = ""  # where this rank failed


def watch_the_others(ranks: Ranks) -> None:
    """From now on this process ends when another rank does, until `stop_watching`. Collective."""
    if is_alone():
        return
    # Process ids mean something within a machine; torchrun numbers its machines, another launcher may not.
    told = gather_objects((os.environ.get("GROUP_RANK"), os.getpid()))
    machine = told[ranks.rank][0]
    _beside.update({r: pid for r, (where, pid) in enumerate(told) if where == machine is not None and r != ranks.rank})
    threading.Thread(target=_watch, args=(ranks,), daemon=True, name="watch").start()


def stop_watching() -> None:
    """From now on ranks may end, which they do in `destroy`, when all are there. Collective."""
    barrier()  # all ranks: none stops watching while another still works
    _over.set()
    _wake.set()
    for thread in threading.enumerate():
        if thread.name == "watch":
            thread.join(GRACE_SECONDS)


def ended_beside() -> list[int]:
    """The ranks on this machine that have ended before their time. Safe in a signal handler."""
    return [] if _over.is_set() else [rank for rank, pid in _beside.items() if not _is_running(pid)]


def end_now() -> None:
    """Have the watch look at once, and end this process at once where another rank has ended. Safe in a signal
    handler."""
    _wake.set()


def first_failure(words: str = "") -> str:
    """The words of the first rank that failed, "" where none has. `words` become them where there are none yet.

    Not a collective. Raises dist.DistError where the store is gone.
    """
    return words if is_alone() else store().compare_set(FIRST, "", words).decode()


def stand_back(error: Exception) -> None:
    """End this process in silence where `error` only tells that another rank has failed, and leave the word to that.

    Returns where the failure is this rank's own, and the first. One that comes of waiting too long is given a note
    that says where all ranks were.
    """
    global _place
    if is_alone():
        return
    _place = place_of(traceback.extract_tb(error.__traceback__))
    with suppress(RuntimeError):  # without a store nobody can be asked, and this rank says what it knows
        said = f"rank {os.environ['RANK']} failed: {in_words(error)}"
        if _is_another_s(error) or first_failure(said) != said:
            _wake.wait(GRACE_SECONDS)
            _end()
        if isinstance(error, RuntimeError) and "timed out" in said.lower():
            error.add_note(_where_all_were())


def fail(error: Exception) -> NoReturn:
    """Say which rank failed and why, and end this process at once with exit code 1; torchrun then ends the others.

    No clean-up but of a checkpoint in work: it would wait for peers that sit in a collective.
    """
    try:
        traceback.print_exception(error)
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        print(f"rank {os.environ.get('RANK', '0')} failed: {in_words(error)}{notes}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:
        _end()


def in_words(error: BaseException) -> str:
    """On one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


# ------------------------------------------------------------------------------------------------ the watch


def _watch(ranks: Ranks) -> None:
    try:
        while not first_failure():
            _wake.wait(LOOK_SECONDS)
            if _over.is_set():
                return
            _tell_of_deaths()
        place = _place or place_of(traceback.extract_stack(sys._current_frames()[threading.main_thread().ident]))
        store().set(f"{PLACE} {ranks.rank}", place)
    except RuntimeError:
        if not ended_beside():  # else that one was torchrun's reason to end
            print(f"rank {ranks.rank}: ends, because torchrun's store has gone", file=sys.stderr, flush=True)
        _end()
    _wake.wait(GRACE_SECONDS)
    _end()


def _tell_of_deaths() -> None:
    """Speak for a rank beside this one that could not say anything itself."""
    for rank in ended_beside()[:1]:
        words = f"rank {rank} failed: ended without a word: killed, or out of memory (rank {os.environ['RANK']} saw it)"
        if first_failure(words) == words:
            print(words, file=sys.stderr, flush=True)


def _end() -> NoReturn:
    """At once, but for a checkpoint that is nearly on the disk: it holds no fault, it was copied before."""
    try:
        for thread in threading.enumerate():
            if thread.name == WRITER:
                thread.join(WRITER_SECONDS)
    finally:
        os._exit(1)


def _is_another_s(error: Exception) -> bool:
    """Whether another rank failed before. A broken connection, which is some RuntimeError, may be seen before the
    death that broke it."""
    if isinstance(error, PeerFailed):
        return True
    may_be = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    deadline = time.monotonic() + (NOTICE_SECONDS if may_be else 0.0)
    while not first_failure():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        _tell_of_deaths()
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # no /proc, or another user's process
        return True
    return state not in "ZX"  # ended, and not yet noticed by torchrun


# ------------------------------------------------------------------------------------------------ where a rank is


def place_of(stack: traceback.StackSummary) -> str:
    """The innermost calls of this program in a stack, and what they wait in."""

    def is_own(frame: traceback.FrameSummary) -> bool:
        path = Path(frame.filename).resolve()
        return path.is_relative_to(ROOT) and "site-packages" not in path.parts

    waits = any(
        frame.name == "_engine_run_backward"
        or ("torch/distributed/" in frame.filename and "torch/distributed/elastic/" not in frame.filename)
        for frame in stack
    )
    shown = [frame for frame in stack[:-1] if is_own(frame)][-FRAMES_SHOWN:] + stack[-1:]
    places = [f"{frame.name} ({'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno})" for frame in shown]
    return (WAITING if waits else "") + " > ".join(places)


def _where_all_were() -> str:
    """A line for each place where ranks were, those that did not wait for the others last."""
    deadline, places = time.monotonic() + PLACES_SECONDS, {}
    for rank in range(torch.distributed.get_world_size()):
        key = f"{PLACE} {rank}"
        while not (there := store().check([key])) and time.monotonic() < deadline:
            time.sleep(0.1)
        place = store().get(key).decode() if there else "does not answer: stopped, or its machine is gone"
        places.setdefault(place, []).append(rank)
    lines = sorted(places.items(), key=lambda line: not line[0].startswith(WAITING))
    return "\n".join(
        f"rank {', '.join(map(str, ranks))} {'was' if place.startswith(WAITING) else 'did not come:'} {place}"
        for place, ranks in lines
    )
