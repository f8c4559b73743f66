"""The finished student on disk, as an ordinary Diffusers pipeline or as a LoRA for its teacher's.

A pipeline's folder holds what `WanPipeline.from_pretrained` wants: the student, the few-step scheduler and the
teacher's own VAE, text encoder and tokenizer, hard-linked where the file system allows. A LoRA's holds the few-step
scheduler and what `WanPipeline.load_lora_weights` wants. No file names a folder of this machine.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from diffusers import SchedulerMixin, WanPipeline, WanTransformer3DModel

from config.errors import UserError
from models.adapters import Adapted
from models.student import parameter_dtype
from models.teacher import TeacherInfo, check_weights, inspect_teacher, load_transformer

DRAWING_FILE = "distillation.json"  # how the student draws; no file of a stock pipeline has a place for it
DRAWING_KEYS = ("height", "width", "num_inference_steps", "training_steps", "weights", "lora_on")
LORA_FILE = "pytorch_lora_weights.safetensors"  # Diffusers' name for it
NAME_KEYS = ("_name_or_path", "name_or_path")  # where Diffusers and transformers note what they loaded


@dataclass(frozen=True)
class StudentCard:
    """What the model card tells. Folders in `command` and `settings` are shortened to their last name.

    lora_on: the part of the teacher that a LoRA was trained on; None where the student is a whole pipeline.
    """

    teacher: str  # a hub id or a local folder
    command: list[str]  # argv
    objective: str
    training_steps: int
    num_inference_steps: int
    height: int  # pixels
    width: int
    weights: str  # "ema" or "raw"
    settings: dict  # name → value, as resolved
    license: str = "apache-2.0"
    lora_on: str | None = None

    @property
    def teacher_is_local(self) -> bool:
        return Path(self.teacher).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.teacher)

    @property
    def teacher_name(self) -> str:
        """A hub id, or a folder's last name."""
        return Path(self.teacher).resolve().name if self.teacher_is_local else self.teacher


