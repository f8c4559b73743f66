"""Scoring beside drawing: an event loop in a thread of its own takes a picture as soon as it is written.

It cannot hold a run: every call has its own limit, the round has a deadline, what is late is given up, and nothing that
goes wrong in a scorer leaves this file as an exception.
"""

import asyncio
import logging
import math
import threading
import time
from concurrent.futures import Future, as_completed
from typing import Any

from tqdm import tqdm

from sampling.scoring import Scorer, Shot

log = logging.getLogger(__name__)

PROGRESS_EVERY = 4  # results
FAILED_SCORE = 0.0
WORDS = 300  # characters of an error

Scores = dict[str, dict[str, dict[str, Any]]]  # picture's file → scorer → {"score", "ok", "error", "latency_s", …}


class Scoring:
    """The scorers of one rank at work. `submit` pictures while drawing, `collect` their scores at the round's end.

    Args:
        at_once: calls at the same time, of scorers that have no limit of their own.
        deadline: seconds that `collect` waits at most.
    """

    def __init__(self, scorers: list[Scorer], at_once: int = 32, deadline: float = 300.0) -> None:
        self.scorers, self.deadline = scorers, deadline
        self._loop = asyncio.new_event_loop()
        # A scorer with a limit of its own does not queue with the others: behind a judge that hangs it would be late.
        common = asyncio.Semaphore(at_once)
        self._slots = {s.name: asyncio.Semaphore(s.at_once) if s.at_once else common for s in scorers}
        self._calls: dict[Future, tuple[Scorer, Shot]] = {}
        # A daemon: a scorer that hangs does not keep the program from ending.
        threading.Thread(target=self._loop.run_forever, daemon=True, name="scoring").start()

    def submit(self, shot: Shot) -> None:
        """Have a picture scored, by all scorers. Returns at once; may be called from any thread."""
        for scorer in self.scorers:
            self._calls[asyncio.run_coroutine_threadsafe(self._call(scorer, shot), self._loop)] = scorer, shot

    def collect(self, show_progress: bool = False) -> Scores:
        """The scores of all pictures submitted since the last time, after `deadline` seconds at the latest."""
        calls, self._calls = self._calls, {}
        scores: Scores = {}
        waiting = not all(call.done() for call in calls)
        bar = tqdm(total=len(calls), desc="scores", unit="score", disable=not (waiting and show_progress))
        try:
            for done, call in enumerate(as_completed(calls, timeout=self.deadline), 1):
                scorer, shot = calls.pop(call)
                self._keep(scores, scorer, shot, call.result())
                if done % PROGRESS_EVERY == 0 or not calls:
                    bar.update(done - bar.n)
        except TimeoutError:
            pass  # what is left is given up below
        bar.close()
        for call, (scorer, shot) in calls.items():
            call.cancel()
            words = f"not there {self.deadline:g} s after drawing"
            log.warning("%s of %s failed: %s | prompt: %s", scorer.name, shot.path.name, words, shot.prompt)
            self._keep(scores, scorer, shot, failure(words, self.deadline))
        return scores

    def drop(self) -> None:
        """Give up what was submitted."""
        calls, self._calls = self._calls, {}
        for call in calls:
            call.cancel()

    @staticmethod
    def _keep(scores: Scores, scorer: Scorer, shot: Shot, verdict: dict[str, Any] | None) -> None:
        if verdict is not None:
            scores.setdefault(shot.path.name, {})[scorer.name] = verdict

    async def _call(self, scorer: Scorer, shot: Shot) -> dict[str, Any] | None:
        async with self._slots[scorer.name]:  # waiting for it takes nothing from the call's own time
            started = time.perf_counter()
            try:
                async with asyncio.timeout(scorer.timeout):
                    figures = await scorer.score(shot)
                if figures is None:
                    return None
                if not math.isfinite(figures["score"]):
                    raise ValueError(f"the score is {figures['score']}")
            # A cancellation that comes from within a scorer is its failure; nobody waits for what `collect` cancels.
            except (Exception, asyncio.CancelledError) as error:  # recorded with its picture: a score is worth no run
                seconds = time.perf_counter() - started
                late = isinstance(error, TimeoutError) and seconds >= scorer.timeout
                words = f"no answer within {scorer.timeout:g} s" if late else in_words(error)
                log.warning("%s of %s failed: %s | prompt: %s", scorer.name, shot.path.name, words, shot.prompt)
                return failure(words, seconds)
            latency = round(time.perf_counter() - started, 4)
            return {"score": figures["score"], "ok": True, "error": None, "latency_s": latency, **figures}


def in_words(error: BaseException) -> str:
    """On one line, with what lies behind it, and no longer than somebody reads: a server may answer with a page."""
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    words = " ".join(f"{type(error).__name__}: {error}{cause}".split())
    return words if len(words) <= WORDS else f"{words[:WORDS]}…"


def failure(words: str, seconds: float) -> dict[str, Any]:
    """In place of a score. `ok` tells it from a real one of zero."""
    return {"score": FAILED_SCORE, "ok": False, "error": words, "latency_s": round(seconds, 4)}
