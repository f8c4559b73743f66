"""Every setting, written down once: flags and recipe files become one validated `Config`.

A setting is a dataclass field; its flag, its recipe key, its help and its checks are all made from that field.
What wins: a flag, then a recipe's `[[phase]]` table, then the recipe's top level, then the default here.
"""

import argparse
import json
import math
import tomllib
import typing
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import UserError, nearest

DEFAULT_OBJECTIVE = "trajectory"
DEFAULT_NUM_STEPS = 1000  # where neither steps nor epochs are given


class Bound(NamedTuple):
    """What a number must satisfy, in words and in code."""

    words: str
    holds: Callable[[float], bool]


AT_LEAST_ONE = Bound(">= 1", lambda x: x >= 1)
POSITIVE = Bound("> 0", lambda x: x > 0)
NOT_NEGATIVE = Bound(">= 0", lambda x: x >= 0)
BELOW_ONE = Bound(">= 0 and < 1", lambda x: 0 <= x < 1)
UNIT = Bound("from 0 to 1", lambda x: 0 <= x <= 1)
TEXT_LENGTH = Bound("from 1 to 512", lambda x: 1 <= x <= 512)
SEED = Bound("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)


def setting(default: Any, help: str, *, bound: Bound | None = None, aliases=(), choices=(), bare=None, shorthand=None):
    """A field of a frozen settings dataclass. Its type: bool, int, float or str, that or None, or a tuple[that, ...].

    Args:
        bare: the value when the flag stands alone, without one.
        shorthand: (name, value), a flag without value that stands for this one with `value`.
    """
    about = {"help": help, "bound": bound, "aliases": aliases, "choices": choices, "bare": bare, "shorthand": shorthand}
    return field(default=default, metadata=about)


# ---------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher: a Diffusers Wan text-to-video pipeline."""

    teacher_path: str | None = setting(None, "a pipeline's folder or hub id; required for training")
    teacher_revision: str | None = setting(None, "branch, tag or commit on the hub")
    teacher_dtype: str = setting(
        "auto", "auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", "float32", "float16", "bfloat16")
    )
    guidance_scale: float | None = setting(
        None, "guidance of the high-noise expert, or the only one", bound=NOT_NEGATIVE
    )
    guidance_scale_2: float | None = setting(None, "guidance of the low-noise expert", bound=NOT_NEGATIVE)
    flow_shift: float | None = setting(
        None, "shift of the teacher's timesteps; by default the pipeline's", bound=POSITIVE
    )
    negative_prompt: str = setting("", "what guidance leads away from")
    teacher_device_strategy: str = setting(
        "auto",
        "replicate: whole on each rank's device; cpu: off the GPU, slowly",
        choices=("auto", "replicate", "cpu"),
        shorthand=("teacher_on_cpu", "cpu"),
    )


@dataclass(frozen=True)
class StudentConfig:
    """The student: a Wan transformer of its own."""

    student_config: str | None = setting(None, "JSON file; by default a copy of the teacher's low-noise expert")
    student_path: str | None = setting(None, "a finished student's pipeline, for --sample_only")
    student_steps: int = setting(4, "steps in which the student draws", bound=AT_LEAST_ONE)
    student_shift: float | None = setting(None, "shift of its timesteps; by default the teacher's", bound=POSITIVE)
    height: int | None = setting(None, "pixels, instead of the student config's", bound=AT_LEAST_ONE)
    width: int | None = setting(None, "pixels, instead of the student config's", bound=AT_LEAST_ONE)


@dataclass(frozen=True)
class DataConfig:
    """The prompts: all the data that there is."""

    data_path: str | None = setting(None, "a .txt file, a prompt a line, or .jsonl; required for training")
    prompt_cache_dir: str | None = setting(None, "where encoded prompts are kept for the next run")
    max_sequence_length: int = setting(512, "tokens of a prompt that are read", bound=TEXT_LENGTH)
    dataloader_num_workers: int | None = setting(
        None, "accepted for older scripts, without effect", aliases=("num_workers",), bound=NOT_NEGATIVE
    )


