"""Any Diffusers Wan text-to-video pipeline as one frozen, guided velocity field on one latent frame.

Wan2.2-A14B's two experts, Wan2.1's single transformer, and TI2V-5B, which takes a timestep for every token.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from config.errors import UserError
from models.flow import to_device
from models.folding import MAX_SEQUENCE_LENGTH, fold_text, fold_text_attention, pad_folded

QUANTISED = "quantization_config"  # Diffusers' key
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------- what a teacher is, unloaded


@dataclass(frozen=True)
class TeacherInfo:
    """What a pipeline's config files say. Nothing heavy has been read."""

    name: str  # as the user gave it
    folder: Path
    revision: str | None
    transformer_configs: dict[str, dict]  # "transformer" and, with two experts, "transformer_2"
    boundary_ratio: float | None
    expand_timesteps: bool
    flow_shift: float
    vae_config: dict
    quantised: dict[str, dict] = field(default_factory=dict)  # transformer → its quantization_config, where it has one

    @property
    def vae_scale(self) -> int:
        """Pixels a latent stands for, either way."""
        return self.vae_config.get("scale_factor_spatial") or 8

    @property
    def pixels_per_patch(self) -> int:
        return self.vae_scale * self.transformer_configs["transformer"]["patch_size"][1]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, 1, H, W) of one picture's latents."""
        channels = self.transformer_configs["transformer"]["in_channels"]
        return channels, 1, height // self.vae_scale, width // self.vae_scale


def inspect_teacher(
    name: str, revision: str | None = None, flow_shift: float | None = None, flag: str = "--teacher_path"
) -> TeacherInfo:
    """Read a pipeline's configs, from a local folder or, for a hub id, from the hub (config files only).

    Args:
        flow_shift: instead of the one in the pipeline's scheduler.
        flag: what errors call the thing.

    Raises UserError that says what was found where it is no Wan text-to-video pipeline.
    """
    source = f"{flag} {name}"
    folder = Path(name) if Path(name).is_dir() else _download(name, revision, ["*.json", "tokenizer/*"], source)
    index = _read_json(folder / "model_index.json", source)
    if index.get("_class_name") != "WanPipeline":
        raise UserError(
            f"{source}: a {index.get('_class_name')}, not a WanPipeline (Wan text-to-video in Diffusers "
            "layout, such as Wan-AI/Wan2.2-T2V-A14B-Diffusers)"
        )
    names = [n for n in ("transformer", "transformer_2") if (index.get(n) or [None])[0] is not None]
    configs = {n: _read_json(folder / n / "config.json", source) for n in names}
    for part, config in configs.items():
        if config.get("image_dim") is not None or config["in_channels"] != config["out_channels"]:
            raise UserError(f"{source}: {part} expects a picture as input; a text-to-video one is needed")
    if "transformer" not in configs or ("transformer_2" in configs) != (index.get("boundary_ratio") is not None):
        raise UserError(
            f"{source}: {' and '.join(configs) or 'no transformer'} with boundary_ratio "
            f"{index.get('boundary_ratio')}; needed: transformer alone, or transformer_2 as well with a boundary_ratio"
        )
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", source)
    return TeacherInfo(
        name=name,
        folder=folder,
        revision=revision,
        transformer_configs={n: {k: v for k, v in c.items() if k != QUANTISED} for n, c in configs.items()},
        quantised={n: c[QUANTISED] for n, c in configs.items() if c.get(QUANTISED)},
        boundary_ratio=index.get("boundary_ratio"),
        expand_timesteps=bool(index.get("expand_timesteps")),
        flow_shift=flow_shift or scheduler.get("flow_shift") or scheduler.get("shift") or 1.0,
        vae_config=_read_json(folder / "vae" / "config.json", source),
    )


def check_weights(info: TeacherInfo, flag: str = "--teacher_path") -> None:
    """Raises UserError where a local pipeline's folder holds configs without weights. Nothing heavy is read."""
    if not Path(info.name).is_dir():  # on the hub, and fetched later
        return
    for part in (*info.transformer_configs, "text_encoder", "vae"):
        if not list((info.folder / part).glob("*.safetensors")):
            raise UserError(f"{flag} {info.name}: no weights in {part}; *.safetensors files are needed there")


def download_weights(info: TeacherInfo) -> None:
    """Fetch a hub teacher's weights into the hub's cache; nothing to do for a local folder."""
    if not Path(info.name).is_dir():
        # A snapshot's folder is named by its commit: a branch that has moved on since cannot mix two versions.
        commit = info.folder.name
        _download(info.name, commit, ["*.json", "*.safetensors", "tokenizer/*"], f"the weights of {info.name}")


def _download(name: str, revision: str | None, patterns: list[str], source: str) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{source}: no such folder, and no hub id (owner/name) either") from error
    except (HTTPError, OSError) as error:  # a broken proxy or connection is an HTTPError, all else an OSError too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source}: no such folder, and the hub could not give it ({reason}); "
            "pass a local folder in Diffusers layout, or a hub id while there is a network"
        ) from error


