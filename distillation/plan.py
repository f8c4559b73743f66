"""What follows from the flags and the config files, before any weight is loaded."""

import hashlib
import importlib.util
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from config.config import Config, Phase
from config.errors import UserError
from data.prompts import holds_half_character, read_prompts
from distillation.objective import check_objective, extra_bytes, trains_experts
from distributed.placement import Placement, choose_placement, resident_bytes
from distributed.process_group import Ranks
from models.adapters import Adapted
from models.compiling import check_compiler
from models.flow import TimeGrid, few_step_grid
from models.student import StudentSpec, read_student_config
from models.teacher import TeacherInfo, check_weights, default_guidance, inspect_teacher, resolve_dtype
from sampling.parallel import share

STORAGE_DTYPES = {"auto": None, "float8_e4m3fn": torch.float8_e4m3fn}  # of --teacher_storage_dtype


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
    memory: dict[str, float]  # part → GB that each rank's device must hold
    placement: Placement  # of the teacher
    storage_dtype: torch.dtype | None = None  # of the teacher's weights while they wait, where it is another one

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
    if settings.mixed_precision == "fp16" and ranks.device.type == "cpu":
        raise UserError("--mixed_precision fp16: a CPU cannot train in fp16; accepted here: no, bf16")
    if settings.use_8bit_adam:
        check_8bit_adam(ranks.device)
    if settings.compile:
        check_compiler(ranks.device)
    info = inspect_teacher(config.teacher.teacher_path, config.teacher.teacher_revision, config.teacher.flow_shift)
    check_weights(info)
    if config.teacher.guidance_scale_2 is not None and info.boundary_ratio is None:
        raise UserError(f"--guidance_scale_2: {info.name} has one expert; accepted here: --guidance_scale")
    shift = config.student.student_shift or info.flow_shift
    prompts = read_prompts(Path(config.data.data_path))
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * ranks.world_size
    steps_per_epoch = settings.steps_per_epoch or math.ceil(len(prompts) / batch)
    limits = {"--num_steps": settings.num_steps, "--num_epochs": (settings.num_epochs or 0) * steps_per_epoch}
    binding_limit, total_steps = min(((k, v) for k, v in limits.items() if v), key=lambda limit: limit[1])
    phases = config.phases
    if len(phases) == 1:
        phases = (replace(phases[0], steps=total_steps),)
    check_sharding(config, ranks)
    spec, dtype = read_spec(config, info), resolve_dtype(config.teacher.teacher_dtype, ranks.device)
    storage_dtype = STORAGE_DTYPES[config.teacher.teacher_storage_dtype]
    memory, placement = memory_needed(config, info, spec, storage_dtype or dtype, ranks, gpu_memory(ranks.device))
    if config.student.lora_rank:
        check_lora(spec, info, config, placement.strategy)
    check_phases(phases, config, placement.strategy)
    check_memory(memory, info, ranks.device)
    return Plan(
        info=info,
        spec=spec,
        prompts=prompts,
        sample_prompts=read_sample_prompts(config),
        grid=few_step_grid(config.student.student_steps, shift),
        shift=shift,
        dtype=dtype,
        phases=phases,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        binding_limit=binding_limit,
        sample_interval=config.sampling.sample_interval,
        guidance=default_guidance(info, config.teacher.guidance_scale, config.teacher.guidance_scale_2),
        memory=memory,
        placement=placement,
        storage_dtype=storage_dtype,
    )


def check_phases(phases: tuple[Phase, ...], config: Config, strategy: str) -> None:
    """Raises UserError, which names the phase, for settings that contradict each other or the rest.

    Args:
        strategy: where the teacher is to be.
    """
    for number, phase in enumerate(phases, 1):
        where = f"[[phase]] {number}, {phase.objective}" if len(phases) > 1 else f"--objective {phase.objective}"
        try:
            check_objective(phase.objective, phase.settings, config.student.student_steps, phase.steps)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if trains_experts(phase.objective):
            check_trained_experts(where, strategy, config.teacher.teacher_storage_dtype)


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
    check_trained_experts("--lora_rank", strategy, config.teacher.teacher_storage_dtype)
    if strategy == "shard" and config.student.merge_lora:
        raise UserError(
            "--merge_lora: not with --teacher_device_strategy shard, where no rank has the whole teacher to merge it "
            "into; leave it out, and fuse the LoRA that is exported (fuse_lora)"
        )


