"""What a run holds on each GPU: component by component, at every stage, from shapes and settings alone.

Weights, gradients, optimizer and average are counted; activations follow from the architecture (models/sizes.py);
what stands only for a moment is "temporary". A stage's sum is what a GPU must have then, the largest is the peak.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from typing import NamedTuple

import torch
from transformers import UMT5Config

from config.config import Config, Phase
from config.errors import UserError
from data.prompt_embeddings import PROMPTS_A_CALL
from distillation.objective import Own, Work, own_parameters, work
from distillation.trained import PRECISION
from models.quantised import stored_bytes
from models.sizes import TextSize, WanSize, folded_length, text_size, vae_bytes, wan_size
from models.student import StudentSpec
from models.teacher import TeacherInfo
from sampling.parallel import DEFAULT_BATCH_SIZE, share

CUDA_BYTES = 1.0e9  # context, libraries and NCCL, a process
SPARE = 0.03  # of a GPU, which the allocator loses in gaps
STORAGE_DTYPES = {"auto": None, "float8_e4m3fn": torch.float8_e4m3fn}  # of --teacher_storage_dtype
MOMENTS = 8.0  # bytes of AdamW's two, a parameter
MOMENTS_IN_8_BITS = 2.03  # with a scale for each 256 of them


@dataclass(frozen=True)
class Layout:
    """How a run is laid out: all that memory and speed depend on besides shapes and objectives.

    teacher: "replicate", "shard", "offload" (the expert in use on the GPU), "group_offload" (block by block) or "cpu".
    student_sharding: "ddp", "fsdp" (over all GPUs) or "hybrid" (over a node's).
    lora_rank: of a student that is adapters on the teacher's expert; 0 for one of its own.
    sample_batch: pictures that a rank decodes at a time, 0 where none are drawn.
    """

    num_gpus: int = 1
    num_nodes: int = 1
    teacher: str = "replicate"
    teacher_dtype: torch.dtype = torch.bfloat16
    teacher_storage_dtype: torch.dtype | None = None
    student_sharding: str = "ddp"
    lora_rank: int = 0
    use_8bit_adam: bool = False
    use_ema: bool = False
    mixed_precision: torch.dtype | None = None
    gradient_checkpointing: bool = False
    fakes_checkpointed: bool = False
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    sample_batch: int = 0
    sample_teacher: bool = False
    guided: bool = True

    @property
    def shards(self) -> int:
        """GPUs that a trained network is spread over."""
        return {"ddp": 1, "fsdp": self.num_gpus, "hybrid": self.num_gpus // self.num_nodes}[self.student_sharding]

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the student's matrix products."""
        weights = self.teacher_dtype if self.lora_rank else torch.float32
        return (self.mixed_precision or weights).itemsize

    @property
    def gradients_stay(self) -> bool:
        """Whether gradients have memory of their own between backwards: DDP's buckets, and what is accumulated."""
        in_buckets = self.student_sharding == "ddp" and self.num_gpus > 1
        return in_buckets or self.gradient_accumulation_steps > 1


def layout_of(config: Config, num_gpus: int, num_nodes: int, dtype: torch.dtype, guided: bool, drawn: int) -> Layout:
    """The layout that the settings ask for, but for the teacher's place. The one place where they meet.

    Args:
        dtype: of the teacher's weights.
        drawn: sample prompts of a round.
    """
    settings = config.optimization
    return Layout(
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        teacher="cpu",  # until it is placed, for which all else must be known
        teacher_dtype=dtype,
        teacher_storage_dtype=STORAGE_DTYPES[config.teacher.teacher_storage_dtype],
        student_sharding=settings.student_sharding,
        lora_rank=config.student.lora_rank,
        use_8bit_adam=settings.use_8bit_adam,
        use_ema=settings.use_ema,
        mixed_precision=PRECISION[settings.mixed_precision],
        gradient_checkpointing=settings.gradient_checkpointing,
        fakes_checkpointed=settings.gradient_checkpointing,
        train_batch_size=settings.train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        sample_batch=min(len(share(drawn, 0, num_gpus)), config.sampling.sample_batch_size or DEFAULT_BATCH_SIZE),
        sample_teacher=config.sampling.sample_teacher,
        guided=guided,
    )


# ---------------------------------------------------------------------------------------------- shapes


class Task(NamedTuple):
    """A phase in numbers."""

    objective: str
    settings: dict
    steps: int
    work: Work


@dataclass(frozen=True)
class Shapes:
    """What is computed, whatever it is laid out on.

    latent_shape: (C, 1, H, W). text_tokens: of a prompt, padding left out.
    vae: bytes of its weights, and of what decoding a picture holds besides.
    """

    experts: tuple[WanSize, ...]
    student: WanSize
    latent_shape: tuple[int, ...]
    text_tokens: int
    tasks: tuple[Task, ...]
    vae: tuple[int, int]
    text_encoder: TextSize

    @property
    def tokens(self) -> int:
        return self.student.tokens(self.latent_shape)

    @property
    def text(self) -> int:
        """Columns of the text that transformers read."""
        return folded_length(self.text_tokens)


def shapes_of(
    info: TeacherInfo, spec: StudentSpec, phases: Iterable[Phase], student_steps: int, text_tokens: int
) -> Shapes:
    """From config files alone. Raises UserError where the text encoder's is missing."""
    folder = info.folder / "text_encoder"
    if not (folder / "config.json").is_file():
        raise UserError(f"--teacher_path {info.name}: text_encoder/config.json not found; a Wan pipeline has one")
    latent_shape = info.latent_shape(spec.height, spec.width)
    return Shapes(
        experts=tuple(expert_size(info, part) for part in info.transformer_configs),
        student=wan_size(spec.transformer_config, info.expand_timesteps),
        latent_shape=latent_shape,
        text_tokens=text_tokens,
        tasks=tuple(
            Task(p.objective, p.settings, p.steps, work(p.objective, p.settings, student_steps)) for p in phases
        ),
        vae=vae_bytes(info.vae_config, latent_shape),
        text_encoder=text_size(UMT5Config.from_json_file(folder / "config.json")),
    )


def expert_size(info: TeacherInfo, part: str) -> WanSize:
    """One of the teacher's transformers. What a quantiser has packed takes what its files do; where they are not there
    yet, 8 bits a weight are assumed."""
    size = wan_size(info.transformer_configs[part], info.expand_timesteps)
    if part not in info.quantised:
        return size
    assumed = size.bytes(torch.bfloat16, torch.float8_e4m3fn)
    return replace(size, packed=stored_bytes(info.folder / part) or assumed)


# ---------------------------------------------------------------------------------------------- rows and stages


@dataclass(frozen=True)
class Row:
    """A component's bytes on one GPU."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    ema: float = 0.0
    activations: float = 0.0
    temporary: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self))


Stage = dict[str, Row]  # component → its bytes


def total(stage: Stage) -> float:
    return sum(row.total for row in stage.values())


@dataclass(frozen=True)
class Memory:
    """Every stage of a run, in its order, on one GPU."""

    stages: dict[str, Stage] = field(repr=False)

    @property
    def peak_stage(self) -> str:
        return max(self.stages, key=lambda name: total(self.stages[name]))

    @property
    def peak(self) -> float:
        """Bytes."""
        return total(self.stages[self.peak_stage])

    def fits(self, gpu_bytes: float) -> bool:
        return self.peak <= gpu_bytes * (1 - SPARE)

    @property
    def least(self) -> float:
        """Bytes of weights, gradients, optimizer and average alone: exact, while the rest is estimated."""
        return max(sum(sum(astuple(row)[:4]) for row in stage.values()) for stage in self.stages.values())


def memory_of(shapes: Shapes, layout: Layout) -> Memory:
    """All stages. Weights are taken from disk shard by shard: loading holds no more than what stays."""
    cuda = {"CUDA": Row(temporary=CUDA_BYTES)}
    text_temporary = shapes.text_encoder.forward_bytes(PROMPTS_A_CALL, shapes.text_tokens, layout.teacher_dtype)
    encoder = Row(weights=shapes.text_encoder.bytes(layout.teacher_dtype), temporary=text_temporary)
    vae = {"VAE": Row(weights=shapes.vae[0])} if layout.sample_batch else {}
    teacher, student = teacher_row(shapes, layout), student_row(shapes, layout)
    loaded = {"teacher": Row(weights=teacher.weights), "student": replace(student, optimizer=0.0), **vae, **cuda}
    stages = {"encode prompts": {"text encoder": encoder, **cuda}, "load": loaded}
    for number, task in enumerate(shapes.tasks, 1):
        own = own_parameters(task.objective, task.settings, trained(shapes, layout), list(shapes.experts))
        held = {"teacher": Row(weights=teacher.weights), "student": student, **vae, **cuda}
        if own.trained or own.frozen:
            held[f"{task.objective}'s networks"] = own_row(own, layout)
        name = f"{number} {task.objective}: " if len(shapes.tasks) > 1 else ""
        moments = moments_of(shapes, layout, task, own, teacher)
        stages |= {f"{name}{moment}": added(held, rows) for moment, rows in moments.items()}
    return Memory(stages)


def added(held: Stage, more: Stage) -> Stage:
    """A stage's rows on top of what is held all the time."""
    rows = {name: (held.get(name, Row()), more.get(name, Row())) for name in held | more}
    return {name: Row(*map(sum, zip(astuple(a), astuple(b), strict=True))) for name, (a, b) in rows.items()}


def trained(shapes: Shapes, layout: Layout) -> int:
    """The student's trained parameters."""
    return shapes.student.adapters(layout.lora_rank) if layout.lora_rank else shapes.student.parameters


def teacher_row(shapes: Shapes, layout: Layout) -> Row:
    """The experts' weights, and what their forwards gather besides."""
    sizes = [expert.bytes(layout.teacher_dtype, layout.teacher_storage_dtype) for expert in shapes.experts]
    largest = max(shapes.experts, key=lambda expert: expert.parameters)
    gathered = largest.gathered_bytes((layout.teacher_storage_dtype or layout.teacher_dtype).itemsize)
    match layout.teacher:
        case "replicate":
            return Row(weights=sum(sizes))
        case "shard":
            return Row(weights=sum(sizes) / layout.num_gpus, temporary=gathered if layout.num_gpus > 1 else 0)
        case "offload":
            return Row(weights=max(sizes))
        case "group_offload":
            return Row(temporary=gathered)
        case "cpu":
            return Row()
    raise ValueError(f"teacher is {layout.teacher!r}")


def student_row(shapes: Shapes, layout: Layout) -> Row:
    """The student between two steps: float32 weights, or adapters on an expert that the GPU may hold as teacher."""
    count, moments = trained(shapes, layout), MOMENTS_IN_8_BITS if layout.use_8bit_adam else MOMENTS
    on_teacher = layout.teacher in ("replicate", "shard")
    base = shapes.student.bytes(layout.teacher_dtype) if layout.lora_rank and not on_teacher else 0
    return Row(
        weights=4 * count / layout.shards + base + (0 if layout.lora_rank else shapes.student.buffer_bytes),
        gradients=4 * count if layout.gradients_stay and layout.shards == 1 else 0,
        optimizer=moments * count / layout.shards,
        ema=4 * count / layout.shards if layout.use_ema else 0,
    )


def own_row(own: Own, layout: Layout) -> Row:
    moments, spread = MOMENTS_IN_8_BITS if layout.use_8bit_adam else MOMENTS, own_layout(own, layout)
    return Row(
        weights=4 * own.trained / spread.shards + 4 * own.frozen / layout.shards,
        gradients=4 * own.trained if spread.gradients_stay and spread.shards == 1 else 0,
        optimizer=moments * own.trained / spread.shards,
    )


def own_layout(own: Own, layout: Layout) -> Layout:
    """How an objective's trained networks are spread: adapters are whole everywhere, copies of sharded experts are
    sharded as those, and all else as the student is."""
    if own.adapters:
        return replace(layout, student_sharding="ddp")
    return replace(layout, student_sharding="fsdp") if layout.teacher == "shard" else layout


def moments_of(shapes: Shapes, layout: Layout, task: Task, own: Own, teacher: Row) -> dict[str, Stage]:
    """What comes and goes in a phase, moment by moment."""
    tokens, text, batch, sample = shapes.tokens, shapes.text, layout.train_batch_size, layout.sample_batch
    expert, student = shapes.experts[-1], shapes.student
    copies = autocast_copies(student, trained(shapes, layout), layout)
    drawing = student.forward_bytes(tokens, text, layout.itemsize)
    guided = (1 + layout.guided) * expert.forward_bytes(tokens, text, layout.teacher_dtype.itemsize)
    adapters = bool(layout.lora_rank)
    moments = {}
    if sample:
        by_student = {"student": Row(temporary=sample * drawing + copies)}
        decoding = {"VAE": Row(temporary=sample * shapes.vae[1])}  # beside the next batch's drawing
        moments["sample"] = by_student | decoding
        if layout.sample_teacher and 2 * guided > drawing:
            by_teacher = {"teacher": Row(temporary=sample * guided + teacher.temporary)}
            moments["sample"] = decoding | max(by_student, by_teacher, key=total)
    if task.work.guided:
        moments["teacher's rollout"] = {"teacher": Row(temporary=batch * guided + teacher.temporary)}
    at_once = batch * task.work.at_once
    kept = at_once * student.saved_bytes(tokens, text, layout.itemsize, layout.gradient_checkpointing, adapters)
    block = at_once * student.backward_bytes(tokens, text, layout.itemsize, adapters)
    moments |= backward(
        "student", student, trained(shapes, layout), kept, block, copies, layout, layout.gradient_checkpointing
    )
    if own.trained:
        kept = batch * expert.saved_bytes(tokens, text, layout.itemsize, layout.fakes_checkpointed, own.adapters)
        block = batch * expert.backward_bytes(tokens, text, layout.itemsize, own.adapters)
        one = own.trained / len(shapes.experts)  # an update is of one expert's
        spread = own_layout(own, layout)
        copies = autocast_copies(expert, one, spread, frozen_base=own.adapters)
        if own.adapters:
            copies += teacher.temporary
        name = f"{task.objective}'s networks"
        moments |= backward(name, expert, one, kept, block, copies, spread, layout.fakes_checkpointed)
    return moments


def backward(
    name: str,
    size: WanSize,
    count: float,
    kept: float,
    block: float,
    copies: float,
    layout: Layout,
    checkpointing: bool,
) -> dict[str, Stage]:
    """A network's backward where it begins, with everything kept, and where it ends, with almost all gradients.

    Args:
        count: of parameters that get gradients.
        kept: bytes that the forward has left. block: of one block's backward. copies: of weights, for the forward.
    """
    gradients = 0 if layout.gradients_stay and layout.shards == 1 else 4 * count / layout.shards
    stay = gradients if layout.gradients_stay else 0  # of the micro-batch before
    # The last block's gradients come as what it was computed from goes.
    still_to_come = 0 if stay else gradients * size.block_parameters / size.parameters
    begins = Row(gradients=stay, activations=kept, temporary=max(copies, block) if checkpointing else copies)
    at_end = max(0, block - still_to_come) + (copies if layout.shards > 1 else 0)
    return {
        f"{name}, backward begins": {name: begins},
        f"{name}, backward ends": {name: Row(gradients=gradients, temporary=at_end)},
    }


def autocast_copies(size: WanSize, count: float, layout: Layout, frozen_base: bool = False) -> float:
    """Weights in the precision of matrix products, for the time of a forward: all of them under autocast, which keeps
    its copies until the forward ends; where the network is sharded, what is gathered, and in the backward a block's
    gradients before they are spread."""
    if layout.shards > 1:
        return size.gathered_bytes(layout.itemsize) + size.block_parameters * (layout.itemsize + 4)
    if layout.mixed_precision is None:
        return 0.0
    return layout.itemsize * (count if layout.lora_rank or frozen_base else size.multiplied)
