"""Run a function on several real ranks: processes of one thread, gloo on the CPU, launched as torchrun would."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distributed.process_group import init_process_group

TIME_LIMIT = 120.0  # seconds, for everything; on a starved machine `import torch` alone was seen to take 84


def run_ranks(fn: Callable[..., Any], world_size: int = 2, *args: Any, limit: float = TIME_LIMIT) -> list[Any]:
    """`fn(ranks, *args)` on each rank; what they returned, by rank. `fn` is a module's top-level function.

    Args:
        limit: seconds for everything.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died without a word, or took too long.
    """
    context = multiprocessing.get_context("spawn")
    # The store lives here, as torchrun's does: no port to guess, and a rank that ends early takes nothing with it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(Path(folder), rank, world_size, store.port, fn, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), limit)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[multiprocessing.Process], folder: Path, limit: float) -> None:
    deadline = time.monotonic() + limit
    running = True
    while running:
        running = any(process.is_alive() for process in processes)
        for rank, process in enumerate(processes):
            if process.exitcode:
                error = folder / f"error_{rank}"
                said = error.read_text() if error.exists() else f"exit code {process.exitcode}"
                raise AssertionError(f"rank {rank}: {said}")
        assert time.monotonic() < deadline, f"ranks still running after {limit:.0f} s"
        time.sleep(0.02)


def _work(folder: Path, rank: int, world_size: int, port: int, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="",
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    try:
        result = fn(init_process_group(TIME_LIMIT), *args)
        (folder / f"result_{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"error_{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # no teardown of the group: it sometimes aborts on gloo, after the work is done
