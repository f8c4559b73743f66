"""What a step costs in operations, traffic and time, from shapes and settings alone.

Operations are those of matrix products. Traffic over the links is taken to hide behind them, so the longer of the two
counts. Speeds that no flag gives are stated here.
"""

from dataclasses import dataclass, replace

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
    node_bytes: float  # from GPUs of the same node
    network_bytes: float  # in collectives over several nodes
    host_bytes: float  # from main memory
    seconds: float
    limit: str  # "compute", "links" or "host"

    @property
    def link_bytes(self) -> float:
        return self.node_bytes + self.network_bytes

    @property
    def link_seconds(self) -> float:
        return self.node_bytes / NODE_LINK + self.network_bytes / min(NODE_LINK, NETWORK)

    @property
    def flops(self) -> float:
        return self.teacher_flops + self.student_flops + self.own_flops


def cost_of(shapes: Shapes, layout: Layout, task: Task, tflops: float) -> Cost:
    """
    Args:
        tflops: the GPU's peak in bf16, of which UTILISATION is reached.
    """
    teacher, student, own = flops_of(shapes, layout, task)
    (in_node, over_nodes), rate = link_bytes(shapes, layout, task), tflops * 1e12 * UTILISATION
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
    cost = Cost(teacher, student, own, in_node, over_nodes, host, computing, "compute")
    if cost.link_seconds > computing:
        return replace(cost, seconds=cost.link_seconds, limit="links")
    return replace(cost, limit="host") if by_teacher > 2 * teacher / rate else cost


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


def link_bytes(shapes: Shapes, layout: Layout, task: Task) -> tuple[float, float]:
    """What a GPU receives from others in a step, in collectives within a node and in those over several: gathered
    weights, and gradients, which are averaged once an update."""
    work, micro, n, nodes = task.work, layout.gradient_accumulation_steps, layout.num_gpus, layout.num_nodes
    own = own_parameters(task.objective, task.settings, trained(shapes, layout), list(shapes.experts))
    sizes = [expert.bytes(layout.teacher_dtype, layout.teacher_storage_dtype) for expert in shapes.experts]
    received = [0.0, 0.0]
    if layout.teacher == "shard":
        passes = work.guided + (2 * work.fake_trained + work.fake if own.adapters else 0)
        received[nodes > 1] += micro * passes * sum(sizes) / len(sizes) * (n - 1) / n
    k = layout.shards
    for count, forwards, updates, whole in (
        (trained(shapes, layout), work.drawn, work.updates, not layout.lora_rank),
        (own.trained / len(sizes), work.fake, work.fake_updates, not own.adapters),
    ):
        gathered = micro * (forwards + 2 * updates) * count * layout.itemsize if whole else 0
        received[k > n // nodes] += (gathered + micro * updates * 4 * count) * (k - 1) / k
        # What is left to average: an all-reduce is a reduce-scatter and an all-gather.
        received[nodes > 1] += 2 * updates * 4 * (count / k) * (1 - k / n)
    return received[0], received[1]


def peak_tflops(gpu_name: str) -> float:
    """Of a GPU by its name, else an H100's."""
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in gpu_name), H100_TFLOPS)
