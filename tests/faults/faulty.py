"""Started by torchrun in the tests beside this file: train_distillation.py, with a fault in one rank.

    FAULT="WHAT WHERE RANK [COUNT]"

WHAT happens on that rank at the COUNT-th call, or the first, of the function that WHERE stands for. The program itself
knows nothing of this. The file FAULTED appears when it happens; under FAULT_ONCE it then happens never again.
"""

import importlib
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

# Stage → module, class in it or "", function.
PLACES = {
    "group": ("distributed.process_group", "", "_ranks_from_environment"),
    "start": ("distillation.plan", "", "read_prompts"),
    "loading": ("models.teacher", "", "load_transformer"),
    "encoding": ("models.teacher", "", "prompt_clean"),
    "training": ("distillation.objectives.trajectory", "Objective", "loss"),
    "sampling": ("sampling.parallel", "ParallelSampler", "_draw_share"),
    "checkpointing": ("distillation.progress", "Progress", "state_dict"),
    "writing": ("distributed.checkpoint", "", "_write_json"),
}
LARGEST_FILE = 50_000  # bytes; less than a student


def happen(what: str) -> None:
    match what:
        case "raises":
            raise ValueError("a fault put here by the test")
        case "memory":
            import torch

            torch.empty(2**50)  # more than any machine has
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "SIGTERM" | "SIGINT":
            os.kill(os.getpid(), signal.Signals[what])
        case "hangs":
            time.sleep(1000)
        case "full":  # a disk that takes little more; the kernel's word for it is another one
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.RLIM_INFINITY))


def with_fault(function: Callable, what: str, count: int) -> Callable:
    calls = 0

    def faulty(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not (os.environ["FAULT_ONCE"] and FAULTED.exists()):
            FAULTED.touch()
            happen(what)
        return function(*args, **kwargs)

    return faulty


what, where, rank, *count = os.environ["FAULT"].split()
FAULTED = Path(os.environ["FAULTED"])
if os.environ["RANK"] == rank:
    if what == "flag":  # this rank was started with another one
        FAULTED.touch()
        sys.argv.append(where)
    elif what == "version":
        FAULTED.touch()
        importlib.import_module(where).__version__ = "0.1"
    else:
        module, inside, name = PLACES[where]
        holder = importlib.import_module(module)
        holder = getattr(holder, inside) if inside else holder
        setattr(holder, name, with_fault(getattr(holder, name), what, int(*count or ["1"])))
sys.argv[0] = str(ROOT / "train_distillation.py")
runpy.run_path(sys.argv[0], run_name="__main__")
