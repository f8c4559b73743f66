"""The student: a Wan transformer built from a config and initialised from the teacher's layers.

A student config is JSON: the picture size, which expert and which of its blocks to start from, and what shall be
smaller than in the teacher:

    {"height": 480, "width": 832, "init_from": "transformer_2", "layers": "spaced", "num_layers": 20}

Every weight that fits is copied. Where the student has fewer heads or a narrower feed-forward layer, the channels that
matter most are kept (`keep_channels`). Nothing starts random.
"""

import inspect
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from config.errors import UserError, nearest
from models.quantised import plain

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(WanTransformer3DModel.__init__).parameters.items()
    if name != "self"
}
REDUCIBLE = ("num_layers", "num_attention_heads", "ffn_dim")  # all else must be as in the teacher
PICTURE_MULTIPLE = 16  # pixels; what WanPipeline demands of height and width


@dataclass(frozen=True)
class StudentSpec:
    """A student, fully resolved: picture size in pixels, the expert and blocks it starts from, its architecture."""

    height: int
    width: int
    init_from: str  # "transformer" or "transformer_2"
    layers: tuple[int, ...]  # the teacher's block that each student block starts from
    transformer_config: dict  # every argument of WanTransformer3DModel


@dataclass(frozen=True)
class InitRow:
    """Where one weight of the student comes from."""

    name: str
    shape: tuple[int, ...]
    source: str  # the teacher's name for it
    teacher_shape: tuple[int, ...]
    how: str  # "copied" or "cut"


# ------------------------------------------------------------------------------------------------ reading the config


def read_student_config(
    path: Path | None,
    teacher_configs: dict[str, dict],
    pixels_per_patch: int,
    default_size: tuple[int, int],
    height: int | None = None,
    width: int | None = None,
) -> StudentSpec:
    """The student that a config file describes, checked against the teacher before any weight is loaded.

    Args:
        path: a JSON file, or None for a copy of the teacher's expert.
        teacher_configs: "transformer" and, with two experts, "transformer_2" → that folder's config.json.
        pixels_per_patch: the VAE's spatial factor × the transformer's patch size.
        default_size: (height, width) in pixels where neither file nor flag names them.
        height, width: the flags --height and --width, which win over the file.

    Raises:
        UserError: names the file, the key, its value and what is accepted.
    """
    settings = _read_json(path) if path else {}
    for key in settings:
        if key not in (accepted := ["height", "width", "init_from", "layers", *DEFAULTS]):
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, accepted)}; accepted are {', '.join(accepted)}")
    init_from = settings.get("init_from", "transformer_2" if "transformer_2" in teacher_configs else "transformer")
    if init_from not in list(teacher_configs):  # a list, since JSON may hold what no dict can look up
        names = " or ".join(repr(name) for name in teacher_configs)
        raise UserError(f"{path}: init_from is {init_from!r}; this teacher has {names}")
    # Through JSON, so that a tuple in the defaults equals the list that config.json holds for it.
    teacher = json.loads(json.dumps({key: teacher_configs[init_from].get(key, DEFAULTS[key]) for key in DEFAULTS}))
    layers = _layers(path, settings, teacher["num_layers"])
    config = teacher | {key: settings[key] for key in DEFAULTS if key in settings} | {"num_layers": len(layers)}
    _check_config(path, config, teacher)
    sizes = []
    for key, flag, default in zip(("height", "width"), (height, width), default_size, strict=True):
        source = f"--{key}" if flag is not None else f"{path}: {key}"
        value = flag if flag is not None else settings.get(key, default)
        sizes.append(check_pixels(source, value, pixels_per_patch))
    return StudentSpec(*sizes, init_from, layers, config)


def _read_json(path: Path) -> dict:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--student_config {path}: {error.strerror}; a JSON file is expected") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; a JSON file in UTF-8 is expected") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; JSON is expected") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds a {type(settings).__name__}; a JSON object {{…}} is expected")
    return settings


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return type(value) is int and low <= value <= high


