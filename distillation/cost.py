"""What a step costs in operations, traffic and time, from shapes and settings alone.

Operations are those of matrix products. Traffic over the links is taken to hide behind them, so the longer of the two
counts. Speeds that no flag gives are stated here.
"""

from dataclasses import dataclass

from distillation.memory import Layout, Shapes, Task, trained
from distillation.objective import own_parameters

UTILISATION = 0.4  # of the peak, by the transformers' own operations
H100_TFLOPS = 989.0
PEAK_TFLOPS = {  # dense bf16, by what the GPU's name holds
    "B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "5090": 209.0,
    "4090": 165.0, "3090": 71.0, "A6000": 155.0, "A10": 125.0,
}  # fmt: skip
FLOAT32_SHARE = 0.07  # of that peak, without TF32: 67 of an H100's 989
CPU_FLOPS = 1e12
HOST_LINK = 25e9  # bytes a second, PCIe 4 × 16 from pinned memory
NODE_LINK = 300e9  # between a node's GPUs, each
NETWORK = 200e9  # between nodes, each, over all of its adapters (8 × 400 Gb/s, half of it reached)
GPU_MEMORY_SPEED = 3e12


@dataclass(frozen=True)
class Cost:
    """One optimizer step of a phase, on one GPU. Operations and bytes."""

    teacher_flops: float
    student_flops: float
    own_flops: float
    link_bytes: float  # between GPUs
    host_bytes: float  # from main memory
    seconds: float
    limit: str  # "compute", "links" or "host"

    @property
    def flops(self) -> float:
        return self.teacher_flops + self.student_flops + self.own_flops


def cost_of(shapes: Shapes, layout: Layout, task: Task, tflops: float) -> Cost:
    """
    Args:
        tflops: the GPU's peak in bf16, of which UTILISATION is reached.
    """
    teacher, student, own = flops_of(shapes, layout, task)
    links, rate = link_bytes(shapes, layout, task), tflops * 1e12 * UTILISATION
    in_float32 = layout.itemsize == 4
    host, calls = 0.0, task.work.guided * layout.gradient_accumulation_steps
    sizes = [expert.bytes(layout.teacher_dtype, layout.teacher_storage_dtype) for expert in shapes.experts]
    by_teacher = teacher / rate
    if layout.teacher_storage_dtype:  # each forward reads the weights, writes and reads them again in a wider form
        by_teacher += calls * shapes.experts[0].storable * 5 / GPU_MEMORY_SPEED
    if layout.teacher == "cpu":
        by_teacher = teacher / CPU_FLOPS
    elif layout.teacher == "offload" and calls:  # a swap a step
        host = max(sizes)
        by_teacher += host / HOST_LINK
    elif layout.teacher == "group_offload":
        host = calls * max(sizes)
        by_teacher = max(by_teacher, host / HOST_LINK)
    computing = by_teacher + (student + own) / (rate * FLOAT32_SHARE if in_float32 else rate)
    moving = links / link_speed(layout)
    limit = "links" if moving > computing else "host" if by_teacher > 2 * teacher / rate else "compute"
    return Cost(teacher, student, own, links, host, max(computing, moving), limit)


def flops_of(shapes: Shapes, layout: Layout, task: Task) -> tuple[float, float, float]:
    """Operations of teacher, student and the objective's own networks in a step on one GPU. A backward costs two
    forwards, one where the weights are frozen; checkpointing computes a forward twice."""
    work, prompts = task.work, layout.train_batch_size * layout.gradient_accumulation_steps
    expert = sum(e.forward_flops(shapes.tokens, shapes.text) for e in shapes.experts) / len(shapes.experts)
    student = shapes.student.forward_flops(shapes.tokens, shapes.text)
    own = own_parameters(task.objective, task.settings, trained(shapes, layout), list(shapes.experts))
    times = (2 if layout.lora_rank else 3) + layout.gradient_checkpointing
    fake_times = (2 if own.adapters else 3) + layout.fakes_checkpointed
    return (
        prompts * work.guided * (1 + layout.guided) * expert,
        prompts * (work.drawn + work.trained * times) * student,
        prompts * (work.fake + work.fake_trained * fake_times) * expert,
    )


def link_bytes(shapes: Shapes, layout: Layout, task: Task) -> float:
    """What a GPU receives from others in a step: gathered weights, and gradients, which are averaged once an update."""
    work, micro, n = task.work, layout.gradient_accumulation_steps, layout.num_gpus
    if n == 1:
        return 0.0
    own = own_parameters(task.objective, task.settings, trained(shapes, layout), list(shapes.experts))
    one = own.trained / len(shapes.experts)
    expert = sum(e.bytes(layout.teacher_dtype, layout.teacher_storage_dtype) for e in shapes.experts) / len(
        shapes.experts
    )
    received = 0.0
    if layout.teacher == "shard":
        passes = work.guided + (2 * work.fake_trained + work.fake if own.adapters else 0)
        received += micro * passes * expert * (n - 1) / n
    for count, forwards, updates, whole in (
        (trained(shapes, layout), work.drawn, work.updates, not layout.lora_rank),
        (one, work.fake, work.fake_updates, not own.adapters),
    ):
        k = layout.shards
        if k > 1:
            gathered = (micro * (forwards + 2 * updates)) * count * layout.itemsize if whole else 0
            received += (gathered + micro * updates * 4 * count) * (k - 1) / k
        if k < n:  # an all-reduce is a reduce-scatter and an all-gather
            received += 2 * updates * 4 * (count / k) * (1 - k / n)
    return received


def link_speed(layout: Layout) -> float:
    """Bytes a second that a GPU receives: within a node, or what its share of the network allows."""
    return NODE_LINK if layout.num_nodes == 1 else min(NODE_LINK, NETWORK)


def peak_tflops(gpu_name: str) -> float:
    """Of a GPU by its name, else an H100's."""
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in gpu_name), H100_TFLOPS)
