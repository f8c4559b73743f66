"""What follows from the flags and the config files, before any weight is loaded."""

import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from config.config import Config, Phase
from config.errors import UserError
from data.prompts import holds_half_character, read_prompts
from distillation.memory import Layout, Memory, Shapes, layout_of, memory_of, shapes_of
from distillation.objective import check_objective, trains_experts
from distillation.trained import PRECISION
from distributed.placement import Placement, choose_placement
from distributed.process_group import Ranks
from models.attention import check_attention_backend
from models.compiling import check_compiler
from models.flow import TimeGrid, few_step_grid
from models.folding import MAX_SEQUENCE_LENGTH
from models.quantised import check_quantiser
from models.student import StudentSpec, read_student_config
from models.teacher import QUANTISED, TeacherInfo, check_weights, default_guidance, inspect_teacher, resolve_dtype
from sampling.parallel import share

ASSUMED_TOKENS = 128  # of a text, where no prompts are given


@dataclass(frozen=True)
class Plan:
    """The run as decided. Steps count optimizer steps; epochs count from 1."""

    info: TeacherInfo
    spec: StudentSpec
    prompts: list[str]
    sample_prompts: list[str]
    grid: TimeGrid
    shift: float
    dtype: torch.dtype  # of the teacher's weights
    phases: tuple[Phase, ...]
    steps_per_epoch: int
    total_steps: int
    binding_limit: str
    sample_interval: int
    guidance: tuple[float, float]  # of the high-noise expert and the low-noise one
    shapes: Shapes
    layout: Layout
    memory: Memory
    placement: Placement  # of the teacher

    def resolved(self) -> dict:
        """What the settings leave to teacher and machine, as decided: for config.json and the model card."""
        return {
            "guidance_scale": self.guidance[0],
            "guidance_scale_2": self.guidance[1] if self.info.boundary_ratio is not None else None,
            "teacher_dtype": str(self.dtype).removeprefix("torch."),
            "student_shift": self.shift,
            "height": self.spec.height,
            "width": self.spec.width,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "phases": [asdict(phase) for phase in self.phases],
        }

    def read_from_files(self) -> dict[str, object]:
        """What all ranks must have read alike, by what they read it from."""
        return {
            "--teacher_path": self.info.transformer_configs,
            "--student_config": self.spec.transformer_config,
            "--data_path, number and hash of prompts": (len(self.prompts), _hash(self.prompts)),
            "--sample_prompts, number and hash": (len(self.sample_prompts), _hash(self.sample_prompts)),
        }

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.info.latent_shape(self.spec.height, self.spec.width)

    def epoch_of(self, step: int) -> int:
        """The epoch that the step-th step belongs to."""
        return max(1, math.ceil(step / self.steps_per_epoch))

    def is_sampling_step(self, step: int) -> bool:
        """After every `sample_interval`-th epoch, and always at the very end."""
        interval = self.steps_per_epoch * self.sample_interval
        return step % interval == 0 or step == self.total_steps


