"""--dry_run: what the run takes on each GPU, whether it fits, what would fit, and what it costs. Nothing is loaded."""

import math
import os
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors import safe_open

from config.config import Config
from distillation.cost import UTILISATION, Cost, cost_of, peak_tflops
from distillation.fit import Fit, fitting
from distillation.memory import SPARE, Memory, Row, Shapes, total
from distillation.plan import Plan, describe, gpu_memory, make_plan
from distributed.process_group import Ranks
from models.quantised import stored_bytes
from models.teacher import TeacherInfo

COLUMNS = ("weights", "gradients", "optimizer", "EMA", "activations", "temporary", "total")


def dry_run(config: Config) -> int:
    """Print everything, on rank 0. Returns the exit code: 1 where the run does not fit, else 0."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    ranks = planned_ranks(config)
    plan = make_plan(config, ranks)
    gpu_bytes, tflops = gpu(config)
    print(
        f"dry run: nothing is loaded\n{describe(plan, config, ranks)}\n  on disk  {on_disk(plan.info, plan.shapes)}\n"
    )
    print(memory_table(plan.memory, ranks.world_size))
    print(f"GB at each stage\n{stage_lines(plan.memory)}\n")
    print(cost_table(plan, tflops, ranks.world_size))
    if gpu_bytes is None:
        print("no GPU is here to compare with: --gpu_memory GB gives a verdict")
        return 0
    if plan.memory.fits(gpu_bytes):
        left = gpu_bytes - plan.memory.peak
        print(f"fits: {plan.memory.peak / 1e9:.1f} of {gpu_bytes / 1e9:.3g} GB, {left / 1e9:.1f} GB are left")
        return 0
    print(f"does NOT fit: {plan.memory.peak / 1e9:.1f} GB of {gpu_bytes / 1e9:.3g} GB, {SPARE:.0%} of which are spare")
    print(suggestions(fitting(plan.shapes, plan.layout, gpu_bytes, tflops), gpu_bytes))
    return 1


def planned_ranks(config: Config) -> Ranks:
    """The ranks of the planned run, on GPUs: --num_gpus, or as many as torchrun or --multi_gpu start."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.run.multi_gpu:
        started = max(started, torch.cuda.device_count())
    count = config.run.num_gpus or started
    return Ranks(
        0, count, 0, max(1, count // config.run.num_nodes), torch.device("cuda", 0), launched_by_torchrun=False
    )


def gpu(config: Config) -> tuple[float | None, float]:
    """(bytes, peak TFLOP/s) of a GPU: as the flags say, else of the one that is here; no bytes where there is none."""
    here = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return gpu_memory(config, torch.device("cuda", 0)), config.run.gpu_tflops or peak_tflops(here)


def on_disk(info: TeacherInfo, shapes: Shapes) -> str:
    """What the safetensors files' headers say of the teacher's weights, as far as they are here."""
    experts = dict(zip(info.transformer_configs, shapes.experts, strict=True))
    expected = {part: None if part in info.quantised else size.parameters for part, size in experts.items()}
    expected["text_encoder"] = shapes.text_encoder.parameters
    return ", ".join(f"{part} {stored(info.folder / part, count)}" for part, count in expected.items())


def stored(folder: Path, expected: int | None) -> str:
    """ "28.6 GB", "not there yet", or how much of `expected` parameters is there, where their number is known."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return "not there yet"
    count = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    missing = f" ({count:,} of {expected:,} parameters)" if expected not in (None, count) else ""
    return f"{stored_bytes(folder) / 1e9:.3g} GB{missing}"


# ---------------------------------------------------------------------------------------------- tables


def memory_table(memory: Memory, num_gpus: int) -> str:
    """Components × columns at the peak."""
    stage = memory.stages[memory.peak_stage]
    summed = Row(*map(sum, zip(*map(astuple, stage.values()), strict=True)))
    table = [("", *COLUMNS)]
    for name, row in [*stage.items(), ("sum", summed)]:
        table.append((name, *(f"{size / 1e9:.2f}" if size else "-" for size in (*astuple(row), row.total))))
    head = f"memory on each of {num_gpus} GPU(s) in GB (10⁹ bytes), where it is largest: {memory.peak_stage}"
    return "\n".join([head, *aligned(table)])


def stage_lines(memory: Memory) -> str:
    """Each stage's sum, a line for each phase."""
    lines: dict[str, list[str]] = {}
    for name, stage in memory.stages.items():
        phase, _, moment = name.rpartition(": ")
        lines.setdefault(phase, []).append(f"{moment} {total(stage) / 1e9:.1f}")
    return "\n".join(f"  {phase or 'run'}: {' | '.join(moments)}" for phase, moments in lines.items())


def cost_table(plan: Plan, tflops: float, num_gpus: int) -> str:
    """Phases × what a step takes, and the run's sum."""
    table, seconds = [("phase", "steps", "TFLOP a step and GPU", "GB over links", "s a step", "limit", "hours")], 0.0
    for task in plan.shapes.tasks:
        cost = cost_of(plan.shapes, plan.layout, task, tflops)
        seconds += task.steps * cost.seconds
        table.append((task.objective, f"{task.steps}", *cost_cells(cost), f"{task.steps * cost.seconds / 3600:.3g}"))
    hours = seconds / 3600
    return "\n".join(
        [
            f"cost at {UTILISATION:.0%} of {tflops:g} TFLOP/s (assumed; measured speed replaces it: --gpu_tflops)",
            *aligned(table),
            f"in all {hours:.3g} hours × {num_gpus} GPU(s) = {hours * num_gpus:.3g} GPU hours, "
            "besides encoding and samples",
        ]
    )


def cost_cells(cost: Cost) -> tuple[str, ...]:
    return f"{cost.flops / 1e12:.3g}", f"{cost.link_bytes / 1e9:.3g}", f"{cost.seconds:.3g}", cost.limit


def suggestions(fits: list[Fit], gpu_bytes: float) -> str:
    if not fits:
        return "no settings that are known here would; take fewer layers in --student_config, or a smaller teacher"
    lines = ["would fit, the fastest first:"]
    for fit in fits:
        otherwise = "; another student" if fit.trains_otherwise else ""
        lines.append(
            f"  {' '.join(fit.flags)}\n    {fit.memory.peak / 1e9:.1f} of {gpu_bytes / 1e9:.3g} GB, "
            f"{fit.seconds / 3600:.3g} hours{otherwise}"
        )
    return "\n".join(lines)


def aligned(table: list[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return lines
