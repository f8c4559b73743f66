"""How good a student's pictures are next to its teacher's: same captions, same noise, all by stock `WanPipeline`.

    python benchmarks/quality.py --student outputs/tiny/student --guidance_scale_2 2
    python benchmarks/quality.py --student outputs/tiny/student --guidance_scale_2 2 --problems --grid grid.png

The captions are held-out scenes, which no training has seen. A reader (`data/scenes.py`) says for every picture
whether each attribute of its caption is right. What else is compared, for any prompts (`--prompts`):

Fréchet distance   to the pictures of the teacher's row of most steps, drawn once more from other noise, on features of
                   EfficientNet-Lite0; that row's own distance is the floor
diversity          mean feature distance between pictures of one caption from 8 seeds, as a share of the teacher's
contrast, colour   standard deviation of grey levels, and mean saturation, as shares of the teacher's
"""

import argparse
import json
import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if not __package__:  # run as a file: this folder, whose sampling.py would hide the package, gives way to the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from benchmarks.arguments import at_least_one
from benchmarks.features import Features, are_installed, contrast, frechet_distance, mean_distance, saturation
from config.errors import UserError
from data.prompts import read_prompts
from data.scenes import PALETTE, PLACES, RADII, RELATIONS, SHAPES, SIZE, parse_caption, random_scenes, read
from models.export import read_drawing
from models.folding import fold_text_attention, fold_texts, fold_time
from models.student import check_pixels
from models.teacher import DTYPES, TeacherInfo, encode_text, inspect_teacher, resolve_dtype

TEACHER_STEPS = (50, 4)
STUDENT_STEPS = 4  # where a student does not say how it draws
ENCODING_BATCH = 64  # texts at once
GRID_CAPTIONS = 16
DIVERSITY_CAPTIONS, DIVERSITY_SEEDS = 32, 8
REFERENCE_SEED, DIVERSITY_SEED = 1_000_000, 2_000_000  # beyond those of the pictures that are read


@dataclass(frozen=True)
class Settings:
    """What all rows have in common. Picture i is drawn from the noise of seed + i."""

    seed: int = 0
    batch_size: int = 64
    height: int = SIZE
    width: int = SIZE
    fold: bool = True  # padding and time, exactly; else literally what `WanPipeline` does with a prompt
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Measured:
    """One row of the table: who drew how, what came out, and what it cost."""

    pipeline: str  # as the user gave it
    role: str  # "teacher" or "student"
    steps: int
    guidance_scale: float
    pictures: list[Image.Image]
    problems: list[str | None] | None  # of each picture; None where its caption reads back right, or cannot be read
    forwards: int  # of a transformer, a picture each
    seconds: float  # for drawing alone: no loading, no reading; no text encoding where text is folded
    guidance_scale_2: float | None = None  # of the low-noise expert, where it has its own
    compared: "Compared | None" = None  # with the teacher's pictures

    @property
    def right(self) -> float:
        """Share of the captions that read back right."""
        return self.problems.count(None) / len(self.problems)

    @property
    def right_error(self) -> float:
        """Standard error of that share."""
        return (self.right * (1 - self.right) / len(self.problems)) ** 0.5

    @property
    def guidance(self) -> str:
        """ "none", "4" or "4 / 2"."""
        scales = [self.guidance_scale, *([self.guidance_scale_2] if self.guidance_scale_2 is not None else [])]
        return " / ".join(f"{scale:g}" for scale in scales) if self.guidance_scale > 1 else "none"

    @property
    def forwards_per_picture(self) -> float:
        return self.forwards / len(self.pictures)

    @property
    def seconds_per_picture(self) -> float:
        return self.seconds / len(self.pictures)


@dataclass(frozen=True)
class Compared:
    """A row next to the teacher's pictures. `frechet` is a distance, all others are shares of the teacher's."""

    frechet: float
    diversity: float
    contrast: float
    saturation: float