def _read_json(path: Path, source: str) -> dict:
    if path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{source}: {path} is not JSON ({error})") from error
    original = list(path.parent.glob("*.pth")) or _is_wan_model(path.parent / "config.json")
    hint = "an original-format Wan checkpoint; needed: its Diffusers conversion" if original else "not found"
    raise UserError(
        f"{source}: {path.relative_to(path.parents[1])} {hint} "
        "(a folder in Diffusers layout, such as Wan-AI/Wan2.2-T2V-A14B-Diffusers, is needed)"
    )


def _is_wan_model(config: Path) -> bool:
    return config.is_file() and '"WanModel"' in config.read_text(encoding="utf-8", errors="replace")


def resolve_dtype(name: str, device: torch.device, flag: str = "--teacher_dtype") -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 elsewhere. Raises UserError for float16 on a CPU; it names `flag`."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == "float16" and device.type == "cpu":
        raise UserError(f"{flag} float16: a CPU cannot run it; accepted here: auto, float32, bfloat16")
    return DTYPES[name]


# ----------------------------------------------------------------------------------------------- velocity fields


class WanVelocity:
    """One Wan transformer, wrapped for data parallelism or not, as a velocity field in float32.

    Args:
        transformer: reads folded text (`fold_text_attention`).
        expand_timesteps: give it a timestep for every token, as TI2V-5B wants.
        dtype: what latents and text are cast to on the way in.
        autocast: compute in this lower precision while the weights stay in `dtype`.
        device: where it computes; by default where the weights are, which may come there only when they are needed.
    """

    def __init__(
        self,
        transformer: nn.Module,
        expand_timesteps: bool = False,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.transformer, self.expand_timesteps = transformer, expand_timesteps
        self.dtype, self.autocast, self.device = dtype, autocast, device

    def __call__(self, x_t: torch.Tensor, t: float | torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        batch, _, frames, height, width = x_t.shape
        # Not that of x_t where the teacher is kept on the CPU.
        device = self.device or next(self.transformer.parameters()).device
        if isinstance(t, torch.Tensor):
            timestep = to_device(t, device).to(torch.float32).mul(1000).expand(batch)
        else:
            timestep = torch.full((batch,), 1000.0 * t, device=device)
        if self.expand_timesteps:
            timestep = timestep[:, None].expand(batch, frames * (height // 2) * (width // 2))
        latents, text = x_t.to(device, self.dtype), prompt_embeds.to(device, self.dtype)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            v = self.transformer(latents, timestep, text, return_dict=False)[0]
        return v.to(x_t.device, torch.float32)


@dataclass(frozen=True)
class Expert:
    """One of the teacher's transformers and its guidance scale. It is in charge for t >= t_min."""

    field: WanVelocity
    guidance_scale: float
    t_min: float


class Teacher:
    """The pipeline as a guided velocity field: v = v_u + w·(v_c − v_u), with the expert in charge and its w.

    Args:
        experts: highest noise first; the last one has t_min 0.
        negative_embeds: (n, D) embeddings of the negative prompt's real tokens.
    """

    def __init__(self, experts: list[Expert], negative_embeds: torch.Tensor) -> None:
        self.experts = experts
        # Whether every call runs every expert once, also for none of the samples: when experts are sharded, all ranks
        # must run the same forwards, and each has other times.
        self.in_step = False
        mask = torch.ones(1, len(negative_embeds), dtype=torch.bool)
        self.negative_embeds = fold_text(negative_embeds[None], mask)  # (1, n + 4, D + 1)

    @torch.no_grad()
    def __call__(
        self, x_t: torch.Tensor, t: float | torch.Tensor, prompt_embeds: torch.Tensor, expert: int | None = None
    ) -> torch.Tensor:
        """`expert`: the index of the one that is asked whatever t is, instead of the one in charge."""
        if expert is not None:
            return self._guided(self.experts[expert], x_t, t, prompt_embeds)
        return self._by_expert(self._guided, x_t, t, prompt_embeds)

    @torch.no_grad()
    def conditional(self, x_t: torch.Tensor, t: float | torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """The same without guidance."""
        return self._by_expert(lambda expert, *args: expert.field(*args), x_t, t, prompt_embeds)

    def in_charge(self, t: float) -> int:
        """The index of the expert for a time."""
        return next(i for i, expert in enumerate(self.experts) if t >= expert.t_min)

    def _guided(self, expert: Expert, x_t: torch.Tensor, t: float | torch.Tensor, prompt_embeds: torch.Tensor):
        if expert.guidance_scale == 1.0:
            return expert.field(x_t, t, prompt_embeds)
        length = max(prompt_embeds.shape[1], self.negative_embeds.shape[1])
        self.negative_embeds = self.negative_embeds.to(prompt_embeds.device)
        negative = pad_folded(self.negative_embeds, length).expand(len(x_t), -1, -1)
        text = torch.cat([pad_folded(prompt_embeds, length), negative])  # (2B, L, D + 1)
        twice_t = torch.cat([t, t]) if isinstance(t, torch.Tensor) and t.ndim else t
        # Both branches in one forward: half the launches, and a fuller GPU.
        conditional, unconditional = expert.field(torch.cat([x_t, x_t]), twice_t, text).chunk(2)
        return unconditional + expert.guidance_scale * (conditional - unconditional)

    def _by_expert(self, velocity, x_t: torch.Tensor, t: float | torch.Tensor, prompt_embeds: torch.Tensor):
        """`velocity(expert, x_t, t, prompt_embeds)` with the expert in charge of each sample's t."""
        if not isinstance(t, torch.Tensor) or t.ndim == 0:  # one expert for all, and no look at the GPU
            return velocity(self.experts[self.in_charge(t)], x_t, t, prompt_embeds)
        t, out, upper = t.expand(len(x_t)), torch.empty_like(x_t), torch.inf
        for expert in self.experts:
            its_own = ((t >= expert.t_min) & (t < upper)).nonzero()[:, 0]  # where t is on the host, so is the answer
            if len(its_own):
                rows = to_device(its_own, x_t.device)
                out[rows] = velocity(expert, x_t[rows], t[its_own], prompt_embeds[rows]).to(out.dtype)
            elif self.in_step:
                velocity(expert, x_t[:1], t[:1], prompt_embeds[:1])
            upper = expert.t_min
        return out


# ------------------------------------------------------------------------------------------------------- loading


def default_guidance(info: TeacherInfo, high: float | None, low: float | None) -> tuple[float, float]:
    """Guidance scales for high and low noise. Unset: Wan's own, 4 and 3 for two experts, 5 for one.

    As in `WanPipeline`, the second is equal to the first where that alone is given, and a first one of 1 or less turns
    guidance off for both.
    """
    if high is None:
        high, default_low = (4.0, 3.0) if info.boundary_ratio is not None else (5.0, 5.0)
    else:
        default_low = high
    if high <= 1:
        return 1.0, 1.0
    return high, default_low if low is None else low


def load_teacher(
    info: TeacherInfo,
    device: torch.device,
    dtype: torch.dtype,
    negative_embeds: torch.Tensor,
    guidance_scale: float | None = None,
    guidance_scale_2: float | None = None,
) -> Teacher:
    """The frozen experts on `device`. `negative_embeds`: (n, D), from the pipeline's own text encoder."""
    guidance = default_guidance(info, guidance_scale, guidance_scale_2)
    thresholds = (info.boundary_ratio or 0.0, 0.0)
    experts = []
    for part, scale, t_min in zip(info.transformer_configs, guidance, thresholds, strict=False):
        transformer = load_transformer(info.folder, part, dtype)
        if part not in info.quantised:  # its quantiser has put it where it can compute
            transformer.to(device)
        experts.append(Expert(WanVelocity(transformer, info.expand_timesteps, dtype), scale, t_min))
    return Teacher(experts, negative_embeds)


def load_transformer(folder: Path, part: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """One frozen transformer of a pipeline on disk, reading folded text. `part`: transformer or transformer_2."""
    transformer = WanTransformer3DModel.from_pretrained(
        folder, subfolder=part, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=True
    )
    return fold_text_attention(transformer).requires_grad_(False).eval()


def load_text_pipeline(info: TeacherInfo, device: torch.device, dtype: torch.dtype) -> WanPipeline:
    """The pipeline with its text side alone, for its own `encode_prompt`."""
    # transformers keeps a checkpoint's dtype unless told otherwise; Diffusers does not. Both are told.
    text_encoder = UMT5EncoderModel.from_pretrained(info.folder / "text_encoder", dtype=dtype, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(info.folder / "tokenizer", trust_remote_code=False)
    text_encoder = text_encoder.to(device).eval()
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=None, transformer=None, transformer_2=None
    )


@torch.no_grad()
def encode_text(pipeline: WanPipeline, prompts: list[str]) -> list[torch.Tensor]:
    """Embeddings of each prompt's real tokens, (n, D) on the CPU, by the pipeline's own `encode_prompt`."""
    # encode_prompt gives no lengths; they are the tokenizer's, asked as it asks.
    cleaned = [prompt_clean(p) for p in prompts]
    tokens = pipeline.tokenizer(cleaned, truncation=True, max_length=MAX_SEQUENCE_LENGTH, add_special_tokens=True)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    # The encoder is told which tokens are padding, so less of it gives the same, many times faster.
    embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=max(lengths))
    return [e[:length].cpu() for e, length in zip(embeds, lengths, strict=True)]
