"""Every setting, written down once: flags and recipe files become one validated `Config`.

What wins: a flag, then a recipe's `[[phase]]` table, then the recipe's top level, then the default here.
How a field becomes a flag and a recipe key: config/settings.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import UserError
from config.settings import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SCHEDULE,
    SEED,
    UNIT,
    Given,
    Recipe,
    Setting,
    build_parser,
    parse_flags,
    read_flags,
    read_recipe,
    read_table,
    refuse_unknown_flags,
    refuse_unknown_keys,
    setting,
    settings_in,
)

DEFAULT_OBJECTIVE = "trajectory"
DEFAULT_SCORE_DEADLINE = 300.0  # seconds
DEFAULT_NUM_STEPS = 1000  # where neither steps nor epochs are given
OLD_STRATEGIES = {"balanced": "shard", "gpu0": "replicate"}  # --teacher_device_strategy in older scripts


# ---------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher: a Diffusers Wan text-to-video pipeline."""

    teacher_path: str | None = setting(
        None,
        "a pipeline's folder or hub id; required for training",
        aliases=("pretrained_teacher_model", "pretrained_model_name_or_path"),
    )
    teacher_revision: str | None = setting(None, "branch, tag or commit on the hub", aliases=("revision",))
    teacher_dtype: str = setting(
        "auto", "auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", "float32", "float16", "bfloat16")
    )
    guidance_scale: float | None = setting(
        None, "of the high-noise expert, or the only one (default: 4 with two experts, else 5)", bound=NOT_NEGATIVE
    )
    guidance_scale_2: float | None = setting(
        None, "of the low-noise expert (default: --guidance_scale where that is given, else 3)", bound=NOT_NEGATIVE
    )
    flow_shift: float | None = setting(
        None, "shift of the teacher's timesteps; by default the pipeline's", bound=POSITIVE
    )
    negative_prompt: str = setting("", "what guidance leads away from")
    teacher_device_strategy: str = setting(
        "auto",
        "replicate: whole on each rank's device; shard: spread over all ranks; offload: the expert in use on the GPU, "
        "the other in host memory; group_offload: block by block from host memory; cpu: off the GPU, slowly; auto: "
        "replicate where it fits, else shard on several ranks, and offload or group_offload on one",
        choices=("auto", "replicate", "shard", "offload", "group_offload", "cpu", *OLD_STRATEGIES),
        shorthand=("teacher_on_cpu", "cpu"),
    )
    teacher_storage_dtype: str = setting(
        "auto",
        "auto: as they compute; float8_e4m3fn: half of bfloat16's memory, not with shard, nor with dmd",
        choices=("auto", "float8_e4m3fn"),
    )

    @property
    def device_strategy(self) -> str:
        """`teacher_device_strategy` by its name of today."""
        return OLD_STRATEGIES.get(self.teacher_device_strategy, self.teacher_device_strategy)


@dataclass(frozen=True)
class StudentConfig:
    """The student: a Wan transformer of its own, or a LoRA on the teacher's."""

    student_config: str | None = setting(None, "JSON file; by default a copy of the teacher's low-noise expert")
    student_path: str | None = setting(None, "a finished student's pipeline, for --sample_only")
    lora_rank: int = setting(
        0,
        "train adapters of this rank on the teacher itself; 0: a student of its own",
        aliases=("rank",),
        bound=NOT_NEGATIVE,
    )
    lora_alpha: float | None = setting(
        None, "adapters weigh lora_alpha / lora_rank (default: lora_rank)", bound=POSITIVE
    )
    merge_lora: bool = setting(False, "export the whole student, its adapters merged, instead of a LoRA")
    student_steps: int = setting(4, "steps in which the student draws", bound=SCHEDULE)
    student_shift: float | None = setting(None, "shift of its timesteps; by default the teacher's", bound=POSITIVE)
    height: int | None = setting(None, "pixels, instead of the student config's", bound=AT_LEAST_ONE)
    width: int | None = setting(None, "pixels, instead of the student config's", bound=AT_LEAST_ONE)


@dataclass(frozen=True)
class DataConfig:
    """The prompts: all the data that there is."""

    data_path: str | None = setting(None, "a .txt file, a prompt a line, or .jsonl; required for training")
    prompt_cache_dir: str | None = setting(
        None, "where encoded prompts are kept for later runs (default: prompt_embeddings in output_dir)"
    )
    dataloader_num_workers: int | None = setting(
        None, "accepted for older scripts, without effect", aliases=("num_workers",), bound=NOT_NEGATIVE
    )