# A column: its heading, and what it shows of a row.
COLUMNS: dict[str, Callable[[Measured], str]] = {
    "pictures by": lambda m: f"{m.role} {m.pipeline}",
    "steps": lambda m: str(m.steps),
    "guidance": lambda m: m.guidance,
    "captions right": lambda m: f"{m.right:.1%} ± {m.right_error:.1%}" if m.problems is not None else "-",
    "Fréchet": lambda m: f"{m.compared.frechet:.2f}" if m.compared else "-",
    "diversity": lambda m: f"{m.compared.diversity:.3f}" if m.compared else "-",
    "contrast": lambda m: f"{m.compared.contrast:.3f}" if m.compared else "-",
    "saturation": lambda m: f"{m.compared.saturation:.3f}" if m.compared else "-",
    "forwards a picture": lambda m: f"{m.forwards_per_picture:g}",
    "seconds a picture": lambda m: f"{m.seconds_per_picture:.4f}",
}


# -------------------------------------------------------------------------------------------------------- drawing


def load(folder: str | Path, settings: Settings) -> WanPipeline:
    """A stock pipeline from disk or hub, told to read folded text where `settings.fold`."""
    # The VAE stays in float32, as Wan's makers keep it. Each part is told: transformers' own default is the file's.
    dtype = {"default": settings.dtype, "vae": torch.float32}
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=dtype).to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    if settings.fold:
        fold_time(pipeline.vae)
        for transformer in transformers_of(pipeline):
            fold_text_attention(transformer)
    return pipeline


def transformers_of(pipeline: WanPipeline) -> list[torch.nn.Module]:
    return [t for t in (pipeline.transformer, pipeline.transformer_2) if t is not None]


def draw(
    pipeline: WanPipeline,
    captions: list[str],
    steps: int,
    guidance_scale: float,
    settings: Settings,
    guidance_scale_2: float | None = None,
    name: str = "pictures",
) -> tuple[list[Image.Image], int, float]:
    """A picture of each caption, drawn in batches: (pictures, forwards, seconds).

    Args:
        guidance_scale: no guidance at 1.
        guidance_scale_2: of the low-noise expert, by default the same.
        name: what the progress bar is called.
    """
    text = folded_inputs(pipeline, captions, guidance_scale > 1) if settings.fold else prompt_inputs(captions)
    count = ForwardCount(pipeline)
    bar = tqdm(total=len(captions) * steps, desc=name, unit="step", leave=False)

    def call(indices: range, steps: int, on_step: Callable | None = None) -> list[Image.Image]:
        frames = pipeline(
            **text(indices),
            num_frames=1,
            height=settings.height,
            width=settings.width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2 if pipeline.config.boundary_ratio is not None else None,
            generator=[torch.Generator().manual_seed(settings.seed + i) for i in indices],
            output_type="pil",
            callback_on_step_end=on_step,
        ).frames
        return [frame[0] for frame in frames]

    def advance(_pipeline, _step, _timestep, _kwargs) -> dict:
        bar.update(len(indices))
        return {}

    pictures, seconds = [], 0.0
    call(range(1), steps=2)  # warm-up: the first call also pays for what is set up once
    with bar, count:
        for start in range(0, len(captions), settings.batch_size):
            indices = range(start, min(start + settings.batch_size, len(captions)))
            started = time.perf_counter()
            pictures += call(indices, steps, advance)  # pictures are on the CPU: nothing is left to wait for
            seconds += time.perf_counter() - started
    return pictures, count.forwards, seconds


class ForwardCount:
    """Counts, inside its `with`, what a pipeline's transformers compute: one for each picture in each batch."""

    def __init__(self, pipeline: WanPipeline) -> None:
        self.transformers, self.forwards = transformers_of(pipeline), 0

    def __enter__(self) -> None:
        self.handles = [t.register_forward_hook(self._count, with_kwargs=True) for t in self.transformers]

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def _count(self, _transformer, _args, kwargs, _output) -> None:
        self.forwards += len(kwargs["hidden_states"])


def prompt_inputs(captions: list[str]) -> Callable[[range], dict]:
    """indices → what a stock pipeline is told to draw."""
    return lambda indices: {"prompt": [captions[i] for i in indices]}


def folded_inputs(pipeline: WanPipeline, captions: list[str], guided: bool) -> Callable[[range], dict]:
    """The same as embeddings from `fold_text`, encoded once, here; the negative prompt is the pipeline's: empty."""
    batches = [captions[i : i + ENCODING_BATCH] for i in range(0, len(captions), ENCODING_BATCH)]
    encoded = [embeds for batch in batches for embeds in encode_text(pipeline, batch)]  # (n, D) each
    device = pipeline.device
    negative = fold_texts(encode_text(pipeline, [""])).to(device) if guided else None

    def inputs(indices: range) -> dict:
        embeds = {"prompt_embeds": fold_texts([encoded[i] for i in indices]).to(device)}
        return embeds | ({"negative_prompt_embeds": negative.expand(len(indices), -1, -1)} if guided else {})

    return inputs


