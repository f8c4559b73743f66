"""Which settings would fit a GPU, the fastest first."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from distillation.cost import cost_of
from distillation.memory import Layout, Memory, Shapes, Task, memory_of
from distillation.objective import trains_experts

LORA_RANK = 64


class Change(NamedTuple):
    """Flags, and what they make of a layout. `trains_otherwise`: whether the student comes out another one."""

    flags: str = ""
    layout: dict = {}
    fake_score: str | None = None
    trains_otherwise: bool = False


@dataclass(frozen=True)
class Fit:
    """A set of flags that fits."""

    flags: tuple[str, ...]
    layout: Layout
    memory: Memory
    seconds: float  # of the whole run
    trains_otherwise: int  # changes that make another student


def fitting(shapes: Shapes, layout: Layout, gpu_bytes: float, tflops: float, number: int = 3) -> list[Fit]:
    """The first few sets of flags with which the run would fit, none of which holds another's flags and more: those
    that leave the training as it is first, then by the run's time, then by their number."""
    found = []
    for changes in itertools.product(*choices(shapes, layout)):
        tried, changed = shapes, layout
        for change in changes:
            changed = replace(changed, **change.layout)
            if change.fake_score:
                tried = with_fake_score(tried, change.fake_score)
        if not is_possible(tried, changed):
            continue
        memory = memory_of(tried, changed)
        if memory.fits(gpu_bytes):
            flags = tuple(change.flags for change in changes if change.flags)
            otherwise = sum(change.trains_otherwise for change in changes)
            found.append(Fit(flags, changed, memory, run_seconds(tried, changed, tflops), otherwise))
    found.sort(key=lambda fit: (fit.trains_otherwise, round(fit.seconds, -1), len(fit.flags)))
    chosen: list[Fit] = []
    for fit in found:
        if len(chosen) < number and not any(set(earlier.flags) <= set(fit.flags) for earlier in chosen):
            chosen.append(fit)
    return chosen


def run_seconds(shapes: Shapes, layout: Layout, tflops: float) -> float:
    """All phases' steps."""
    return sum(task.steps * cost_of(shapes, layout, task, tflops).seconds for task in shapes.tasks)


def choices(shapes: Shapes, layout: Layout) -> Iterator[tuple[Change, ...]]:
    """For each thing that can be changed: leaving it, and the ways to change it."""
    several, stay = layout.num_gpus > 1, Change()
    strategies = ["replicate", *(["shard"] if several else []), *(["offload"] if len(shapes.experts) > 1 else [])]
    strategies += ["group_offload", "cpu"]
    yield (stay, *(Change(f"--teacher_device_strategy {s}", {"teacher": s}) for s in strategies if s != layout.teacher))
    if not layout.teacher_storage_dtype:
        fp8 = {"teacher_storage_dtype": torch.float8_e4m3fn}
        yield stay, Change("--teacher_storage_dtype float8_e4m3fn", fp8)
    if layout.student_sharding == "ddp" and several:
        kinds = ["fsdp", *(["hybrid"] if layout.num_nodes > 1 else [])]
        yield (stay, *(Change(f"--student_sharding {kind}", {"student_sharding": kind}) for kind in kinds))
    if not layout.use_8bit_adam:
        yield stay, Change("--use_8bit_adam", {"use_8bit_adam": True})
    if not layout.gradient_checkpointing:
        yield stay, Change("--gradient_checkpointing", {"gradient_checkpointing": True})
    if layout.mixed_precision is None:
        yield stay, Change("--mixed_precision bf16", {"mixed_precision": torch.bfloat16})
    if layout.sample_batch > 1:
        yield stay, Change("--sample_batch_size 1", {"sample_batch": 1})
    if (batch := layout.train_batch_size) > 1:
        steps = batch * layout.gradient_accumulation_steps
        smaller = {"train_batch_size": 1, "gradient_accumulation_steps": steps}
        yield stay, Change(f"--train_batch_size 1 --gradient_accumulation_steps {steps}", smaller)
    if any(task.settings.get("fake_score") == "full" for task in shapes.tasks):
        yield stay, Change("--fake_score lora", fake_score="lora", trains_otherwise=True)
    if not layout.lora_rank and shapes.student.parameters == shapes.experts[-1].parameters:
        yield stay, Change(f"--lora_rank {LORA_RANK}", {"lora_rank": LORA_RANK}, trains_otherwise=True)


def with_fake_score(shapes: Shapes, kind: str) -> Shapes:
    def changed(task: Task) -> Task:
        return task._replace(settings=task.settings | {"fake_score": kind}) if "fake_score" in task.settings else task

    return replace(shapes, tasks=tuple(map(changed, shapes.tasks)))


def is_possible(shapes: Shapes, layout: Layout) -> bool:
    """Whether the program takes that: experts that are trained on stay on the GPU and as they are, fp8 is not sharded,
    and a LoRA is whole on each rank."""
    on_experts = bool(layout.lora_rank) or any(trains_experts(task.objective) for task in shapes.tasks)
    if on_experts and (layout.teacher in ("cpu", "group_offload") or layout.teacher_storage_dtype):
        return False
    if layout.lora_rank and layout.student_sharding != "ddp":
        return False
    return not (layout.teacher == "shard" and layout.teacher_storage_dtype)