@dataclass(frozen=True)
class OptimizationConfig:
    """Optimisation. A phase may have its own objective, length, learning rate, scheduler and warm-up."""

    objective: str | None = setting(
        None, f"a file of distillation/objectives, e.g. velocity, in one phase (default: {DEFAULT_OBJECTIVE})"
    )
    learning_rate: float = setting(1e-5, "peak learning rate", aliases=("lr",), bound=POSITIVE)
    num_steps: int | None = setting(
        None,
        f"optimizer steps (default: {DEFAULT_NUM_STEPS} where --num_epochs is not given)",
        aliases=("max_train_steps",),
        bound=AT_LEAST_ONE,
    )
    num_epochs: int | None = setting(None, "epochs", aliases=("num_train_epochs",), bound=AT_LEAST_ONE)
    steps_per_epoch: int | None = setting(None, "by default one pass over the prompts", bound=AT_LEAST_ONE)
    train_batch_size: int = setting(
        4, "prompts a rank, each several latents to the student", aliases=("batch_size",), bound=AT_LEAST_ONE
    )
    gradient_accumulation_steps: int = setting(1, "forwards an optimizer step", bound=AT_LEAST_ONE)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", bound=POSITIVE)
    lr_scheduler: str = setting(
        "constant_with_warmup",
        "course of the learning rate",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "polynomial"),
    )
    lr_warmup_steps: int = setting(0, "steps until the peak", bound=NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, "AdamW", bound=BELOW_ONE)
    adam_beta2: float = setting(0.999, "AdamW", bound=BELOW_ONE)
    adam_weight_decay: float = setting(0.01, "AdamW", bound=NOT_NEGATIVE)
    adam_epsilon: float = setting(1e-8, "AdamW", bound=POSITIVE)
    use_8bit_adam: bool = setting(False, "AdamW's moments in 8 bits, by bitsandbytes; needs a GPU")
    compile: bool = setting(False, "compile the blocks of student and teacher: faster steps after a slow first one")
    attention_backend: str = setting(
        "auto",
        "of self-attention in student and teacher, by Diffusers' names; auto: PyTorch's choice",
        choices=("auto", "native", "_native_cudnn", "_native_flash", "_native_efficient"),
    )
    mixed_precision: str = setting("no", "alone: bf16", choices=("no", "fp16", "bf16"), bare="bf16")
    student_sharding: str = setting(
        "ddp",
        "ddp: weights, gradients and optimizer whole on each rank; fsdp: spread over all ranks; hybrid: spread over a "
        "node's ranks, alike on all nodes",
        choices=("ddp", "fsdp", "hybrid"),
    )
    max_nonfinite_steps: int = setting(
        20,
        "steps in a row with a gradient that is not finite, each of them skipped, after which the run ends",
        bound=AT_LEAST_ONE,
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    use_ema: bool = setting(False, "keep an average of the student's weights, draw with it and export it")
    ema_decay: float = setting(0.999, "of that average", bound=BELOW_ONE)


@dataclass(frozen=True)
class SamplingConfig:
    """Sample pictures."""

    save_samples: bool | None = setting(None, "draw pictures while training; by default if there are --sample_prompts")
    sample_prompts: tuple[str, ...] = setting(
        (), "prompts, or one .txt or .jsonl file of them", aliases=("validation_prompts",)
    )
    sample_interval: int = setting(1, "epochs between two rounds", aliases=("validation_epochs",), bound=AT_LEAST_ONE)
    sample_dir: str | None = setting(None, "where pictures go (default: samples in output_dir)")
    sample_steps: int | None = setting(None, "steps a picture; by default the student's", bound=SCHEDULE)
    sample_eta: float = setting(0.0, "noise that ddim adds: 0 is deterministic", bound=UNIT)
    sampler: str = setting("ddim", "how a picture is drawn", choices=("ddim", "renoise"))
    sample_batch_size: int | None = setting(
        None, "pictures at a time (default: 16); halved when memory runs out", bound=AT_LEAST_ONE
    )
    sample_teacher: bool = setting(False, "draw the teacher's pictures once, to compare")
    sample_teacher_steps: int = setting(50, "steps of the teacher's pictures", bound=SCHEDULE)
    sample_only: bool = setting(False, "draw from --student_path, train nothing")
    sample_seed: int | None = setting(None, "noise of the pictures (default: seed)", bound=SEED)

    @property
    def sample_prompts_file(self) -> str | None:
        """The file of prompts that `sample_prompts` names, or None where it holds the prompts themselves."""
        single = self.sample_prompts[0] if len(self.sample_prompts) == 1 else ""
        return single if Path(single).suffix in (".txt", ".jsonl") else None


@dataclass(frozen=True)
class ScoringConfig:
    """Scores of sample pictures."""

    score: tuple[str, ...] = setting(
        ("health", "fidelity"),
        "health: contrast, saturation, …, and collapse; fidelity: likeness to the teacher's picture, with "
        "--sample_teacher; clip: picture and text; vlm: a judge behind --judge_base_url",
        choices=("none", "health", "fidelity", "clip", "vlm"),
    )
    max_concurrent_evals: int = setting(32, "scores computed or asked for at the same time, a rank", bound=AT_LEAST_ONE)
    scorer_timeout: float = setting(60.0, "seconds for one score of health, fidelity or clip", bound=POSITIVE)
    score_deadline: float | None = setting(
        None,
        "seconds after drawing when scores that are not there are given up (default: 300, or a quarter of "
        "--ddp_timeout where that is less)",
        bound=POSITIVE,
    )
    clip_model: str = setting("openai/clip-vit-large-patch14", "of clip: a folder or hub id")
    judge_base_url: str | None = setting(
        None, "of vlm: a server that speaks OpenAI's protocol, such as http://localhost:8000/v1"
    )
    judge_model: str | None = setting(None, "of vlm: its name there; the key is OPENAI_API_KEY in the environment")
    judge_timeout: float = setting(120.0, "seconds for one score of vlm, with retries", bound=POSITIVE)


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    config: str | None = setting(None, "a recipe: TOML, its keys are these flags' names; flags win over it")
    output_dir: str = setting("outputs/run", "where everything that the run leaves behind goes")
    overwrite_output_dir: bool = setting(False, "replace another run's results in output_dir")
    review: str | None = setting(None, "make the review page of a samples folder again, and do nothing else")
    seed: int = setting(0, "of weights, training noise and pictures", bound=SEED)
    distributed: bool = setting(False, "fail unless started by torchrun")
    multi_gpu: bool = setting(False, "start one process for each GPU")
    dry_run: bool = setting(
        False, "say what the run takes on each GPU, whether it fits and what it costs; load and train nothing"
    )
    gpu_memory: float | None = setting(
        None, "GB (10⁹ bytes) of a GPU, for --dry_run (default: of the one that is there)", bound=POSITIVE
    )
    gpu_tflops: float | None = setting(
        None, "its peak in bf16, for --dry_run's times (default: by its name, else an H100's 989)", bound=POSITIVE
    )
    num_gpus: int | None = setting(
        None, "GPUs that --dry_run plans for, on all nodes (default: torchrun's processes)", bound=AT_LEAST_ONE
    )
    num_nodes: int = setting(1, "nodes that --dry_run plans for", bound=AT_LEAST_ONE)
    ddp_timeout: float = setting(3600.0, "seconds that a rank waits for the others", bound=POSITIVE)
    checkpointing_steps: int = setting(
        500,
        "steps between two checkpoints; there is always one at the end, and when the run is stopped",
        bound=AT_LEAST_ONE,
    )
    checkpoints_total_limit: int | None = setting(2, "older checkpoints are deleted", bound=AT_LEAST_ONE)
    resume_from_checkpoint: str | None = setting(
        None, "a checkpoint's folder, or latest: go on where it was written (from the start where there is none)"
    )
    logging_steps: int = setting(10, "steps between two rows of metrics.jsonl", bound=AT_LEAST_ONE)
    report_to: tuple[str, ...] = setting(
        (),
        "trackers, besides metrics.jsonl: one, several, all that are installed, or none (default: none)",
        choices=("none", "tensorboard", "wandb", "trackio", "all"),
    )
    tracker_project_name: str = setting("wan-distillation", "project in wandb and trackio", aliases=("tracker_name",))
    run_name: str | None = setting(
        None, "the run's name there (default: the last part of output_dir)", aliases=("tracker_run_name",)
    )


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with one objective. `steps` is None only for a single phase whose length is in epochs."""

    objective: str
    steps: int | None
    learning_rate: float
    lr_scheduler: str
    lr_warmup_steps: int
    settings: dict[str, Any]  # all fields of the objective's `Settings`


@dataclass(frozen=True)
class Config:
    """Everything, as resolved. `phases` says what is trained, one after the other; there is at least one.

    `optimization.num_steps` is the phases' sum, or None where only `optimization.num_epochs` ends the run.
    """

    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    optimization: OptimizationConfig
    sampling: SamplingConfig
    scoring: ScoringConfig
    run: RunConfig
    phases: tuple[Phase, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should be told once."""
        notes = []
        if self.data.dataloader_num_workers is not None:
            notes.append("--dataloader_num_workers is not needed any more: prompts are encoded once and memory-mapped")
        asked = self.teacher.teacher_device_strategy
        if asked in OLD_STRATEGIES:
            means = {
                "balanced": "the experts are spread over all ranks, each block gathered when it is needed",
                "gpu0": "each rank has the whole teacher on its own GPU, not all of them on the first",
            }[asked]
            notes.append(f"--teacher_device_strategy {asked} means {OLD_STRATEGIES[asked]} now: {means}")
        return tuple(notes)

    def by_flag(self) -> dict[str, Any]:
        """Every setting's value, by its flag; the phases as one."""
        sections = [getattr(self, name) for name in SECTIONS]
        return {f"--{name}": value for s in sections for name, value in asdict(s).items()} | {"phases": self.phases}

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts that `json.dump` takes."""
        return asdict(self)


SECTIONS = {f.name: f.type for f in fields(Config) if f.name != "phases"}
RUN_SETTINGS = [s for section in SECTIONS.values() for s in settings_in(section)]
RECIPE_SETTINGS = [s for s in RUN_SETTINGS if s.name != "config"]
_BY_NAME = {s.name: s for s in RUN_SETTINGS}
PHASE_SETTINGS = [
    replace(_BY_NAME["num_steps"], name="steps", aliases=()),
    *(_BY_NAME[name] for name in ("objective", "learning_rate", "lr_scheduler", "lr_warmup_steps")),
]


# ---------------------------------------------------------------------------------------------- flags and recipe


class WrittenPhase(NamedTuple):
    """A phase as the user asked for it. `table` is its own in the recipe, empty where the phase has none."""

    objective: Given
    steps: Given | None = None
    table: dict[str, Any] = {}
    where: str = ""


def load_config(argv: list[str], objective_settings: Callable[[str], type]) -> Config:
    """Flags, and the recipe that they may name, as one validated `Config`. `--help` prints and exits with 0.

    Args:
        argv: the command line without the program's name.
        objective_settings: an objective's name → its frozen `Settings` dataclass. For an unknown name it raises
            UserError, which says what is accepted; where the name stands is put before it here.

    Raises:
        UserError: for anything that a user can put right.
    """
    # A first look, for the recipe and the objectives: only they say which flags there are besides the run's own.
    texts, _ = parse_flags(build_parser(flag_groups({}), add_help=False), argv)
    flags = read_flags(texts, RUN_SETTINGS)
    recipe = read_recipe(flags["config"].value) if "config" in flags else Recipe()
    top = read_table(recipe.table, RECIPE_SETTINGS, recipe.path)
    written = written_phases(recipe, top)
    phases = [WrittenPhase(flags["objective"])] if "objective" in flags else written
    classes = find_objectives([phase.objective for phase in [*written, *phases]], objective_settings)
    own = {name: settings_in(section) for name, section in classes.items()}

    # What is unknown to the run and to every objective in use is a mistake.
    refuse_unknown_in_recipe(recipe, written, own)
    parser = build_parser(flag_groups({phase.objective.value: own[phase.objective.value] for phase in phases}))
    texts, unknown = parse_flags(parser, argv)
    refuse_unknown_flags(unknown, parser)

    given = top | flags
    sections = {
        name: section(**{s.name: given[s.name].value for s in settings_in(section) if s.name in given})
        for name, section in SECTIONS.items()
    }
    lengths, num_epochs = resolve_lengths(phases, top, flags, recipe)
    resolved = tuple(
        resolve_phase(phase, steps, classes[phase.objective.value], recipe, texts)
        for phase, steps in zip(phases, lengths, strict=True)
    )
    config = Config(**sections, phases=resolved)
    require(config, given)
    return resolve_defaults(config, num_epochs)


def flag_groups(objectives: dict[str, list[Setting]]) -> dict[str, list[Setting]]:
    """Title in --help → settings: one group a section, one an objective."""
    groups = {section.__doc__.split(".")[0]: settings_in(section) for section in SECTIONS.values()}
    return groups | {f"Objective {name}": settings for name, settings in objectives.items()}


def written_phases(recipe: Recipe, top: dict[str, Given]) -> list[WrittenPhase]:
    """The recipe's phases; one, of the default objective unless it names another, where it has no tables."""
    if not recipe.phases:
        return [WrittenPhase(top.get("objective", Given(DEFAULT_OBJECTIVE, "the default objective")))]
    if "objective" in top:
        raise UserError(f"{top['objective'].source}: stands beside [[phase]] tables; give each phase its objective")
    phases = []
    for number, table in enumerate(recipe.phases, 1):
        where = f"{recipe.path}: [[phase]] {number}"
        given = read_table(table, PHASE_SETTINGS, where)
        if "objective" not in given:
            raise UserError(f'{where}: objective is missing, e.g. objective = "{DEFAULT_OBJECTIVE}"')
        phases.append(WrittenPhase(given["objective"], given.get("steps"), table, where))
    return phases


def find_objectives(names: Iterable[Given], objective_settings: Callable[[str], type]) -> dict[str, type]:
    """Name → `Settings` dataclass. Raises UserError, which says where an unknown name was given."""
    classes = {}
    for name, source in names:
        try:
            classes[name] = objective_settings(name)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    return classes


def refuse_unknown_in_recipe(recipe: Recipe, phases: list[WrittenPhase], own: dict[str, list[Setting]]) -> None:
    """`own`: objective → its settings. The top level may hold those of every objective, a phase those of its own."""
    everything = RECIPE_SETTINGS + [s for settings in own.values() for s in settings]
    refuse_unknown_keys(recipe.table, everything, recipe.path, "keys are the flags' names, which --help lists")
    for phase in phases:
        settings = PHASE_SETTINGS + own[phase.objective.value]
        accepted = ", ".join(s.name for s in settings)
        refuse_unknown_keys(phase.table, settings, phase.where, f"a phase of this objective may have {accepted}")


def resolve_lengths(
    phases: list[WrittenPhase], top: dict[str, Given], flags: dict[str, Given], recipe: Recipe
) -> tuple[list[int | None], int | None]:
    """Steps of each phase, and the run's epochs; None sets no limit. Raises UserError where lengths contradict."""
    if len(phases) > 1:
        for limit in ("num_steps", "num_epochs"):
            if limit in top | flags:
                raise UserError(
                    f"{(top | flags)[limit].source}: the recipe's {len(phases)} phases have their own steps; "
                    f"change those in {recipe.path}, or run one phase with --objective"
                )
        for phase in phases:
            if not phase.steps:
                raise UserError(f"{phase.where}: steps is missing; only a single phase can do without")
        return [phase.steps.value for phase in phases], None
    # A length on the command line replaces the recipe's: both limits there, and the phase's own steps.
    limits = flags if flags.keys() & {"num_steps", "num_epochs"} else top
    steps = phases[0].steps if limits is top else None
    steps = steps or limits.get("num_steps")
    epochs = limits.get("num_epochs")
    if not steps and not epochs:
        return [DEFAULT_NUM_STEPS], None
    return [steps.value if steps else None], epochs.value if epochs else None


def resolve_phase(
    phase: WrittenPhase, steps: int | None, settings_class: type, recipe: Recipe, texts: dict[str, Any]
) -> Phase:
    """What wins for one phase: a flag (`texts`), then its own table, then the recipe's top level."""
    own = settings_in(settings_class)
    settings = PHASE_SETTINGS + own
    given = read_table(recipe.table, settings, recipe.path)
    given |= read_table(phase.table, settings, phase.where)
    given |= read_flags(texts, settings)
    values = {s.name: given[s.name].value if s.name in given else s.default for s in settings}
    course = {name: values[name] for name in ("learning_rate", "lr_scheduler", "lr_warmup_steps")}
    chosen = settings_class(**{s.name: values[s.name] for s in own})
    return Phase(phase.objective.value, steps, **course, settings=asdict(chosen))


def require(config: Config, given: dict[str, Given]) -> None:
    """Raises UserError for what is missing, or names a file that is not there."""
    if config.run.review:
        return  # nothing is trained or drawn, so nothing of that is needed
    sampling = config.sampling
    if not sampling.sample_only and config.student.student_path:
        raise UserError(f"{given['student_path'].source}: is for --sample_only; training starts from the teacher")
    if sampling.sample_only and sampling.sample_teacher:
        raise UserError("--sample_teacher: not with --sample_only, which draws the student alone; it is for training")
    if sampling.sample_only and not config.student.student_path:
        raise UserError("--student_path is missing: --sample_only needs a finished student, e.g. outputs/run/student")
    if not config.teacher.teacher_path and not sampling.sample_only:
        example = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
        raise UserError(f"--teacher_path is missing: give a Wan pipeline's folder or its hub id, e.g. {example}")
    if config.run.dry_run and sampling.sample_only:
        raise UserError("--dry_run: plans a training; leave out --sample_only")
    if config.run.num_gpus and config.run.num_gpus % config.run.num_nodes:
        accepted = f"multiples of --num_nodes {config.run.num_nodes}"
        raise UserError(f"{given['num_gpus'].source}: nodes have equally many; accepted are {accepted}")
    if not config.data.data_path and not sampling.sample_only and not config.run.dry_run:
        raise UserError("--data_path is missing: give a file of prompts, .txt or .jsonl, e.g. data/static_prompts.txt")
    if (sampling.save_samples or sampling.sample_only) and not sampling.sample_prompts:
        which = "--sample_only" if sampling.sample_only else "--save_samples"
        raise UserError(f'--sample_prompts is missing: {which} needs prompts, e.g. --sample_prompts "A cat" "A dog"')
    for name in ("lora_alpha", "merge_lora"):
        if getattr(config.student, name) and not config.student.lora_rank:
            raise UserError(f"{given[name].source}: there is no LoRA; give --lora_rank too, e.g. --lora_rank 64")
    if sampling.sampler == "renoise" and sampling.sample_eta:
        raise UserError(f"{given['sample_eta'].source}: is for --sampler ddim; renoise adds all the noise there is")
    deadline, timeout = config.scoring.score_deadline, config.run.ddp_timeout
    if deadline and deadline > timeout / 2:
        raise UserError(
            f"{given['score_deadline'].source}: the other ranks give up after --ddp_timeout {timeout:g}; accepted is "
            f"up to half of that, {timeout / 2:g}"
        )
    if "none" in config.scoring.score and len(config.scoring.score) > 1:
        raise UserError(f"{given['score'].source}: none stands alone")
    if "none" in config.run.report_to and len(config.run.report_to) > 1:
        raise UserError(f"{given['report_to'].source}: none stands alone")
    if config.student.lora_rank and config.teacher.teacher_device_strategy == "cpu":
        raise UserError(
            f"{given['teacher_device_strategy'].source}: keeps the teacher off the GPU, and --lora_rank trains on it; "
            "accepted: auto, replicate"
        )
    files = {
        "data_path": (config.data.data_path, "a .txt or .jsonl file of prompts"),
        "student_config": (config.student.student_config, "a JSON file"),
        "sample_prompts": (sampling.sample_prompts_file, "prompts, or a .txt or .jsonl file of them"),
    }
    for name, (path, accepted) in files.items():
        if path and not Path(path).is_file():
            raise UserError(f"{given[name].source}: no such file; give {accepted}")
    folders = {
        "output_dir": config.run.output_dir,
        "sample_dir": sampling.sample_dir,
        "prompt_cache_dir": config.data.prompt_cache_dir,
    }
    for name, folder in folders.items():
        if folder and Path(folder).is_file():
            raise UserError(f"{given[name].source}: is a file; give a folder")


def resolve_defaults(config: Config, num_epochs: int | None) -> Config:
    """The config with those defaults filled in that depend on other settings."""
    steps = [phase.steps for phase in config.phases]
    optimization = replace(
        config.optimization,
        objective=config.phases[0].objective if len(config.phases) == 1 else None,
        num_steps=None if None in steps else sum(steps),
        num_epochs=num_epochs,
    )
    sampling = config.sampling
    sampling = replace(
        sampling,
        save_samples=bool(sampling.sample_prompts) if sampling.save_samples is None else sampling.save_samples,
        sample_dir=sampling.sample_dir or str(Path(config.run.output_dir, "samples")),
        sample_seed=config.run.seed if sampling.sample_seed is None else sampling.sample_seed,
    )
    deadline = config.scoring.score_deadline or min(DEFAULT_SCORE_DEADLINE, config.run.ddp_timeout / 4)
    scoring = replace(config.scoring, score_deadline=deadline)
    run = replace(config.run, run_name=config.run.run_name or Path(config.run.output_dir).resolve().name)
    return replace(config, optimization=optimization, sampling=sampling, scoring=scoring, run=run)