# ------------------------------------------------------------------------------------------------------ measuring


def measure(
    pipeline_dir: str | Path | WanPipeline,
    captions: list[str],
    steps: int,
    guidance_scale: float,
    settings: Settings | None = None,
    guidance_scale_2: float | None = None,
    name: str | None = None,
    role: str = "student",
) -> Measured:
    """Draw the captions and read the pictures back.

    Args:
        pipeline_dir: a folder or hub id, or what `load` made of one with the same settings.
        guidance_scale: no guidance at 1.
        name: of a pipeline that is loaded already.
    """
    settings = settings or Settings()
    loaded = isinstance(pipeline_dir, WanPipeline)
    pipeline = pipeline_dir if loaded else load(pipeline_dir, settings)
    name = name or ("pipeline" if loaded else str(pipeline_dir))
    label = f"{role} {name}, {steps} steps"
    pictures, forwards, seconds = draw(pipeline, captions, steps, guidance_scale, settings, guidance_scale_2, label)
    problems = None
    if are_scenes(captions):
        problems = [read(p).problem_with(parse_caption(c)) for p, c in zip(pictures, captions, strict=True)]
    return Measured(name, role, steps, guidance_scale, pictures, problems, forwards, seconds, guidance_scale_2)


def are_scenes(captions: list[str]) -> bool:
    """Whether the reader knows what all of these mean."""
    try:
        return all(parse_caption(caption) for caption in captions)
    except ValueError:
        return False


class Comparison:
    """Every row next to the teacher's pictures of the same captions from other noise, drawn once."""

    def __init__(
        self, features: Features, teacher: WanPipeline, job: "Job", captions: list[str], settings: Settings
    ) -> None:
        self.features, self.captions, self.settings = features, captions, settings
        scales, steps = (job.guidance_scale, job.guidance_scale_2), max(job.steps, default=TEACHER_STEPS[0])
        elsewhere = replace(settings, seed=settings.seed + REFERENCE_SEED)
        name = f"teacher {job.name}, {steps} steps, other noise"
        pictures, _, _ = draw(teacher, captions, steps, scales[0], elsewhere, scales[1], name)
        self.reference = self.features(pictures)  # (N, 1280)
        self.contrast, self.saturation = contrast(pictures), saturation(pictures)
        self.steps, self.spread = steps, self._spread(teacher, steps, *scales)

    def with_teacher(self, row: Measured, pipeline: WanPipeline, guidance_scale_2: float | None) -> Measured:
        """The row with what the comparison says of it."""
        is_reference = row.role == "teacher" and row.steps == self.steps
        spread = self.spread
        if not is_reference:
            spread = self._spread(pipeline, row.steps, row.guidance_scale, guidance_scale_2)
        compared = Compared(
            frechet=frechet_distance(self.features(row.pictures), self.reference),
            diversity=spread / self.spread,
            contrast=contrast(row.pictures) / self.contrast,
            saturation=saturation(row.pictures) / self.saturation,
        )
        return replace(row, compared=compared)

    def _spread(self, pipeline: WanPipeline, steps: int, scale: float, scale_2: float | None) -> float:
        """Mean distance between pictures of one caption."""
        captions = [c for c in self.captions[:DIVERSITY_CAPTIONS] for _ in range(DIVERSITY_SEEDS)]
        seeds = replace(self.settings, seed=self.settings.seed + DIVERSITY_SEED)
        pictures, _, _ = draw(pipeline, captions, steps, scale, seeds, scale_2, "diversity")
        return mean_distance(self.features(pictures), DIVERSITY_SEEDS)


def kind_of(problem: str) -> str:
    """A reader's sentence with its particulars left out: "nothing is red" → "nothing is <colour>"."""
    kinds = {"relation": RELATIONS, "place": PLACES, "colour": PALETTE, "size": RADII, "shape": SHAPES}
    for kind, words in kinds.items():
        problem = re.sub(rf"\b({'|'.join(map(re.escape, words))})\b", f"<{kind}>", problem)
    return re.sub(r"\d+(\.\d+)?", "<n>", problem)


