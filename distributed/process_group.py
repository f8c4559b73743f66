"""Where this process stands among all of them, and what they tell each other. A plain `python` is one rank, no group.

Start: `check_launch`, then `init_process_group`, then everything else: data, samplers and models made earlier would not
be sharded. End: `destroy` after success, `fail` of distributed/failure.py otherwise.

Objects and flags travel over gloo on the CPU, so they neither touch GPU memory nor wait for GPU work in flight.
"""

import os
import shlex
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from config.errors import UserError

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # all set by torchrun
STORE_SECONDS = 10.0  # in which torchrun must answer
FLIGHT_RECORDER_ENTRIES = "2000"  # collectives remembered a rank

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """Another rank could not do what all were to do. Its words are the message."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among all, and the device that it computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    launched_by_torchrun: bool
    timeout_seconds: float = 3600.0  # that a collective waits for the slowest rank

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def check_launch(distributed: bool) -> None:
    """Raise UserError where several processes are asked for, but nothing tells this one which of them it is.

    Args:
        distributed: whether --distributed was passed.
    """
    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    # WORLD_SIZE without the rest, as a hand-made SLURM script may leave it: every process would train all by itself.
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not missing or not (distributed or world_size != "1"):
        return
    asked = "--distributed" if distributed else f"WORLD_SIZE={world_size}"
    line = f"torchrun --nproc_per_node={torch.cuda.device_count() or 2} {shlex.join(sys.argv)}"
    raise UserError(f"{asked} needs torchrun, which sets {', '.join(missing)} (not set); run: {line}")


def init_process_group(timeout_seconds: float) -> Ranks:
    """Choose this process's device and, under torchrun, join the others (also where it is the only one).

    Args:
        timeout_seconds: how long a collective waits for the slowest rank before the run is given up.

    Raises:
        UserError: more processes on this machine than GPUs, or two on one.
        ConnectionError: torchrun has ended.
    """
    ranks = _ranks_from_environment(timeout_seconds)
    use_cuda = ranks.device.type == "cuda"
    if use_cuda:
        torch.cuda.set_device(ranks.device)  # before the group: else every rank opens a context on GPU 0
    if not ranks.launched_by_torchrun:
        return ranks
    _check_torchrun_is_there()
    timeout = timedelta(seconds=timeout_seconds)
    if use_cuda:
        _turn_on_flight_recorder()
        # With `device_id` NCCL connects now, where a failure is easy to read, and barriers know their device.
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl", **_meet(timeout), device_id=ranks.device)
        except RuntimeError as error:
            if "Duplicate GPU" not in str(error):
                raise
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            raise UserError(
                f"rank {ranks.rank} is on {ranks.device} with CUDA_VISIBLE_DEVICES={visible}, where another rank is; "
                "accepted is a GPU for each: leave it to torchrun --nproc_per_node, and let all ranks see all GPUs"
            ) from error
    else:
        dist.init_process_group("gloo", **_meet(timeout))
    # All ranks: nobody starts to load gigabytes before every rank is known to be there.
    dist.barrier()
    _begin_store()
    return ranks


def _ranks_from_environment(timeout_seconds: float) -> Ranks:
    launched = all(name in os.environ for name in LAUNCH_VARIABLES)
    rank, world_size, local_rank = (
        int(os.environ[name]) if launched else alone
        for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    # torchrun sets LOCAL_WORLD_SIZE too; a hand-made launcher often does not.
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if launched else 1
    device = _device(local_rank, world_size)
    return Ranks(rank, world_size, local_rank, local_world_size, device, launched, timeout_seconds)


def _device(local_rank: int, world_size: int) -> torch.device:
    if not torch.cuda.is_available():
        # No backend of torch.distributed reduces on mps.
        return torch.device("mps" if world_size == 1 and torch.backends.mps.is_available() else "cpu")
    found = torch.cuda.device_count()
    if local_rank >= found:  # two ranks on one GPU: NCCL refuses that, minutes later and in other words
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine shows {found} GPU(s), one for each process; "
            f"pass --nproc_per_node={found} to torchrun (or set CUDA_VISIBLE_DEVICES= to run on CPUs)"
        )
    return torch.device("cuda", local_rank)


def _meet(timeout: timedelta) -> dict[str, Any]:
    """Where the ranks find each other, as `dist.init_process_group` takes it.

    torchrun keeps one store through --max-restarts, where ranks would find the addresses of those of the start before.
    On one node its restarts are numbered; on several each node counts its own.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}