def _hash(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


def make_plan(config: Config, ranks: Ranks) -> Plan:
    """Read what the flags name and work out the run. Raises UserError for what a user can put right."""
    settings = config.optimization
    info = inspect_teacher(config.teacher.teacher_path, config.teacher.teacher_revision, config.teacher.flow_shift)
    if not config.run.dry_run:
        check_weights(info)
    if config.teacher.guidance_scale_2 is not None and info.boundary_ratio is None:
        raise UserError(f"--guidance_scale_2: {info.name} has one expert; accepted here: --guidance_scale")
    shift = config.student.student_shift or info.flow_shift
    prompts = read_prompts(Path(config.data.data_path)) if config.data.data_path else []
    steps_per_epoch = resolve_epoch(config, len(prompts), ranks)
    limits = {"--num_steps": settings.num_steps, "--num_epochs": (settings.num_epochs or 0) * steps_per_epoch}
    binding_limit, total_steps = min(((k, v) for k, v in limits.items() if v), key=lambda limit: limit[1])
    phases = config.phases
    if len(phases) == 1:
        phases = (replace(phases[0], steps=total_steps),)
    check_sharding(config, ranks)
    check_phases(phases, config)
    spec, dtype = read_spec(config, info), resolve_dtype(config.teacher.teacher_dtype, ranks.device)
    sample_prompts = read_sample_prompts(config)
    guidance = default_guidance(info, config.teacher.guidance_scale, config.teacher.guidance_scale_2)
    shapes = shapes_of(info, spec, phases, config.student.student_steps, text_tokens([*prompts, *sample_prompts]))
    nodes = max(1, ranks.world_size // ranks.local_world_size)
    layout = layout_of(config, ranks.world_size, nodes, dtype, max(guidance) > 1, len(sample_prompts))
    placement = place_teacher(config, shapes, layout, ranks)
    layout = replace(layout, teacher=placement.strategy)
    if config.student.lora_rank:
        check_lora(spec, info, config, placement.strategy)
    check_experts(phases, config, placement.strategy, info)
    check_quantised(info, config, placement.strategy, dtype)
    memory = memory_of(shapes, layout)
    if not config.run.dry_run:
        check_machine(config, placement.strategy, memory, info, ranks.device, dtype)
    return Plan(
        info=info,
        spec=spec,
        prompts=prompts,
        sample_prompts=sample_prompts,
        grid=few_step_grid(config.student.student_steps, shift),
        shift=shift,
        dtype=dtype,
        phases=phases,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        binding_limit=binding_limit,
        sample_interval=config.sampling.sample_interval,
        guidance=guidance,
        shapes=shapes,
        layout=layout,
        memory=memory,
        placement=placement,
    )


def check_phases(phases: tuple[Phase, ...], config: Config) -> None:
    """Raises UserError, which names the phase, for settings that contradict each other or the rest."""
    for where, phase in named(phases):
        try:
            check_objective(phase.objective, phase.settings, config.student.student_steps, phase.steps)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def check_experts(phases: tuple[Phase, ...], config: Config, strategy: str, info: TeacherInfo) -> None:
    """Raises UserError, which names the phase, where an objective trains on experts that are not where it needs them.

    Args:
        strategy: where the teacher is to be.
    """
    for where, phase in named(phases):
        if trains_experts(phase.objective):
            check_trained_experts(where, strategy, config.teacher.teacher_storage_dtype, info)
        if strategy == "shard" and config.student.lora_rank and phase.settings.get("fake_score") == "full":
            raise UserError(
                f"{where}: fake_score full copies experts, and with --lora_rank and --teacher_device_strategy shard "
                'they hold the student; accepted: fake_score = "lora"'
            )


def named(phases: tuple[Phase, ...]) -> Iterator[tuple[str, Phase]]:
    """Each phase with what errors call it."""
    for number, phase in enumerate(phases, 1):
        yield f"[[phase]] {number}, {phase.objective}" if len(phases) > 1 else f"--objective {phase.objective}", phase


def check_machine(
    config: Config, strategy: str, memory: Memory, info: TeacherInfo, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises UserError for what this machine cannot do."""
    settings = config.optimization
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16: a CPU cannot train in fp16; accepted here: no, bf16")
    if settings.use_8bit_adam:
        check_8bit_adam(device)
    if settings.compile:
        check_compiler(device)
    check_attention(config, strategy, device, dtype)
    check_memory(memory, info, device)


def check_attention(config: Config, strategy: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where --attention_backend does not work for the teacher, wherever it runs, or the student."""
    settings = config.optimization
    trained_in = PRECISION[settings.mixed_precision] or (dtype if config.student.lora_rank else torch.float32)
    for where, used in {(device, trained_in), (torch.device("cpu") if strategy == "cpu" else device, dtype)}:
        check_attention_backend(settings.attention_backend, where, used)


def check_8bit_adam(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"--use_8bit_adam: needs an NVIDIA GPU, and this run is on {device.type}; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes, or leave it out")


def check_lora(spec: StudentSpec, info: TeacherInfo, config: Config, strategy: str) -> None:
    """Raises UserError where a student that is to be a LoRA on the teacher is smaller than the teacher, or the teacher
    is where none can be trained on it."""
    teacher = info.transformer_configs[spec.init_from]
    for key, value in spec.transformer_config.items():
        if value != teacher.get(key, value):
            raise UserError(
                f"--student_config {config.student.student_config}: {key} is {value}, the teacher's is {teacher[key]}; "
                f"with --lora_rank the student is the teacher itself: leave {key} out, or train without --lora_rank"
            )
    check_trained_experts("--lora_rank", strategy, config.teacher.teacher_storage_dtype, info)
    if strategy == "shard" and config.student.merge_lora:
        raise UserError(
            "--merge_lora: not with --teacher_device_strategy shard, where no rank has the whole teacher to merge it "
            "into; leave it out, and fuse the LoRA that is exported (fuse_lora)"
        )


def check_trained_experts(where: str, strategy: str, storage_dtype: str, info: TeacherInfo) -> None:
    """Raises UserError where the experts, on which something trains, are off the device or in numbers of storage."""
    if strategy in ("cpu", "group_offload"):
        raise UserError(
            f"{where}: trains on the teacher's experts, which --teacher_device_strategy {strategy} keeps off the GPU; "
            "accepted: replicate, shard, offload, or auto where one of these fits"
        )
    if storage_dtype != "auto":
        raise UserError(
            f"{where}: trains on the teacher's experts, which --teacher_storage_dtype {storage_dtype} rounds after "
            "each use; accepted: auto"
        )
    if info.quantised:
        raise UserError(
            f"{where}: trains on the teacher's experts, and those of --teacher_path {info.name} are quantised; "
            "accepted: a teacher in bfloat16 or float32, or an objective that only asks it, with a student of its own"
        )


def check_quantised(info: TeacherInfo, config: Config, strategy: str, dtype: torch.dtype) -> None:
    """Raises UserError where a quantised teacher is to be where its weights cannot go, or cannot be read here."""
    text_encoder = json.loads((info.folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    if text_encoder.get(QUANTISED):
        raise UserError(
            f"--teacher_path {info.name}: text_encoder is quantised; accepted is one in ordinary numbers, also beside "
            "quantised transformers: it leaves memory before training"
        )
    if not info.quantised:
        return
    if strategy != "replicate":
        raise UserError(
            f"--teacher_device_strategy {strategy}: moves weights, and those of --teacher_path {info.name} are "
            "quantised; accepted: replicate, where it fits"
        )
    if config.teacher.teacher_storage_dtype != "auto":
        raise UserError(
            f"--teacher_storage_dtype {config.teacher.teacher_storage_dtype}: --teacher_path {info.name} is quantised "
            "already; accepted: auto"
        )
    for part, settings in info.quantised.items() if not config.run.dry_run else ():
        check_quantiser(settings, f"--teacher_path {info.name}: {part}", dtype)


def check_sharding(config: Config, ranks: Ranks) -> None:
    """Raises UserError for what cannot be spread over these ranks as the flags say."""
    sharding = config.optimization.student_sharding
    if sharding == "hybrid" and ranks.world_size % ranks.local_world_size:
        raise UserError(
            f"--student_sharding hybrid: {ranks.world_size} ranks are no multiple of this node's "
            f"{ranks.local_world_size}; start equally many on each node, or take fsdp"
        )
    if sharding != "ddp" and config.student.lora_rank:
        raise UserError(
            f"--student_sharding {sharding}: a LoRA is small, and each rank holds it whole; accepted with --lora_rank: "
            "ddp (--teacher_device_strategy shard spreads what it stands on)"
        )
    if config.teacher.device_strategy == "shard" and config.teacher.teacher_storage_dtype != "auto":
        raise UserError(
            f"--teacher_storage_dtype {config.teacher.teacher_storage_dtype}: not with --teacher_device_strategy "
            f"{config.teacher.teacher_device_strategy}, whose slices are kept in what they compute in; accepted: auto"
        )


def place_teacher(config: Config, shapes: Shapes, layout: Layout, ranks: Ranks) -> Placement:
    """Where the teacher is to be: as asked for, or where there is room for it beside all else that stays."""
    rest = memory_of(shapes, layout).least  # which has no teacher yet
    sizes = [expert.bytes(layout.teacher_dtype, layout.teacher_storage_dtype) for expert in shapes.experts]
    return choose_placement(config.teacher.device_strategy, ranks, gpu_memory(config, ranks.device), sizes, rest)


def gpu_memory(config: Config, device: torch.device) -> float | None:
    """Bytes: in a dry run as --gpu_memory says, else what is there; None without a GPU."""
    if config.run.dry_run and config.run.gpu_memory:
        return config.run.gpu_memory * 1e9
    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None


def resolve_epoch(config: Config, prompts: int, ranks: Ranks) -> int:
    """Steps of an epoch: as asked for, or one pass over the prompts; without prompts, in a dry run, the whole run."""
    settings = config.optimization
    if settings.steps_per_epoch:
        return settings.steps_per_epoch
    if not prompts and not settings.num_steps:
        raise UserError("--num_epochs: an epoch is one pass over the prompts; give --data_path or --steps_per_epoch")
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * ranks.world_size
    return math.ceil(prompts / batch) or settings.num_steps


def text_tokens(prompts: list[str]) -> int:
    """About how many tokens the longest prompt has: one for three bytes of it, rarely fewer."""
    longest = max((len(prompt.encode()) for prompt in prompts), default=3 * ASSUMED_TOKENS)
    return min(MAX_SEQUENCE_LENGTH, math.ceil(longest / 3))


def check_memory(memory: Memory, info: TeacherInfo, device: torch.device) -> None:
    """Raises UserError where weights, gradients and optimizer alone exceed the GPU."""
    if device.type != "cuda":
        return
    there = torch.cuda.get_device_properties(device).total_memory
    if memory.least > there:
        raise UserError(
            f"--teacher_path {info.name}: weights, gradients and optimizer alone need {memory.least / 1e9:.0f} GB on "
            f"each GPU, and this one has {there / 1e9:.0f} GB; the same command with --dry_run says which settings fit"
        )


def read_spec(config: Config, info: TeacherInfo) -> StudentSpec:
    """The student's shape; 480 × 832 where neither its config nor a flag gives a size."""
    path = Path(config.student.student_config) if config.student.student_config else None
    return read_student_config(
        path,
        info.transformer_configs,
        info.pixels_per_patch,
        default_size=(480, 832),
        height=config.student.height,
        width=config.student.width,
    )


def read_sample_prompts(config: Config) -> list[str]:
    """The prompts to draw; none where a training is to save no pictures."""
    if not (config.sampling.save_samples or config.sampling.sample_only):
        return []
    if config.sampling.sample_prompts_file:
        return read_prompts(Path(config.sampling.sample_prompts_file))
    for prompt in config.sampling.sample_prompts:
        if holds_half_character(prompt):
            raise UserError(f"--sample_prompts {prompt!r}: not UTF-8; accepted is UTF-8 text")
    return list(config.sampling.sample_prompts)


def describe(plan: Plan, config: Config, ranks: Ranks) -> str:
    """What will run on what, and what ends it."""
    settings, info = config.optimization, plan.info
    experts = " and ".join(
        f"{c['num_layers']} layers × {c['num_attention_heads'] * c['attention_head_dim']}"
        for c in info.transformer_configs.values()
    )
    student = plan.spec.transformer_config
    w = "/".join(f"{scale:g}" for scale in plan.guidance[: len(info.transformer_configs)])
    width = student["num_attention_heads"] * student["attention_head_dim"]
    rank = config.student.lora_rank
    lora = f"LoRA of rank {rank} on the teacher's {plan.spec.init_from}, " if rank else ""
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * ranks.world_size
    phases = ", then ".join(f"{p.objective} × {p.steps} steps at lr {p.learning_rate:g}" for p in plan.phases)
    shares = [len(share(len(plan.sample_prompts), r, ranks.world_size)) for r in range(ranks.world_size)]
    levels = ", ".join(f"{sigma:.3g}" for sigma in plan.grid.sigmas[:-1])
    dtype = str(plan.dtype).removeprefix("torch.")
    dtype += f" kept in {config.teacher.teacher_storage_dtype}" if plan.layout.teacher_storage_dtype else ""
    methods = dict.fromkeys(quantisation.get("quant_method", "") for quantisation in info.quantised.values())
    dtype += f", quantised by {' and '.join(methods)}" if methods else ""
    lines = {
        "teacher": f"{info.name} ({experts}, {dtype}, guidance {w})",
        "student": f"{lora}{student['num_layers']} layers × {width}, {plan.spec.height}×{plan.spec.width} pixels, "
        f"{len(plan.grid)} steps at t = {levels}",
        "spread": f"teacher {plan.placement}, "
        f"student {settings.student_sharding if ranks.world_size > 1 else 'whole (one rank)'}",
        "runs on": f"{ranks.world_size} × {ranks.device.type}, mixed precision {settings.mixed_precision}",
        "prompts": f"{len(plan.prompts)} from {config.data.data_path}" if plan.prompts else "none given",
        "batch": f"{batch} prompts a step = {settings.train_batch_size} a rank × {ranks.world_size} ranks × "
        f"{settings.gradient_accumulation_steps} accumulated",
        "memory": f"{plan.memory.peak / 1e9:.3g} GB a rank at the most ({plan.memory.peak_stage}), of which "
        f"{plan.memory.least / 1e9:.3g} GB are weights, gradients and optimizer",
        "trains": phases,
        "ends": f"after {plan.total_steps} steps ({plan.binding_limit} binds), "
        f"{plan.epoch_of(plan.total_steps)} epochs of {plan.steps_per_epoch} steps",
        "samples": f"{len(plan.sample_prompts)} prompts every {plan.sample_interval} epoch(s), a rank draws "
        f"{', '.join(map(str, shares[:8]))}{', …' if len(shares) > 8 else ''}"
        if plan.sample_prompts
        else "none (no --sample_prompts, or --no_save_samples)",
        "output": config.run.output_dir,
    }
    return "\n".join(f"  {name:<8} {value}" for name, value in lines.items())
