"""What follows from the flags and the config files, before any weight is loaded."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from config.config import Config, Phase
from config.errors import UserError
from data.prompts import holds_half_character, read_prompts
from distillation.memory import Layout, Memory, Shapes, layout_of, memory_of, shapes_of
from distillation.objective import check_objective, trains_experts
from distributed.process_group import Ranks
from models.flow import TimeGrid, few_step_grid
from models.folding import MAX_SEQUENCE_LENGTH
from models.student import StudentSpec, read_student_config
from models.teacher import TeacherInfo, check_weights, default_guidance, inspect_teacher, resolve_dtype
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


def make_plan(config: Config, ranks: Ranks) -> Plan:
    """Read what the flags name and work out the run. Raises UserError for what a user can put right."""
    settings = config.optimization
    if settings.mixed_precision == "fp16" and ranks.device.type == "cpu":
        raise UserError("--mixed_precision fp16: a CPU cannot train in fp16; accepted here: no, bf16")
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
    check_phases(phases, config)
    spec, dtype = read_spec(config, info), resolve_dtype(config.teacher.teacher_dtype, ranks.device)
    sample_prompts = read_sample_prompts(config)
    guidance = default_guidance(info, config.teacher.guidance_scale, config.teacher.guidance_scale_2)
    shapes = shapes_of(info, spec, phases, config.student.student_steps, text_tokens([*prompts, *sample_prompts]))
    nodes = max(1, ranks.world_size // ranks.local_world_size)
    layout = layout_of(config, ranks.world_size, nodes, dtype, max(guidance) > 1, len(sample_prompts))
    memory = memory_of(shapes, layout)
    if not config.run.dry_run:
        check_memory(memory, info, ranks.device)
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
    )


def check_phases(phases: tuple[Phase, ...], config: Config) -> None:
    """Raises UserError, which names the phase, for settings that contradict each other or the rest."""
    for number, phase in enumerate(phases, 1):
        where = f"[[phase]] {number}, {phase.objective}" if len(phases) > 1 else f"--objective {phase.objective}"
        try:
            check_objective(phase.objective, phase.settings, config.student.student_steps, phase.steps)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if trains_experts(phase.objective) and config.teacher.teacher_device_strategy == "cpu":
            raise UserError(
                f"{where}: trains on the teacher's experts, which --teacher_device_strategy cpu keeps off "
                "the GPU; accepted: auto, replicate"
            )


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
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * ranks.world_size
    phases = ", then ".join(f"{p.objective} × {p.steps} steps at lr {p.learning_rate:g}" for p in plan.phases)
    shares = [len(share(len(plan.sample_prompts), r, ranks.world_size)) for r in range(ranks.world_size)]
    levels = ", ".join(f"{sigma:.3g}" for sigma in plan.grid.sigmas[:-1])
    lines = {
        "teacher": f"{info.name} ({experts}, {str(plan.dtype).removeprefix('torch.')}, guidance {w})",
        "student": f"{student['num_layers']} layers × {width}, {plan.spec.height}×{plan.spec.width} pixels, "
        f"{len(plan.grid)} steps at t = {levels}",
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