def _layers(path: Path | None, settings: dict, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's block for each of the student's."""
    layers = settings.get("layers", "spaced")
    if isinstance(layers, list):
        known = all(_is_int(layer, 0, teacher_layers - 1) for layer in layers)
        if layers and known and layers == sorted(set(layers)):
            if (number := settings.get("num_layers", len(layers))) != len(layers):
                raise UserError(f"{path}: num_layers is {number!r}, but layers lists {len(layers)}: {layers}")
            return tuple(layers)
    number = settings.get("num_layers", teacher_layers)
    if not _is_int(number, 1, teacher_layers):
        raise UserError(f"{path}: num_layers is {number!r}; accepted are whole numbers from 1 to {teacher_layers}")
    if layers == "contiguous":
        return tuple(range(number))
    if layers == "spaced":  # the first and the last block stay
        return tuple(i * (teacher_layers - 1) // max(number - 1, 1) for i in range(number))
    raise UserError(
        f"{path}: layers is {layers!r}; accepted are 'spaced', 'contiguous' or a rising list of the teacher's blocks, "
        f"0 to {teacher_layers - 1}"
    )


def _check_config(path: Path | None, config: dict, teacher: dict) -> None:
    """The student may have fewer layers and heads and a narrower feed-forward; all else is the teacher's."""
    for key, value in config.items():
        if key in REDUCIBLE and not _is_int(value, 1, teacher[key]):
            raise UserError(
                f"{path}: {key} is {value!r}; accepted are whole numbers from 1 to the teacher's {teacher[key]}"
            )
        if key not in REDUCIBLE and value != teacher[key]:
            raise UserError(f"{path}: {key} is {value!r}; it must be as in the teacher, {teacher[key]!r}, or left out")


def check_pixels(source: str, value: object, pixels_per_patch: int) -> int:
    """A picture's height or width, `value`. Raises UserError for what VAE and patches cannot make; names `source`."""
    multiple = math.lcm(PICTURE_MULTIPLE, pixels_per_patch)
    if not _is_int(value, 1) or value % multiple:
        raise UserError(f"{source} is {value!r}; accepted are multiples of {multiple} pixels")
    return value


# ------------------------------------------------------------------------------------------------ building it


def build_student(
    spec: StudentSpec, teacher: WanTransformer3DModel, dtype: torch.dtype
) -> tuple[WanTransformer3DModel, list[InitRow]]:
    """A stock transformer on the teacher's device, its weights copied or cut from the teacher's expert.

    The result shares no memory with `teacher`, which must not be sharded yet and may be of another dtype, or quantised.
    Modules that Diffusers keeps in float32 are in float32 whatever `dtype` is.
    """
    sources = dict(teacher.named_parameters())
    kept = keep_channels(spec, teacher)
    with torch.device("meta"):  # no memory, and any weight left out below would fail at its first use
        student = WanTransformer3DModel(**spec.transformer_config)
    weights, rows = {}, []
    for name, parameter in student.named_parameters():
        source = source_name(name, spec.layers)
        weight = whole = plain(sources[source])
        for dim, channels in enumerate(channels_of(source)):
            if channels in kept:
                weight = weight.index_select(dim, kept[channels])
        weights[name] = weight.to(parameter_dtype(name, dtype), copy=True)
        how = "copied" if parameter.shape == whole.shape else "cut"
        rows.append(InitRow(name, tuple(parameter.shape), source, tuple(whole.shape), how))
    student.load_state_dict(weights, strict=True, assign=True)
    # The rotary table is no weight, so it is computed anew rather than taken from a teacher in half precision.
    config = student.config
    rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    student.rope = rope.to(teacher.device)
    return student, rows


def source_name(name: str, layers: tuple[int, ...]) -> str:
    """The teacher's name for a weight of the student: "blocks.1.x" → "blocks.2.x" where layers[1] is 2."""
    if not name.startswith("blocks."):
        return name
    _, block, rest = name.split(".", 2)
    return f"blocks.{layers[int(block)]}.{rest}"


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 for what Diffusers keeps so when it loads a Wan transformer."""
    return torch.float32 if set(name.split(".")) & set(WanTransformer3DModel._keep_in_fp32_modules) else dtype


# ------------------------------------------------------------------------------------------------ cutting it

# The channels that a layer's rows write and its columns read. Wan has one width for the residual stream, the text, the
# hidden layers of both embedders and all heads together, yet each of them is a space of its own. The time embedding
# scales and shifts the residual stream, so the two share channels; "modulation" is six times the residual stream.
CHANNELS = {
    "patch_embedding": ("residual", None),
    "condition_embedder.time_embedder.linear_1": ("time_hidden", None),
    "condition_embedder.time_embedder.linear_2": ("residual", "time_hidden"),
    "condition_embedder.time_proj": ("modulation", "residual"),
    "condition_embedder.text_embedder.linear_1": ("text_hidden", None),
    "condition_embedder.text_embedder.linear_2": ("text", "text_hidden"),
    "proj_out": (None, "residual"),
}
BLOCK_CHANNELS = {
    "attn1.to_q": ("attn1", "residual"),
    "attn1.to_k": ("attn1", "residual"),
    "attn1.to_v": ("attn1", "residual"),
    "attn1.norm_q": ("attn1",),
    "attn1.norm_k": ("attn1",),
    "attn1.to_out.0": ("residual", "attn1"),
    "norm2": ("residual",),
    "attn2.to_q": ("attn2", "residual"),
    "attn2.to_k": ("attn2", "text"),
    "attn2.to_v": ("attn2", "text"),
    "attn2.norm_q": ("attn2",),
    "attn2.norm_k": ("attn2",),
    "attn2.to_out.0": ("residual", "attn2"),
    "ffn.net.0.proj": ("ffn", "residual"),
    "ffn.net.2": ("residual", "ffn"),
}


def channels_of(name: str) -> tuple[str | None, ...]:
    """What the leading dimensions of a weight run over; heads and feed-forward channels belong to their block."""
    layer, _, kind = name.rpartition(".")
    if name.endswith("scale_shift_table"):
        return (None, None, "residual")  # (1, 6 or 2, residual)
    if not name.startswith("blocks."):
        channels = CHANNELS[layer]
    else:
        _, block, layer = layer.split(".", 2)
        own = ("attn1", "attn2", "ffn")
        channels = tuple(f"blocks.{block}.{c}" if c in own else c for c in BLOCK_CHANNELS[layer])
    return channels if kind == "weight" else channels[:1]


def keep_channels(spec: StudentSpec, teacher: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """For every kind of channel that the student has fewer of: which ones of the teacher's it keeps, rising.

    A channel matters as much as what writes it times what reads it, ‖row‖²·‖column‖² summed over the layers that do
    (each layer relative to its mean channel). For a feed-forward channel that is ‖w_in‖²·‖w_out‖². Attention
    channels are kept by whole heads.
    """
    heads, head_dim = spec.transformer_config["num_attention_heads"], spec.transformer_config["attention_head_dim"]
    teacher_heads = teacher.config.num_attention_heads
    fewer_heads, narrower = heads < teacher_heads, spec.transformer_config["ffn_dim"] < teacher.config.ffn_dim
    if not fewer_heads and not narrower:
        return {}
    kept = {}
    for channels, (written, read) in _strengths(spec, teacher).items():
        if channels.endswith("ffn"):
            if narrower:
                kept[channels] = _largest(written * read, spec.transformer_config["ffn_dim"])
        elif fewer_heads and channels.endswith(("attn1", "attn2")):
            by_head = [strength.unflatten(0, (teacher_heads, head_dim)).sum(1) for strength in (written, read)]
            chosen = _largest(by_head[0] * by_head[1], heads)
            kept[channels] = _offsets(chosen * head_dim, head_dim)
        elif fewer_heads:
            kept[channels] = _largest(written * read, heads * head_dim)
    if fewer_heads:
        residual, width = kept["residual"], teacher_heads * head_dim
        kept["modulation"] = torch.cat([residual + part * width for part in range(6)])
    return kept


def _strengths(spec: StudentSpec, teacher: WanTransformer3DModel) -> dict[str, list[torch.Tensor]]:
    """For every kind of channel, in the blocks that stay: [how strongly each is written, how strongly read]."""
    strengths = defaultdict(lambda: [0, 0])
    for name, weight in _layers_kept(spec, teacher):
        squared = weight.float().square()
        for end, channels in enumerate(channels_of(name)):
            if channels in (None, "modulation"):
                continue
            strength = squared.transpose(0, end).flatten(1).sum(1)  # (channels,)
            strengths[channels][end] = strengths[channels][end] + strength / strength.mean().clamp(min=1e-30)
    return strengths


def _layers_kept(spec: StudentSpec, teacher: WanTransformer3DModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The weight matrices of the teacher that have a place in the student: no biases, norms or tables."""
    for name, weight in teacher.named_parameters():
        block_gone = name.startswith("blocks.") and int(name.split(".")[1]) not in spec.layers
        if name.endswith(".weight") and weight.ndim > 1 and not block_gone:
            yield name, plain(weight)


def _largest(importance: torch.Tensor, number: int) -> torch.Tensor:
    """Indices of the `number` largest, rising; the earlier one of equals, so that every rank cuts alike."""
    return importance.argsort(descending=True, stable=True)[:number].sort().values


def _offsets(starts: torch.Tensor, length: int) -> torch.Tensor:
    """[a, b] → [a, a + 1, …, a + length − 1, b, b + 1, …]."""
    return (starts[:, None] + torch.arange(length, device=starts.device)).flatten()


# ------------------------------------------------------------------------------------------------ saying what was done


def describe_init(rows: list[InitRow]) -> str:
    """A table of where the student's weights come from, with numbers of parameters."""
    parts = defaultdict(list)
    for row in rows:
        parts[row.name.split(".")[0]].append(row)
    table = [("student", "teacher", "copied", "cut", "(cut from)")]
    for part, members in [*parts.items(), ("total", rows)]:
        source = _block_numbers(members) if part == "blocks" else "" if part == "total" else part
        copied = sum(math.prod(row.shape) for row in members if row.how == "copied")
        cut = sum(math.prod(row.shape) for row in members if row.how == "cut")
        whole = sum(math.prod(row.teacher_shape) for row in members if row.how == "cut")
        table.append((part, source, f"{copied:,}", f"{cut:,}", f"({whole:,})"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(_aligned(cells, widths)).rstrip() for cells in table]
    return "\n".join([*lines, "fresh: none; every weight is the teacher's, copied or cut"])


def _block_numbers(rows: list[InitRow]) -> str:
    """ "blocks 0, 2, 5"."""
    return "blocks " + ", ".join(dict.fromkeys(row.source.split(".")[1] for row in rows))


def _aligned(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    """Two columns of words to the left, numbers to the right."""
    return [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