def check_trained_experts(where: str, strategy: str, storage_dtype: str) -> None:
    """Raises UserError where the experts, on which something trains, are off the device or in a dtype of storage."""
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


def memory_needed(
    config: Config, info: TeacherInfo, spec: StudentSpec, dtype: torch.dtype, ranks: Ranks, device_bytes: int | None
) -> tuple[dict[str, float], Placement]:
    """GB (10⁹ bytes) that each rank's device must hold, by part, and where the teacher is to be.

    Without activations and text: a lower bound.

    Args:
        dtype: of the teacher's weights as they are kept.
        device_bytes: a GPU's memory, None without one.
    """
    with torch.device("meta"):
        student = WanTransformer3DModel.from_config(spec.transformer_config)
        if config.student.lora_rank:
            student = Adapted(student, "student", config.student.lora_rank)  # what it stands on is counted as teacher
        experts = [WanTransformer3DModel.from_config(c) for c in info.transformer_configs.values()]

    def billions(*networks: WanTransformer3DModel) -> float:
        return sum(p.numel() for network in networks for p in network.parameters()) / 1e9

    # Float32 weights, gradients, and AdamW's two moments, in 8 bits on demand; the average is one more copy.
    trained_bytes = 10 if config.optimization.use_8bit_adam else 16
    by_sharding = {"ddp": 1, "fsdp": ranks.world_size, "hybrid": ranks.local_world_size}
    slices = by_sharding[config.optimization.student_sharding]
    name = "student's LoRA and AdamW" if config.student.lora_rank else "student and AdamW"
    needed = {name: billions(student) * (trained_bytes + (4 if config.optimization.use_ema else 0)) / slices}

    def own_bytes(phase: Phase) -> float:
        """What its objective adds, spread as the student is; copies of experts that are sharded, as those."""
        as_experts = trains_experts(phase.objective) and config.teacher.device_strategy == "shard"
        added = extra_bytes(phase.objective, phase.settings, student, experts, trained_bytes)
        return added / (ranks.world_size if as_experts else slices)

    # Phases come one after the other.
    largest, objective = max((own_bytes(phase), phase.objective) for phase in config.phases)
    own = {f"{objective}'s own networks": largest / 1e9} if largest else {}
    sizes = [billions(expert) * dtype.itemsize for expert in experts]
    rest = sum((needed | own).values())
    placement = choose_placement(
        config.teacher.device_strategy, ranks, device_bytes, [s * 1e9 for s in sizes], rest * 1e9
    )
    blocks = min(c["num_layers"] for c in info.transformer_configs.values())
    if teacher := resident_bytes(placement.strategy, ranks.world_size, sizes, blocks):
        needed["teacher"] = teacher
    return needed | own, placement


def gpu_memory(device: torch.device) -> int | None:
    """Bytes, or None where the device is no GPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def check_memory(needed: dict[str, float], info: TeacherInfo, device: torch.device) -> None:
    """Raises UserError where weights and optimizer alone exceed the GPU."""
    there = (gpu_memory(device) or math.inf) / 1e9
    if sum(needed.values()) > there:
        parts = " and ".join(f"{name} {size:.0f} GB" for name, size in needed.items())
        raise UserError(
            f"--teacher_path {info.name}: each rank needs {parts}, besides activations, and this GPU has "
            f"{there:.0f} GB; spread them over several (--teacher_device_strategy shard, --student_sharding fsdp), "
            'lower num_layers in --student_config, or take a smaller teacher (with dmd: fake_score = "lora")'
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
    dtype += f" kept in {config.teacher.teacher_storage_dtype}" if plan.storage_dtype else ""
    lines = {
        "teacher": f"{info.name} ({experts}, {dtype}, guidance {w})",
        "student": f"{lora}{student['num_layers']} layers × {width}, {plan.spec.height}×{plan.spec.width} pixels, "
        f"{len(plan.grid)} steps at t = {levels}",
        "spread": f"teacher {plan.placement}, "
        f"student {settings.student_sharding if ranks.world_size > 1 else 'whole (one rank)'}",
        "runs on": f"{ranks.world_size} × {ranks.device.type}, mixed precision {settings.mixed_precision}",
        "prompts": f"{len(plan.prompts)} from {config.data.data_path}",
        "batch": f"{batch} prompts a step = {settings.train_batch_size} a rank × {ranks.world_size} ranks × "
        f"{settings.gradient_accumulation_steps} accumulated",
        "memory": " + ".join(f"{name} {size:.3g} GB" for name, size in plan.memory.items())
        + " a rank, besides activations",
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
