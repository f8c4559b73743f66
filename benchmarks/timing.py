"""Clocks of the benchmarks."""

import time
from collections.abc import Callable
from statistics import median

import torch


def now(device: torch.device) -> float:
    """Seconds, when all is done that the device was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clock(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds; the median of warm runs."""
    seconds = []
    for _ in range(repeats + 2):
        started = now(device)
        work()
        seconds.append(now(device) - started)
    return median(seconds[2:])


def alternate(sides: list[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Each side's seconds, `repeats` times in turn, after one unmeasured turn."""
    turns = [[side() for side in sides] for _ in range(repeats + 1)]
    return [list(seconds) for seconds in zip(*turns[1:], strict=True)]