@dataclass(frozen=True)
class OptimizationConfig:
    """Optimisation. A phase may have its own objective, length, learning rate, scheduler and warm-up."""

    objective: str | None = setting(None, f"what to train, in one phase (default: {DEFAULT_OBJECTIVE})")
    learning_rate: float = setting(1e-5, "peak learning rate", aliases=("lr",), bound=POSITIVE)
    num_steps: int | None = setting(
        None,
        f"optimizer steps (default: {DEFAULT_NUM_STEPS} where --num_epochs is not given)",
        aliases=("max_train_steps",),
        bound=AT_LEAST_ONE,
    )
    num_epochs: int | None = setting(None, "epochs", aliases=("num_train_epochs",), bound=AT_LEAST_ONE)
    steps_per_epoch: int | None = setting(None, "by default one pass over the prompts", bound=AT_LEAST_ONE)
    train_batch_size: int = setting(4, "prompts a rank and forward", aliases=("batch_size",), bound=AT_LEAST_ONE)
    gradient_accumulation_steps: int = setting(1, "forwards an optimizer step", bound=AT_LEAST_ONE)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", bound=POSITIVE)
    lr_scheduler: str = setting(
        "constant_with_warmup",
        "course of the learning rate",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_warmup_steps: int = setting(0, "steps until the peak", bound=NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, "AdamW", bound=BELOW_ONE)
    adam_beta2: float = setting(0.999, "AdamW", bound=BELOW_ONE)
    adam_weight_decay: float = setting(0.01, "AdamW", bound=NOT_NEGATIVE)
    adam_epsilon: float = setting(1e-8, "AdamW", bound=POSITIVE)
    mixed_precision: str = setting("no", "alone: bf16", choices=("no", "fp16", "bf16"), bare="bf16")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    use_ema: bool = setting(False, "keep an average of the student's weights, draw with it and export it")
    ema_decay: float = setting(0.999, "of that average", bound=BELOW_ONE)


@dataclass(frozen=True)
class SamplingConfig:
    """Sample pictures."""

    save_samples: bool = setting(False, "draw pictures while training")
    sample_prompts: tuple[str, ...] = setting(
        (), "prompts, or one .txt or .jsonl file of them", aliases=("validation_prompts",)
    )
    sample_interval: int = setting(1, "epochs between two rounds", bound=AT_LEAST_ONE)
    sample_dir: str | None = setting(None, "where pictures go (default: samples in output_dir)")
    sample_steps: int | None = setting(None, "steps a picture; by default the student's", bound=AT_LEAST_ONE)
    sample_eta: float = setting(0.0, "noise that ddim adds: 0 is deterministic", bound=UNIT)
    sampler: str = setting("ddim", "how a picture is drawn", choices=("ddim", "renoise"))
    sample_batch_size: int | None = setting(None, "pictures at a time; by default as many as fit", bound=AT_LEAST_ONE)
    sample_teacher: bool = setting(False, "draw the teacher's pictures once, to compare")
    sample_teacher_steps: int = setting(50, "steps of the teacher's pictures", bound=AT_LEAST_ONE)
    sample_only: bool = setting(False, "draw from --student_path, train nothing")
    sample_seed: int | None = setting(None, "noise of the pictures (default: seed)", bound=SEED)

    @property
    def sample_prompts_file(self) -> str | None:
        """The file of prompts that `sample_prompts` names, or None where it holds the prompts themselves."""
        single = self.sample_prompts[0] if len(self.sample_prompts) == 1 else ""
        return single if Path(single).suffix in (".txt", ".jsonl") else None


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    config: str | None = setting(None, "a recipe: TOML, its keys are these flags' names; flags win over it")
    output_dir: str = setting("outputs/run", "where everything that the run leaves behind goes")
    overwrite_output_dir: bool = setting(False, "replace another run's results in output_dir")
    seed: int = setting(0, "of weights, training noise and pictures", bound=SEED)
    distributed: bool = setting(False, "fail unless started by torchrun")
    multi_gpu: bool = setting(False, "start one process for each GPU")
    ddp_timeout: float = setting(3600.0, "seconds that a rank waits for the others", bound=POSITIVE)
    logging_steps: int = setting(10, "steps between two rows of metrics.jsonl", bound=AT_LEAST_ONE)
    report_to: str = setting("none", "metrics go to metrics.jsonl only", choices=("none",))


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
    run: RunConfig
    phases: tuple[Phase, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should be told once."""
        if self.data.dataloader_num_workers is None:
            return ()
        return ("--dataloader_num_workers is not needed any more: prompts are encoded once and memory-mapped",)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts that `json.dump` takes."""
        return asdict(self)


# ---------------------------------------------------------------------------------------------- one setting


@dataclass(frozen=True)
class Setting:
    """A field as flags and recipes see it. `kind`: bool, int, float or str; `many`: a tuple of them."""

    name: str
    kind: type
    many: bool
    default: Any
    help: str = ""
    bound: Bound | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    bare: Any = None
    shorthand: tuple[str, Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that a recipe may use."""
        return (self.name, *self.aliases, *(self.shorthand or ())[:1])

    @property
    def flags(self) -> dict[str, Any]:
        """Flag → the value that it stands for, None where the user gives one."""
        if self.kind is bool:
            names = (self.name, *self.aliases)
            return {f"--{name}": True for name in names} | {f"--no_{name}": False for name in names}
        flags = {f"--{name}": None for name in (self.name, *self.aliases)}
        return flags | ({f"--{self.shorthand[0]}": self.shorthand[1]} if self.shorthand else {})

    def parse(self, text: str | list[str], source: str) -> Any:
        """The value that a flag's text stands for. Raises UserError."""
        try:
            value = [self.kind(part) for part in text] if self.many else self.kind(text)
        except ValueError:
            raise self.refusal(text, source) from None
        return self.check(value, source)

    def check(self, value: Any, source: str) -> Any:
        """The value, if it is what this setting accepts. Raises UserError, which begins with `source`."""
        parts = value if self.many and isinstance(value, list) else [value]
        parts = [float(part) if self.kind is float and type(part) is int else part for part in parts]
        for part in parts:
            # `type is`, not isinstance: True is no whole number.
            right = type(part) is self.kind and (not self.choices or part in self.choices)
            right = right and (self.kind is not float or math.isfinite(part))
            if not right or (self.bound and not self.bound.holds(part)):
                raise self.refusal(part, source)
        return tuple(parts) if self.many else parts[0]

    def refusal(self, value: Any, source: str) -> UserError:
        if self.choices:
            close = nearest(value, self.choices) if isinstance(value, str) else ""
            return UserError(f"{source}: expected one of {', '.join(map(str, self.choices))}{close}")
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[self.kind]
        return UserError(
            f"{source}: expected {words}{f' {self.bound.words}' if self.bound else ''}{', or a list of it' * self.many}"
        )


def settings_in(section: type) -> list[Setting]:
    """The settings of a dataclass, in its order. Fields need a default; what `setting` adds is optional."""
    types, settings = typing.get_type_hints(section), []
    for f in fields(section):
        kind = next((arg for arg in typing.get_args(types[f.name]) if arg is not type(None)), types[f.name])
        many = typing.get_origin(types[f.name]) is tuple
        settings.append(Setting(f.name, kind, many, f.default, **f.metadata))
    return settings


SECTIONS = {f.name: f.type for f in fields(Config) if f.name != "phases"}
RUN_SETTINGS = [s for section in SECTIONS.values() for s in settings_in(section)]
_BY_NAME = {s.name: s for s in RUN_SETTINGS}
PHASE_SETTINGS = [
    replace(_BY_NAME["num_steps"], name="steps", aliases=()),
    *(_BY_NAME[name] for name in ("objective", "learning_rate", "lr_scheduler", "lr_warmup_steps")),
]


# ---------------------------------------------------------------------------------------------- flags and recipes


class Given(NamedTuple):
    """A value, and what the user wrote where: "--lr 0.1", "tiny.toml: lr = 0.1"."""

    value: Any
    source: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


class _Remember(argparse.Action):
    """Keeps the text of each flag under the flag's own name; the last one counts."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.texts[option_string] = values


def build_parser(objectives: dict[str, list[Setting]], add_help: bool = True) -> argparse.ArgumentParser:
    """All flags, in one group a section and one an objective."""
    parser = _Parser(
        usage="%(prog)s [--config RECIPE] [--flag [value]] ...",
        description="Distill a Wan text-to-video pipeline into a few-step picture generator, from prompts alone.",
        allow_abbrev=False,
        add_help=add_help,
    )
    for section in SECTIONS.values():
        _add_flags(parser.add_argument_group(section.__doc__.split(".")[0]), settings_in(section))
    shared = set()  # flags that several objectives have: one flag for all of them
    for name, settings in objectives.items():
        _add_flags(parser.add_argument_group(f"Objective {name}"), [s for s in settings if s.name not in shared])
        shared |= {s.name for s in settings}
    return parser


def _add_flags(group, settings: Iterable[Setting]) -> None:
    for s in settings:
        for takes_value in (True, False):
            flags = [flag for flag, value in s.flags.items() if (value is None) == takes_value]
            if not flags:
                continue
            options = {"nargs": 0}
            if takes_value:
                kind = "{" + ",".join(map(str, s.choices)) + "}" if s.choices else s.kind.__name__.upper()
                nargs = "+" if s.many else "?" if s.bare is not None else None
                options = {"nargs": nargs, "const": s.bare, "metavar": kind}
            default = "" if s.default in (None, "", ()) or s.kind is bool else f" (default: {s.default})"
            text = s.help + default if takes_value or not s.shorthand else f"short for --{s.name} {s.shorthand[1]}"
            text = text.replace("%", "%%")
            group.add_argument(*flags, action=_Remember, default=argparse.SUPPRESS, dest=s.name, help=text, **options)


def parse_flags(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Flag → its text, and what the parser does not know."""
    namespace, unknown = parser.parse_known_args(argv, argparse.Namespace(texts={}))
    return namespace.texts, unknown


def read_flags(texts: dict[str, Any], settings: Iterable[Setting]) -> dict[str, Given]:
    """The values of those settings that have a flag in `texts`, by the setting's own name. Raises UserError."""
    found = []
    for s in settings:
        for flag, stands_for in s.flags.items():
            if flag in texts and stands_for is not None:
                found.append((s.name, Given(stands_for, flag)))
            elif flag in texts:
                source = f"{flag} {_shown(texts[flag])}"
                found.append((s.name, Given(s.parse(texts[flag], source), source)))
    return _unique(found)


def read_table(table: dict[str, Any], settings: Iterable[Setting], where: str) -> dict[str, Given]:
    """As `read_flags`, from a recipe's table, which holds typed values."""
    found = []
    for s in settings:
        for key in s.names:
            if key not in table:
                continue
            value, source = table[key], f"{where}: {key} = {_shown(table[key])}"
            if s.shorthand and key == s.shorthand[0]:
                if not isinstance(value, bool):
                    raise UserError(f"{source}: expected true or false")
                if value:
                    found.append((s.name, Given(s.shorthand[1], source)))
            else:
                found.append((s.name, Given(s.check(value, source), source)))
    return _unique(found)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _unique(found: Iterable[tuple[str, Given]]) -> dict[str, Given]:
    """Each setting once. Raises UserError where two of its names disagree."""
    values = {}
    for name, given in found:
        first = values.setdefault(name, given)
        if first.value != given.value:
            raise UserError(
                f"{first.source} and {given.source}: both set {name}, to different values; give one of them"
            )
    return values


class Recipe(NamedTuple):
    """A recipe as written: its file, its flat keys, its `[[phase]]` tables."""

    path: str = ""
    table: dict[str, Any] = {}
    phases: list[dict[str, Any]] = []

    def where(self, number: int) -> str:
        return f"{self.path}: [[phase]] {number}"


def read_recipe(path: str) -> Recipe:
    """Raises UserError for a file that cannot be read or is not TOML, with its line and column."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); give a TOML recipe") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: byte {error.start} is not UTF-8; recipes are UTF-8 text") from None
    try:
        table = tomllib.loads(text)
    except ValueError as error:
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
        reason = str(error).replace("at end of document", f"at line {line}, column {column}, the end of the file")
        raise UserError(f"--config {path}: not valid TOML: {reason}") from None
    phases = table.pop("phase", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise UserError(f"{path}: phase = {_shown(phases)}: expected tables, each headed [[phase]]")
    return Recipe(path, table, phases)


def refuse_unknown_keys(table: dict[str, Any], settings: Iterable[Setting], where: str) -> None:
    """Raises UserError for a key that no setting has."""
    accepted = [name for s in settings for name in s.names]
    for key in table:
        if key not in accepted:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, accepted)}")


def refuse_unknown_flags(unknown: list[str], parser: argparse.ArgumentParser) -> None:
    """Raises UserError for the first word that argparse could not place."""
    if not unknown:
        return
    flag = unknown[0].split("=")[0]
    if flag.startswith("-"):
        raise UserError(f"unknown flag {flag}{nearest(flag, parser._option_string_actions)}; --help lists all")
    raise UserError(f"unexpected argument {_shown(unknown[0])}: no flag takes it; quote text that holds spaces")


# ---------------------------------------------------------------------------------------------- all together


def load_config(argv: list[str], objective_settings: Callable[[str], type]) -> Config:
    """Flags, and the recipe that they may name, as one validated `Config`. `--help` prints and exits with 0.

    Args:
        argv: the command line without the program's name.
        objective_settings: an objective's name → its frozen `Settings` dataclass; UserError for an unknown name.

    Raises:
        UserError: for anything that a user can put right.
    """
    # A first look, for the recipe and the objectives: only they say which flags there are besides the run's own.
    flags = read_flags(parse_flags(build_parser({}, add_help=False), argv)[0], RUN_SETTINGS)
    recipe = read_recipe(flags["config"].value) if "config" in flags else Recipe()
    in_recipe = [s for s in RUN_SETTINGS if s.name != "config"]
    top = read_table(recipe.table, in_recipe, recipe.path)
    written = written_phases(recipe, top)
    phases = [({"objective": flags["objective"]}, {})] if "objective" in flags else written
    classes = find_objectives([given["objective"] for given, _ in [*written, *phases]], objective_settings)
    own = {name: settings_in(section) for name, section in classes.items()}

    # What is unknown to the run and to every objective in use is a mistake.
    refuse_unknown_keys(recipe.table, in_recipe + [s for settings in own.values() for s in settings], recipe.path)
    for number, (given, table) in enumerate(written, 1):
        refuse_unknown_keys(table, PHASE_SETTINGS + own[given["objective"].value], recipe.where(number))
    used = [given["objective"].value for given, _ in phases]
    parser = build_parser({name: own[name] for name in used})
    texts, unknown = parse_flags(parser, argv)
    refuse_unknown_flags(unknown, parser)

    lengths, num_epochs = resolve_lengths([given for given, _ in phases], top, flags, recipe)
    resolved = []
    for number, ((given, table), steps) in enumerate(zip(phases, lengths, strict=True), 1):
        name = given["objective"].value
        settings = read_table(recipe.table, own[name], recipe.path) | read_table(table, own[name], recipe.where(number))
        values = {key: value for key, (value, _) in (settings | read_flags(texts, own[name])).items()}
        course = {key: value for key, (value, _) in (top | given | flags).items()}
        course = {s.name: course.get(s.name, s.default) for s in PHASE_SETTINGS} | {"objective": name, "steps": steps}
        resolved.append(Phase(**course, settings=asdict(classes[name](**values))))

    merged = top | flags
    sections = {
        name: section(**{s.name: merged[s.name].value for s in settings_in(section) if s.name in merged})
        for name, section in SECTIONS.items()
    }
    config = Config(**sections, phases=tuple(resolved))
    require(config, merged)
    return resolve_defaults(config, num_epochs)


def find_objectives(names: Iterable[Given], objective_settings: Callable[[str], type]) -> dict[str, type]:
    """Name → `Settings` dataclass. Raises UserError, which says where an unknown name was given."""
    classes = {}
    for name, source in names:
        try:
            classes[name] = objective_settings(name)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    return classes


def written_phases(recipe: Recipe, top: dict[str, Given]) -> list[tuple[dict[str, Given], dict[str, Any]]]:
    """The recipe's phases: what each says of `PHASE_SETTINGS`, and its table. One of the default where it has none."""
    if not recipe.phases:
        return [({"objective": top.get("objective", Given(DEFAULT_OBJECTIVE, "the default objective"))}, {})]
    if "objective" in top:
        raise UserError(f"{top['objective'].source}: stands beside [[phase]] tables; give each phase its objective")
    phases = []
    for number, table in enumerate(recipe.phases, 1):
        given = read_table(table, PHASE_SETTINGS, recipe.where(number))
        if "objective" not in given:
            raise UserError(f'{recipe.where(number)}: objective is missing, e.g. objective = "{DEFAULT_OBJECTIVE}"')
        phases.append((given, table))
    return phases


def resolve_lengths(
    phases: list[dict[str, Given]], top: dict[str, Given], flags: dict[str, Given], recipe: Recipe
) -> tuple[list[int | None], int | None]:
    """Steps of each phase, and the run's epochs; None sets no limit. Raises UserError where lengths contradict."""
    if len(phases) > 1:
        for limit in ("num_steps", "num_epochs"):
            if limit in top | flags:
                raise UserError(
                    f"{(top | flags)[limit].source}: the recipe's {len(phases)} phases have their own steps; "
                    f"change those in {recipe.path}, or run one phase with --objective"
                )
        for number, given in enumerate(phases, 1):
            if "steps" not in given:
                raise UserError(f"{recipe.where(number)}: steps is missing; only a single phase can do without")
        return [given["steps"].value for given in phases], None
    # A length on the command line replaces the recipe's: both limits there, and the phase's own steps.
    limits = flags if flags.keys() & {"num_steps", "num_epochs"} else top
    steps = phases[0].get("steps") if limits is top else None
    steps = steps or limits.get("num_steps")
    epochs = limits.get("num_epochs")
    if not steps and not epochs:
        return [DEFAULT_NUM_STEPS], None
    return [steps.value if steps else None], epochs.value if epochs else None


def require(config: Config, given: dict[str, Given]) -> None:
    """Raises UserError for what is missing, or names a file that is not there."""
    sampling = config.sampling
    if not sampling.sample_only and config.student.student_path:
        raise UserError(f"{given['student_path'].source}: is for --sample_only; training starts from the teacher")
    if sampling.sample_only and not config.student.student_path:
        raise UserError("--student_path is missing: --sample_only needs a finished student, e.g. outputs/run/student")
    if not config.teacher.teacher_path and (sampling.sample_teacher or not sampling.sample_only):
        example = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
        raise UserError(f"--teacher_path is missing: give a Wan pipeline's folder or its hub id, e.g. {example}")
    if not config.data.data_path and not sampling.sample_only:
        raise UserError("--data_path is missing: give a file of prompts, .txt or .jsonl, e.g. data/static_prompts.txt")
    if (sampling.save_samples or sampling.sample_only) and not sampling.sample_prompts:
        which = "--sample_only" if sampling.sample_only else "--save_samples"
        raise UserError(f'--sample_prompts is missing: {which} needs prompts, e.g. --sample_prompts "A cat" "A dog"')
    files = {
        "data_path": (config.data.data_path, "a .txt or .jsonl file of prompts"),
        "student_config": (config.student.student_config, "a JSON file"),
        "sample_prompts": (sampling.sample_prompts_file, "prompts, or a .txt or .jsonl file of them"),
    }
    for name, (path, accepted) in files.items():
        if path and not Path(path).is_file():
            raise UserError(f"{given[name].source}: no such file; give {accepted}")
    if Path(config.run.output_dir).is_file():
        raise UserError(f"{given['output_dir'].source}: is a file; give a folder")


def resolve_defaults(config: Config, num_epochs: int | None) -> Config:
    """The config with those defaults filled in that depend on other settings."""
    steps = [phase.steps for phase in config.phases]
    optimization = replace(
        config.optimization,
        objective=config.phases[0].objective if len(config.phases) == 1 else None,
        num_steps=None if None in steps else sum(steps),
        num_epochs=num_epochs,
    )
    seed = config.run.seed if config.sampling.sample_seed is None else config.sampling.sample_seed
    folder = config.sampling.sample_dir or str(Path(config.run.output_dir, "samples"))
    return replace(
        config, optimization=optimization, sampling=replace(config.sampling, sample_dir=folder, sample_seed=seed)
    )