def held_out_captions(count: int, seed: int) -> list[str]:
    return [scene.caption for scene in random_scenes(count, seed, held_out=True)]


# ------------------------------------------------------------------------------------------------------ reporting


def table(rows: list[Measured]) -> str:
    """The figures, as Markdown; columns that nothing was measured for are left out."""
    columns = {name: [show(row) for row in rows] for name, show in COLUMNS.items()}
    shown = {name: found for name, found in columns.items() if set(found) != {"-"}}
    cells = [list(shown), *zip(*shown.values(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)


def problem_list(row: Measured, most: int = 8) -> str:
    """The commonest kinds of problems of a row, with their numbers."""
    counts = Counter(kind_of(p) for p in row.problems if p).most_common(most)
    lines = [f"  {number:4d}  {kind}" for kind, number in counts] or ["  none"]
    return "\n".join([f"{row.role} {row.pipeline}, {row.steps} steps:", *lines])


def figures(row: Measured) -> dict:
    """A row as JSON."""
    names = ["pipeline", "role", "steps", "guidance_scale", "guidance_scale_2"]
    names += ["forwards_per_picture", "seconds_per_picture"]
    found = {name: getattr(row, name) for name in names} | {"captions": len(row.pictures)}
    if row.problems is not None:
        kinds = dict(Counter(kind_of(p) for p in row.problems if p).most_common())
        found |= {"right": row.right, "problems": kinds}
    return found | (asdict(row.compared) if row.compared else {})


def write_grid(path: Path, rows: list[Measured], captions: list[str]) -> None:
    """The first captions' pictures: a column a caption, a line a row of the table; misread ones with a red frame."""
    captions = captions[:GRID_CAPTIONS]
    side, gap, left, below = 2 * SIZE, 8, 130, 90  # pixels
    size = (left + len(captions) * (side + gap), gap + len(rows) * (side + gap) + below)
    grid = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for line, row in enumerate(rows):
        y = gap + line * (side + gap)
        label = f"{row.role}\n{textwrap.fill(Path(row.pipeline).name, 18)}\n{row.steps} steps\nguidance {row.guidance}"
        pen.multiline_text((gap, y), label, fill="black", font=font)
        for column in range(len(captions)):
            x = left + column * (side + gap)
            if row.problems and row.problems[column]:
                pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline="red", width=2)
            picture = row.pictures[column]
            small = max(picture.size) < side  # grows by whole pixels, and stays sharp
            grid.paste(ImageOps.contain(picture, (side, side), Image.Resampling[("LANCZOS", "NEAREST")[small]]), (x, y))
    for column, caption in enumerate(captions):
        at = (left + column * (side + gap), size[1] - below)
        pen.multiline_text(at, textwrap.fill(caption, 21), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


# --------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--teacher", default="models/tiny_wan", help="a Wan text-to-video pipeline: folder or hub id (models/tiny_wan)")
    add("--student", nargs="+", action="extend", default=[], help="one or more exported students, drawn unguided")
    add("--count", type=at_least_one, default=512, help="held-out captions, or the first prompts of the file (512)")
    add("--prompts", type=Path, metavar="FILE", help="a .txt or .jsonl of prompts instead of held-out captions")
    add("--height", type=at_least_one, help=f"of a picture, in pixels (what the students' exports say, else {SIZE})")
    add("--width", type=at_least_one, help="likewise")
    add("--batch_size", type=at_least_one, default=64, help="pictures drawn at once (64)")
    add("--guidance_scale", type=float, default=4.0, help="the teacher's (4)")
    add("--guidance_scale_2", type=float, help="of its low-noise expert (as --guidance_scale)")
    add("--teacher_steps", type=at_least_one, nargs="*", default=list(TEACHER_STEPS), help="a row each (50 4)")
    add("--student_steps", type=at_least_one, help="the student's (what its export says, else 4)")
    add("--seed", type=int, default=0, help="of captions and noise (0)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on a GPU, else float32")
    add("--threads", type=at_least_one, default=os.cpu_count(), help="of the CPU (all cores)")
    add("--no_fold", action="store_true", help="read all 512 padded text tokens, as the pipeline does by itself")
    with_features = "Fréchet distance, diversity and colours, too (if benchmarks/requirements.txt is installed)"
    add("--features", action="store_true", default=None, help=with_features)
    add("--no_features", action="store_false", dest="features", help="captions alone")
    add("--problems", action="store_true", help="what was wrong with the pictures that did not read back right")
    add("--grid", type=Path, metavar="FILE.png", help=f"write the first {GRID_CAPTIONS} captions' pictures")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


def size_of(drawings: list[dict], key: str) -> int:
    """The "height" or "width" that the students draw with. Raises UserError where they differ."""
    sizes = sorted({drawing.get(key, SIZE) for drawing in drawings} or {SIZE})
    if len(sizes) > 1:
        raise UserError(f"--{key}: the students draw with {', '.join(map(str, sizes))} pixels; accepted: one for all")
    return sizes[0]


@dataclass(frozen=True)
class Job:
    """A pipeline, checked but not loaded, and the rows that it draws."""

    name: str
    role: str
    source: str | Path  # where its weights are: a folder, or a hub id
    steps: list[int]
    guidance_scale: float = 1.0
    guidance_scale_2: float | None = None


def make_jobs(args: argparse.Namespace) -> tuple[list[Job], int, int]:
    """Teacher first, then students; height and width. Raises UserError for a path without such a pipeline, or what it
    cannot draw."""
    teacher = inspect_teacher(args.teacher, flag="--teacher")
    if args.guidance_scale_2 is not None and teacher.boundary_ratio is None:
        raise UserError(f"--guidance_scale_2: {teacher.name} has one expert; accepted here: --guidance_scale")
    scales = (args.guidance_scale, args.guidance_scale_2)
    jobs = [Job(args.teacher, "teacher", source_of(teacher), args.teacher_steps, *scales)]
    students = [inspect_teacher(name, flag="--student") for name in args.student]
    drawings = [read_drawing(student.folder) for student in students]
    for name, student, drawing in zip(args.student, students, drawings, strict=True):
        steps = args.student_steps or drawing.get("num_inference_steps", STUDENT_STEPS)
        jobs.append(Job(name, "student", source_of(student), [steps]))
    height = args.height or size_of(drawings, "height")
    width = args.width or size_of(drawings, "width")
    for info in (teacher, *students):
        check_pixels("--height", height, info.pixels_per_patch)
        check_pixels("--width", width, info.pixels_per_patch)
    return jobs, height, width


def source_of(info: TeacherInfo) -> str | Path:
    return info.folder if Path(info.name).is_dir() else info.name


def run(args: argparse.Namespace) -> None:
    jobs, height, width = make_jobs(args)  # wrong paths are found before anything is drawn
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(args.dtype, device, flag="--dtype")
    settings = Settings(args.seed, args.batch_size, height, width, not args.no_fold, device, dtype)
    captions = read_prompts(args.prompts)[: args.count] if args.prompts else held_out_captions(args.count, args.seed)
    with_features = are_installed() if args.features is None else args.features
    if with_features and len(captions) < 2:
        raise UserError("Fréchet distance needs two captions or more; accepted with one: --no_features")
    if args.grid and args.grid.suffix.lower() != ".png":
        raise UserError(f"--grid {args.grid}: accepted is a name that ends in .png")
    features = Features(device) if with_features else None
    rows, comparison = [], None
    for job in jobs:
        if not job.steps and not with_features:
            continue
        pipeline = load(job.source, settings)
        if job.role == "teacher" and features:
            comparison = Comparison(features, pipeline, job, captions, settings)
        for steps in job.steps:
            scales = (job.guidance_scale, job.guidance_scale_2)
            row = measure(pipeline, captions, steps, scales[0], settings, scales[1], job.name, job.role)
            rows.append(comparison.with_teacher(row, pipeline, scales[1]) if comparison else row)
    facts = {
        "captions": len(captions),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "padding": "folded" if settings.fold else "all read",
    }
    if args.features is None and not with_features:
        print("Fréchet distance and diversity: pip install -r benchmarks/requirements.txt\n")
    print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()), table(rows), sep="\n\n")
    if args.problems:
        print("", *(problem_list(row) for row in rows if row.problems is not None), sep="\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(facts | {"rows": [figures(row) for row in rows]}, indent=2)
        args.json.write_text(content + "\n", encoding="utf-8")
    if args.grid:
        write_grid(args.grid, rows, captions)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        run(args)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
