"""docs/scaling.md: what a step costs on 8, 64 and 512 GPUs, on paper, by the program's own plan.

python benchmarks/scaling.py --write        # without --write it is printed
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file: this folder, where this file would hide other packages, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.arguments import print_or_write
from benchmarks.memory import at_half_depth, baseline, shapes_of_teacher, task_of
from benchmarks.shapes import COMMON, TEACHERS
from distillation.cost import H100_TFLOPS, NETWORK, NODE_LINK, UTILISATION, cost_of
from distillation.memory import Layout, Shapes, Task, memory_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
NODES = (1, 8, 64)  # of 8 GPUs
PUBLISHED_PROMPTS = 64  # a step: Phased DMD, 2510.27684
LAYOUTS = {
    "teacher whole, student DDP": {"teacher": "replicate"},
    "teacher sharded, student FSDP": {"teacher": "shard", "student_sharding": "fsdp"},
    "teacher sharded, student hybrid": {"teacher": "shard", "student_sharding": "hybrid"},
}
INTRO = f"""# What a step costs on many GPUs, on paper

Made by `python benchmarks/scaling.py --write` from the figures that `--dry_run` computes with. **Nothing here was
measured.** Wan2.2-T2V-A14B, a student of half its depth, 480×832, one prompt a GPU, bf16, checkpointed blocks.
Assumed: {UTILISATION:.0%} of {H100_TFLOPS:g} TFLOP/s; {NODE_LINK / 1e9:.0f} GB/s to each GPU within a node of 8,
{NETWORK / 1e9:.0f} GB/s to each node from the others. Computing and links overlap, so the longer one is the step;
latencies are left out.

| GPUs | layout | objective | TFLOP a GPU | computing, s | GB received a GPU | links, s | limit | GB held |
|---|---|---|---|---|---|---|---|---|
"""


def outro(shapes: Shapes) -> str:
    whole, prompts = replace(baseline(8, 1), **LAYOUTS["teacher whole, student DDP"]), 8 * NODES[-1]
    expert = shapes.experts[0].bytes(whole.teacher_dtype) / 1e9
    held = memory_of(replace(shapes, tasks=(task_of("velocity", 1),)), whole).peak / 1e9
    return f"""
- A guided forward of a sharded teacher gathers an expert once, {expert:.1f} GB, for all prompts of a batch and both
  branches. Where links bind, a larger `--train_batch_size` is the cure; a replicated teacher moves nothing.
- Under DDP gradients move once an update, whatever the batch and `--gradient_accumulation_steps`; under FSDP weights
  are gathered and gradients spread for every micro-batch.
- {held:.0f} GB fit no GPU of today: with the teacher whole and DDP, the student must be smaller or a LoRA. The rows
  stand for what they move.
- Prompts a step grow with the GPUs: {prompts} at one prompt each are {prompts / PUBLISHED_PROMPTS:g} times the
  published {PUBLISHED_PROMPTS}. Beyond that, more GPUs make larger batches, not fewer steps.
"""


def row(shapes: Shapes, name: str, nodes: int, task: Task, layout: Layout) -> str:
    cost = cost_of(shapes, layout, task, H100_TFLOPS)
    computing = cost.flops / (H100_TFLOPS * 1e12 * UTILISATION)
    cells = [
        f"{8 * nodes}", name, task.objective, f"{cost.flops / 1e12:.0f}", f"{computing:.2f}",
        f"{cost.link_bytes / 1e9:.0f}", f"{cost.link_seconds:.2f}", cost.limit,
        f"{memory_of(shapes, layout).peak / 1e9:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page() -> str:
    with tempfile.TemporaryDirectory() as folder:
        shapes = at_half_depth(shapes_of_teacher(Path(folder), "a14b"), TEACHERS["a14b"][0] | COMMON)
    rows = []
    for nodes in NODES:
        for name, change in LAYOUTS.items():
            if nodes == 1 and change.get("student_sharding") == "hybrid":  # is FSDP
                continue
            layout = replace(baseline(8 * nodes, nodes), **change)
            for objective in ("velocity", "trajectory", "dmd"):
                task = task_of(objective, 1)
                rows.append(row(replace(shapes, tasks=(task,)), name, nodes, task, layout))
    return INTRO + "\n".join(rows) + "\n" + outro(shapes)


def main(argv: list[str]) -> None:
    print_or_write(page, PAGE, __doc__, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