def export_student(
    student: WanTransformer3DModel | Adapted,
    scheduler: SchedulerMixin,
    teacher_folder: Path,
    output_dir: Path,
    card: StudentCard,
    dtype: torch.dtype = torch.float32,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the student as a full pipeline, `output_dir`; an earlier export there is replaced at once.

    Args:
        student: unwrapped; weights on any device, in any dtype. Adapters are merged.
        scheduler: the few-step scheduler that the student was trained for.
        teacher_folder: the teacher in Diffusers layout, on disk (a hub snapshot's symbolic links are followed).
        dtype: of the weights on disk, but for modules that Diffusers keeps in float32.
        weights: the student's, whole, where it holds but slices of them.

    Raises:
        UserError: `output_dir` is the teacher itself, or something other than an export.
    """
    with _replacing(output_dir, teacher_folder) as new:
        index = _model_index(_read_json(teacher_folder / "model_index.json"), scheduler)
        _write_json(index, new / "model_index.json")
        _save_transformer(student, weights, new / "transformer", dtype)
        _save_about(scheduler, card, new)
        for part, entry in index.items():
            if isinstance(entry, list) and entry[0] is not None and not (new / part).exists():
                _link_folder(teacher_folder / part, new / part)


def export_lora(
    student: Adapted, scheduler: SchedulerMixin, teacher_folder: Path, output_dir: Path, card: StudentCard
) -> None:
    """Write the student's adapters as a LoRA for its teacher's pipeline, in float32; otherwise as `export_student`."""
    with _replacing(output_dir, teacher_folder) as new:
        weights, settings = student.lora()
        weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        WanPipeline.save_lora_weights(new, weights, transformer_lora_adapter_metadata=settings)
        _save_about(scheduler, card, new)


@contextmanager
def _replacing(output_dir: Path, teacher_folder: Path) -> Iterator[Path]:
    """An empty folder to write into; what stood in `output_dir` makes way for it only once it is written."""
    check_export_target(output_dir, teacher_folder)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    new = output_dir.with_name(f".{output_dir.name}.new")
    if new.exists():  # left by a run that was killed
        shutil.rmtree(new)
    new.mkdir()
    yield new
    _swap_in(new, output_dir)


def _save_about(scheduler: SchedulerMixin, card: StudentCard, folder: Path) -> None:
    """The scheduler, how the student draws and where it comes from."""
    scheduler.save_pretrained(folder / "scheduler")
    config = folder / "scheduler" / "scheduler_config.json"
    _write_json(without_folders(_read_json(config)), config)
    drawing = {name: getattr(card, name) for name in DRAWING_KEYS}
    _write_json(drawing | {"teacher": card.teacher_name}, folder / DRAWING_FILE)
    (folder / "README.md").write_text(model_card(card, type(scheduler).__name__), encoding="utf-8")


def check_export_target(output_dir: Path, teacher_folder: Path) -> None:
    """Refuse to replace the teacher or a folder that no export has written. Cheap: call it before training, too."""
    if output_dir.resolve() == Path(teacher_folder).resolve():
        raise UserError(f"--output_dir: the student would replace its teacher, {output_dir}; choose another folder")
    exported = any((output_dir / name).is_file() for name in ("model_index.json", LORA_FILE))
    occupied = output_dir.is_dir() and any(output_dir.iterdir()) and not exported
    if occupied or (output_dir.exists() and not output_dir.is_dir()):
        raise UserError(
            f"--output_dir: {output_dir} exists and is no exported student; move it or choose another folder"
        )


def _model_index(index: dict, scheduler: SchedulerMixin) -> dict:
    """The teacher's model_index.json with one transformer and the few-step scheduler."""
    changes = {
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "boundary_ratio": None,
    }
    return without_folders({"expand_timesteps": False} | index | changes)


def _save_transformer(
    student: WanTransformer3DModel | Adapted, weights: dict[str, torch.Tensor] | None, folder: Path, dtype: torch.dtype
) -> None:
    """Save through a stock transformer, so that neither class, config nor dtype of the one in training shows."""
    is_lora = isinstance(student, Adapted)
    weights = {
        name: weight.detach().to("cpu", parameter_dtype(name, dtype)).contiguous()
        for name, weight in (student.merged() if is_lora else (weights or student.state_dict()).items())
    }
    config = student.transformer.config if is_lora else student.config
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        stock = WanTransformer3DModel(**config)
    stock.load_state_dict(weights, strict=True, assign=True)
    stock.save_pretrained(folder, safe_serialization=True)
    _write_json(without_folders(_read_json(folder / "config.json")), folder / "config.json")


def _link_folder(source: Path, target: Path) -> None:
    """The files of `source`, hard-linked; copied across devices, and JSON that names folders rewritten."""
    for path in sorted(source.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(source).parts):
            continue
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # A tokenizer's vocabulary is no config: its pieces may well look like paths.
        if path.suffix == ".json" and path.name.endswith(("config.json", "index.json", "map.json")):
            content = _read_json(path)
            if (cleaned := without_folders(content)) != content:
                _write_json(cleaned, copy)
                continue
        _link(path.resolve(), copy)  # a hub snapshot holds symbolic links into its blobs


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another device, or a file system or owner that allows no links
        shutil.copyfile(source, target)


def _swap_in(new: Path, target: Path) -> None:
    """Give `new` the name `target`; what stood there goes only when the new one is in place."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
    new.rename(target)
    if old.exists():
        shutil.rmtree(old)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ reading it again


def read_drawing(folder: Path) -> dict:
    """How an exported student draws, as its `DRAWING_FILE` says; {} without one."""
    return _read_json(folder / DRAWING_FILE) if (folder / DRAWING_FILE).is_file() else {}


def inspect_student(
    path: str, flow_shift: float | None, teacher: str | None, revision: str | None
) -> tuple[TeacherInfo, dict]:
    """A finished student's pipeline, and `read_drawing` of it. Nothing heavy is read.

    Args:
        path: a folder or a hub id; of a LoRA, a folder.
        flow_shift: instead of the student's.
        teacher, revision: the pipeline that a LoRA goes on. The result is that pipeline then, with the student's shift.

    Raises UserError where there is no student, or no teacher for a LoRA.
    """
    folder = Path(path)
    drawing = read_drawing(folder)
    if not (folder / LORA_FILE).is_file():
        info = inspect_teacher(path, flow_shift=flow_shift, flag="--student_path")
        if info.boundary_ratio is not None:
            raise UserError(f"--student_path {path}: has two experts; accepted is a student's pipeline")
        check_weights(info, flag="--student_path")
        return info, drawing
    if "lora_on" not in drawing:
        raise UserError(f"--student_path {path}: a LoRA without {DRAWING_FILE}; accepted is one that was trained here")
    if not teacher:
        raise UserError(
            f"--teacher_path is missing: --student_path {path} is a LoRA on {drawing['teacher']}; give that pipeline"
        )
    shift = flow_shift or _read_json(folder / "scheduler" / "scheduler_config.json")["flow_shift"]
    info = inspect_teacher(teacher, revision, shift)
    check_weights(info)
    if drawing["lora_on"] not in info.transformer_configs:
        raise UserError(
            f"--teacher_path {teacher}: has no {drawing['lora_on']}, which --student_path {path} goes on; give "
            f"{drawing['teacher']}"
        )
    return info, drawing


def load_student(path: str, info: TeacherInfo, drawing: dict, dtype: torch.dtype) -> WanTransformer3DModel:
    """The frozen student that `inspect_student` has found, reading folded text."""
    if not drawing.get("lora_on"):
        return load_transformer(info.folder, "transformer", dtype)
    transformer = load_transformer(info.folder, drawing["lora_on"], dtype)
    transformer.load_lora_adapter(path, weight_name=LORA_FILE, use_safetensors=True)
    return transformer.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ no folders


def without_folders(config: dict) -> dict:
    """A copy without the entries that say where on some machine a part was loaded from."""
    return {key: value for key, value in config.items() if key not in NAME_KEYS and not _is_absolute(value)}


def shorten(value: object) -> object:
    """A value for the card: an absolute path, also in --flag=path, becomes its last name; containers are followed."""
    if isinstance(value, dict):
        return {key: shorten(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shorten(inner) for inner in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        flag, equals, argument = value.partition("=") if value.startswith("--") else ("", "", value)
        return flag + equals + (re.split(r"[/\\]", argument.rstrip("/\\"))[-1] if _is_absolute(argument) else argument)
    return value


def _is_absolute(value: object) -> bool:
    """Whether a text is a path from a root or a home folder; "/" alone is none."""
    if not isinstance(value, str):
        return False
    from_root = value.startswith(("/", "~")) and len(PurePosixPath(value).parts) > 1
    return from_root or PureWindowsPath(value).is_absolute()


# ------------------------------------------------------------------------------------------------ model card


PIPELINE = """\
import torch
from diffusers import WanPipeline

dtypes = {"default": torch.bfloat16, "vae": torch.float32}
pipe = WanPipeline.from_pretrained("path/to/this/folder", torch_dtype=dtypes).to("cuda")"""
# One expert with the LoRA draws alone: the few steps are the student's, from noise to picture.
LORA_PIPELINE = """\
import torch
from diffusers import {scheduler}, WanPipeline, WanTransformer3DModel

teacher, student = "{teacher}", "path/to/this/folder"
dtypes = {{"default": torch.bfloat16, "vae": torch.float32}}
pipe = WanPipeline.from_pretrained(
    teacher,
    transformer=WanTransformer3DModel.from_pretrained(teacher, subfolder="{part}", torch_dtype=torch.bfloat16),
    transformer_2=None,
    boundary_ratio=None,
    scheduler={scheduler}.from_pretrained(student, subfolder="scheduler"),
    torch_dtype=dtypes,
)
pipe.load_lora_weights(student)
pipe.to("cuda")"""


def model_card(card: StudentCard, scheduler: str) -> str:
    """README.md: what the hub's front matter wants, how to draw, and how it was made. `scheduler`: its class's name."""
    teacher = card.teacher_name
    base_model = "" if card.teacher_is_local else f"base_model: {card.teacher}\n"
    lora = LORA_PIPELINE.format(scheduler=scheduler, teacher=teacher, part=card.lora_on)
    load = lora if card.lora_on else PIPELINE
    kind = f"picture student of {teacher}" if not card.lora_on else f"picture LoRA for {teacher}"
    rows = [f"| {name} | `{json.dumps(shorten(value), ensure_ascii=False)}` |" for name, value in card.settings.items()]
    settings = "\n".join(rows)
    return f"""---
license: {card.license}
library_name: diffusers
pipeline_tag: text-to-image
{base_model}tags:
- text-to-image
- wan
- distillation
---

# A {card.num_inference_steps}-step {kind}

Draws pictures of {card.width}×{card.height} pixels in {card.num_inference_steps} steps without guidance.

```python
{load}
images = pipe(
    "a prompt",
    num_frames=1,
    height={card.height},
    width={card.width},
    num_inference_steps={card.num_inference_steps},
    guidance_scale=1.0,
    output_type="pil",
).frames[0]
images[0].save("picture.png")
```

The scheduler belongs to the student: another one, another number of steps or guidance will draw worse.

## How it was made

Teacher: {teacher}. Objective: {card.objective}. Training steps: {card.training_steps}.

```
{shlex.join(shorten(card.command))}
```

| setting | value |
|---|---|
{settings}

VAE, text encoder and tokenizer are the teacher's.
"""