def _check_torchrun_is_there() -> None:
    """Raises ConnectionError where torchrun has ended meanwhile: joining the others would wait for it for an hour."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 keeps the store, and may yet come
        return
    address, deadline = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + STORE_SECONDS
    while True:
        try:
            socket.create_connection(address, timeout=STORE_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                where = ":".join(map(str, address))
                raise ConnectionError(f"torchrun does not answer at {where} any more ({error})") from None
        time.sleep(0.5)


def _begin_store() -> None:
    """torchrun keeps one store through all its restarts: what an earlier start has left there is not this one's."""
    global _store
    name = broadcast_object(uuid.uuid4().hex)
    _store = None if is_alone() else dist.PrefixStore(name, dist.distributed_c10d._get_default_store())


def _turn_on_flight_recorder() -> None:
    """Let a timeout leave evidence: each rank's last collectives, written to TORCH_FR_DUMP_TEMP_FILE."""
    # The older name wins where a user set it; setting both makes PyTorch warn.
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDER_ENTRIES)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def is_alone() -> bool:
    """Whether there is no process group."""
    return not (dist.is_available() and dist.is_initialized())


def barrier() -> None:
    """Wait until every rank is here. Collective."""
    if not is_alone():
        dist.barrier()


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's picklable `obj`, by rank, on all ranks. Collective."""
    if is_alone():
        return [obj]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Rank `src`'s picklable `obj`, on all ranks; what the others pass is ignored. Collective."""
    if is_alone():
        return obj
    box = [obj if dist.get_rank() == src else None]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def together(work: Callable[..., T], *args: Any) -> T:
    """This rank's `work(*args)`; when it raises on one rank, all raise. Collective; `work` itself must not be.

    Raises:
        What `work` raised, on the rank where it did; on the others a PeerFailed with that rank's words, or a
        UserError where that is what it was.
    """
    result, error = None, None
    try:
        result = work(*args)
    except Exception as caught:  # kept until every rank has been told
        error = caught
    users_mistake = isinstance(error, UserError)
    said = None if error is None else str(error) if users_mistake else f"{type(error).__name__}: {error}"
    told = gather_objects((said, users_mistake))
    if error is not None:
        raise error
    failures = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in enumerate(told) if text is not None)
    if failures:
        raise (UserError if any(mistake for _, mistake in told) else PeerFailed)(failures)
    return result


def check_alike(facts: dict[str, Any]) -> None:
    """Raises UserError, on all ranks, where one of the facts is not on every rank what it is on rank 0. Collective."""
    first, *others = gather_objects(facts)
    for rank, own in enumerate(others, 1):
        for name in {**first, **own}:
            if first.get(name) != own.get(name):
                raise UserError(
                    f"{name} is {own.get(name)!r} on rank {rank}, but {first.get(name)!r} on rank 0; accepted are the "
                    "same flags and versions on all ranks"
                )


def on_main(ranks: Ranks, work: Callable[[], Any]) -> None:
    """Rank 0's `work()`, while the others wait to hear whether it succeeded. Collective; `work` itself must not be."""
    together(lambda: work() if ranks.is_main else None)


def say(ranks: Ranks, text: str) -> None:
    """On rank 0's screen."""
    if ranks.is_main:
        print(text, flush=True)


_counts_alone: Counter[str] = Counter()
_store: dist.Store | None = None


def tally(name: str, count: int = 0) -> int:
    """Add to a count that all ranks share, and return it. Not a collective: nobody waits for anybody.

    Raises dist.DistError where the store is gone; one that hangs is waited for.
    """
    if is_alone():
        _counts_alone[name] += count
        return _counts_alone[name]
    return store().add(name, count)


def store() -> dist.Store:
    """What all ranks can write to and read, without a collective. With torchrun it lives in torchrun itself."""
    return _store


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of every rank's tensor, on all ranks, in place. Collective on the tensor's own device."""
    if not is_alone():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def destroy() -> None:
    """Leave the group after success. Never after a failure: peers inside a collective would be waited for."""
    if not is_alone():
        dist.barrier()  # all ranks: nobody closes connections that a slower one still uses
        dist.destroy_process_group()
