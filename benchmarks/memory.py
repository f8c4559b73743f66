"""docs/memory.md: what fits on which GPUs, as the program's own plan has it.

    python benchmarks/memory.py --write        # without --write it is printed

Shapes alone: nothing is downloaded or loaded.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file: this folder, where this file would hide other packages, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.arguments import print_or_write
from benchmarks.shapes import COMMON, write_shapes
from benchmarks.shapes import TEACHERS as SHAPES
from distillation.cost import UTILISATION
from distillation.fit import LORA_RANK, fitting
from distillation.memory import Layout, Shapes, Task, shapes_of
from distillation.objective import settings_of, work
from models.sizes import wan_size
from models.student import read_student_config
from models.teacher import inspect_teacher

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
MACHINES = {  # GPUs, nodes, GB and bf16 TFLOP/s of each
    "1 × 24 GB": (1, 1, 24, 165),
    "1 × 48 GB": (1, 1, 48, 362),
    "1 × 80 GB": (1, 1, 80, 989),
    "1 × 141 GB": (1, 1, 141, 989),
    "8 × 80 GB": (8, 1, 80, 989),
    "4 × 8 × 80 GB": (32, 4, 80, 989),
}
TEACHERS = {  # title, pixels
    "a14b": ("Wan2.2-T2V-A14B, 480×832", (480, 832)),
    "ti2v_5b": ("Wan2.2-TI2V-5B, 704×1280", (704, 1280)),
    "wan21_1.3b": ("Wan2.1-T2V-1.3B, 480×832", (480, 832)),
}
STEPS, TEXT_TOKENS = 1000, 120
INTRO = f"""# What fits where

Made by `python benchmarks/memory.py --write` from shapes alone; `--dry_run` says the same of any command line. GB are
10⁹ bytes.

Each cell: the flags that a machine needs besides `--mixed_precision bf16 --gradient_checkpointing --use_ema
--train_batch_size 1`, with two sample pictures at a time; then the largest sum of a run of `trajectory` and `dmd` (with
adapters as fake scores) and what it leaves of each GPU; then hours for {STEPS} steps of `trajectory`, at
{UTILISATION:.0%} of the GPU's peak in bf16 (165 TFLOP/s at 24 GB, 362 at 48 GB, else 989). The fastest flags that fit
are shown; where nothing fits with `dmd`, those that fit without it.

A student of full or half depth is trained whole; the LoRA (`--lora_rank {LORA_RANK}`) is trained on the teacher itself.
"""
OUTRO = """
## How it is counted

- Weights, gradients, AdamW's moments and the average are exact: 4, 4, 8 and 4 bytes a trained parameter.
- Activations: every tensor that a backward needs, summed by the architecture. With `--gradient_checkpointing` each
  block's input and the inside of one block. Against what autograd saves on a CPU: within 10 % (`tests/test_memory.py`).
- The VAE decodes in float32 and keeps a copy of each convolution's input: found by decoding on the meta device.
- The text encoder is there alone, before everything else, and freed.
- 1 GB a process for CUDA and NCCL, and 3 % of a GPU for gaps between tensors, are assumptions. So are a network's
  speed and a GPU's utilisation. None of this has been compared with a GPU's own figures yet.
"""


def baseline(gpus: int, nodes: int) -> Layout:
    return Layout(
        num_gpus=gpus,
        num_nodes=nodes,
        mixed_precision=torch.bfloat16,
        gradient_checkpointing=True,
        use_ema=True,
        sample_batch=2,
    )


def shapes_of_teacher(folder: Path, name: str) -> Shapes:
    """With a student of full depth."""
    info = inspect_teacher(str(write_shapes(folder, name)))
    spec = read_student_config(None, info.transformer_configs, info.pixels_per_patch, TEACHERS[name][1])
    tasks = tuple(task_of(objective, steps) for objective, steps in (("trajectory", STEPS), ("dmd", 0)))
    return replace(shapes_of(info, spec, [], 4, TEXT_TOKENS), tasks=tasks)


def at_half_depth(full: Shapes, transformer: dict) -> Shapes:
    config = transformer | {"num_layers": transformer["num_layers"] // 2}
    return replace(full, student=wan_size(config, full.student.expand_timesteps))


def task_of(objective: str, steps: int) -> Task:
    settings = vars(settings_of(objective)())
    return Task(objective, settings, steps, work(objective, settings, 4))


def cell(what: Shapes, layout: Layout, gigabytes: float, tflops: float) -> str:
    """The fastest flags that train the student as asked; without dmd where nothing fits with it."""
    for tried, prefix in ((what, ""), (replace(what, tasks=what.tasks[:1]), "without `dmd`: ")):
        fits = [fit for fit in fitting(tried, layout, gigabytes * 1e9, tflops) if not fit.trains_otherwise]
        if fits:
            flags = " ".join(f"`{flag}`" for flag in fits[0].flags) or "as it is"
            peak = fits[0].memory.peak / 1e9
            left, hours = gigabytes - peak, fits[0].seconds / 3600
            return f"{prefix}{flags}: {peak:.1f} GB, {left:.1f} left; {hours:.2g} h"
    return "does not fit"


def table(folder: Path, name: str) -> list[str]:
    full = shapes_of_teacher(folder, name)
    half = at_half_depth(full, SHAPES[name][0] | COMMON)
    lines = [
        f"\n## {TEACHERS[name][0]}\n",
        f"| GPUs | student of full depth, {full.student.layers} layers | half, {half.student.layers} layers | LoRA |",
        "|---|---|---|---|",
    ]
    for machine, (gpus, nodes, gigabytes, tflops) in MACHINES.items():
        whole, lora = baseline(gpus, nodes), replace(baseline(gpus, nodes), lora_rank=LORA_RANK)
        columns = ((full, whole), (half, whole), (full, lora))
        cells = [cell(what, layout, gigabytes, tflops) for what, layout in columns]
        lines.append(f"| {machine} | {' | '.join(cells)} |")
    return lines


def page() -> str:
    with tempfile.TemporaryDirectory() as folder:
        tables = [line for name in TEACHERS for line in table(Path(folder), name)]
    return INTRO + "\n".join([*tables, ""]) + OUTRO


def main(argv: list[str]) -> None:
    print_or_write(page, PAGE, __doc__, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
