"""The finished student as an ordinary Diffusers pipeline on disk.

The folder holds what `WanPipeline.from_pretrained` wants: the student, the few-step scheduler and the teacher's own
VAE, text encoder and tokenizer, hard-linked where the file system allows. No file names a folder of this machine.
"""

import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from diffusers import SchedulerMixin, WanTransformer3DModel

from config.errors import UserError
from models.student import parameter_dtype

DRAWING_FILE = "distillation.json"  # how the student draws; no file of a stock pipeline has a place for it
DRAWING_KEYS = ("height", "width", "num_inference_steps", "training_steps", "weights")
NAME_KEYS = ("_name_or_path", "name_or_path")  # where Diffusers and transformers note what they loaded


@dataclass(frozen=True)
class StudentCard:
    """What the model card tells. Folders in `command` and `settings` are shortened to their last name."""

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


def export_student(
    transformer: WanTransformer3DModel,
    scheduler: SchedulerMixin,
    teacher_folder: Path,
    output_dir: Path,
    card: StudentCard,
    dtype: torch.dtype = torch.float32,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the student as a full pipeline, `output_dir`; an earlier export there is replaced at once.

    Args:
        transformer: unwrapped; weights on any device, in any dtype.
        scheduler: the few-step scheduler that the student was trained for.
        teacher_folder: the teacher in Diffusers layout, on disk (a hub snapshot's symbolic links are followed).
        dtype: of the weights on disk, but for modules that Diffusers keeps in float32.
        weights: the transformer's, whole, where it holds but slices of them.

    Raises:
        UserError: `output_dir` is the teacher itself, or something other than an export.
    """
    check_export_target(output_dir, teacher_folder)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    new = output_dir.with_name(f".{output_dir.name}.new")
    if new.exists():  # left by a run that was killed
        shutil.rmtree(new)
    new.mkdir()
    index = _model_index(_read_json(teacher_folder / "model_index.json"), scheduler)
    _write_json(index, new / "model_index.json")
    _save_transformer(transformer, weights or transformer.state_dict(), new / "transformer", dtype)
    scheduler.save_pretrained(new / "scheduler")
    for config in (new / "transformer" / "config.json", new / "scheduler" / "scheduler_config.json"):
        _write_json(without_folders(_read_json(config)), config)
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and not (new / part).exists():
            _link_folder(teacher_folder / part, new / part)
    drawing = {name: getattr(card, name) for name in DRAWING_KEYS}
    _write_json(drawing, new / DRAWING_FILE)
    (new / "README.md").write_text(model_card(card), encoding="utf-8")
    _swap_in(new, output_dir)


def check_export_target(output_dir: Path, teacher_folder: Path) -> None:
    """Refuse to replace the teacher or a folder that no export has written. Cheap: call it before training, too."""
    if output_dir.resolve() == Path(teacher_folder).resolve():
        raise UserError(f"--output_dir: the student would replace its teacher, {output_dir}; choose another folder")
    occupied = output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / "model_index.json").is_file()
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
    transformer: WanTransformer3DModel, weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Save through a stock transformer, so that neither class, config nor dtype of the one in training shows."""
    weights = {
        name: weight.detach().to("cpu", parameter_dtype(name, dtype)).contiguous() for name, weight in weights.items()
    }
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        stock = WanTransformer3DModel(**config)
    stock.load_state_dict(weights, strict=True, assign=True)
    stock.save_pretrained(folder, safe_serialization=True)


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


def model_card(card: StudentCard) -> str:
    """README.md: what the hub's front matter wants, how to draw, and how it was made."""
    local = Path(card.teacher).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", card.teacher)
    teacher = Path(card.teacher).resolve().name if local else card.teacher
    base_model = "" if local else f"base_model: {card.teacher}\n"
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

# A {card.num_inference_steps}-step picture student of {teacher}

Draws pictures of {card.width}×{card.height} pixels in {card.num_inference_steps} steps without guidance.

```python
import torch
from diffusers import WanPipeline

dtypes = {{"default": torch.bfloat16, "vae": torch.float32}}
pipe = WanPipeline.from_pretrained("path/to/this/folder", torch_dtype=dtypes).to("cuda")
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
