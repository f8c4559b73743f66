"""How the embedded teacher's weights were made; running it makes them again.

    python -m models.tiny_wan                 # from nothing; stop it at any time, the same command goes on
    python -m models.tiny_wan --measure       # how well the VAE in models/tiny_wan gives pictures back
    python benchmarks/quality.py --guidance_scale_2 2   # how many captions the whole pipeline draws right

It is Wan2.2-T2V-A14B in small: a causal video VAE, a UMT5 text encoder and two experts, trained on drawn scenes
(`data/scenes.py`). First the VAE; then the text encoder learns to read captions; then one transformer together with
it over all t; then two copies of that, each in its own range of noise, with the text encoder frozen.
"""

import argparse
import json
import math
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from data.scenes import (
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    PLACES,
    RADII,
    RELATIONS,
    SHAPES,
    Scene,
    draw,
    random_scenes,
)
from models.flow import add_noise, shift_time
from models.folding import MAX_SEQUENCE_LENGTH, fold_text, fold_text_attention, fold_time

HOME = Path(__file__).parent / "tiny_wan"
BOUNDARY_RATIO = 0.875  # Wan2.2-A14B's
FLOW_SHIFT = 3.0  # what Wan2.2-A14B's Diffusers conversion carries
VAE = dict(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
TEXT_ENCODER = dict(d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0)
TRANSFORMER = dict(
    num_attention_heads=4, attention_head_dim=48, ffn_dim=640, num_layers=6, freq_dim=128, text_dim=128,
    in_channels=16, out_channels=16,
)  # fmt: skip
STEPS = dict(vae=3000, vae_edges=6000, vae_smooth=2500, decoder=4000, text=600, base=12000, high=3000, low=16000)
BANK = 80_000  # pictures whose latents the transformers learn from
CAPTION_DROPOUT = 0.15
PADDING_GROWS = 0.3  # of the steps over all t
LOGIT_MIDDLE = 0.4  # logit of t = .6


# --------------------------------------------------------------------------------------------- parts, untrained


def build_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer with one piece a word of the scenes' language, and single characters for anything else."""
    phrases = ["a on background", *RADII, *COLOURS, *BACKGROUNDS, *SHAPES, *RELATIONS, *PLACES]
    words = sorted({word for phrase in phrases for word in phrase.split()})
    characters = [chr(c) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -1.0) for word in words if word != "a"]
    vocab += [("▁a", -1.0)] + [(c, -10.0) for c in characters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def build_text_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT_ENCODER))


def build_transformer() -> WanTransformer3DModel:
    """A transformer that reads folded text; saved, it is a stock one."""
    return fold_text_attention(WanTransformer3DModel(**TRANSFORMER))


def build_vae() -> AutoencoderKLWan:
    """A VAE whose convolutions see one frame. Their past, which no picture has, is zero rather than random."""
    vae = fold_time(AutoencoderKLWan(**VAE))
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
            module.weight.data[:, :, :-1] = 0
    return vae


# --------------------------------------------------------------------------------------------- one training loop


def train(
    name: str,
    modules: dict[str, nn.Module],
    loss: Callable[[int, torch.Generator], torch.Tensor],
    steps: int,
    learning_rate: float,
    work: Path,
    ema_decay: float = 0.999,
) -> None:
    """AdamW with warm-up, cosine and EMA; leaves the EMA weights in `modules` and in `work/<name>.safetensors`.

    Randomness hangs on name and step alone, so a run that is stopped and started again goes on as if it had not been.
    """
    finished, running = work / f"{name}.safetensors", work / f"{name}.running.safetensors"
    parameters = {f"{m}.{k}": p for m, module in modules.items() for k, p in module.named_parameters()}
    if finished.exists():
        load_into(parameters, load_file(finished))
        print(f"{name}: taken from {finished}")
        return
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {k: p.detach().clone() for k, p in parameters.items()}
    start = 0
    if running.exists():
        start = restore(running, parameters, ema, optimizer)
    for module in modules.values():
        module.train()
    first_seed = zlib.crc32(name.encode()) * 1_000_000  # no stage draws another's noise again
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5)
    for step in bar:
        warmup, cosine = min(1.0, (step + 1) / 200), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * warmup * max(cosine, 0.01)
        value = loss(step, torch.Generator().manual_seed(first_seed + step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        if (step + 1) % 500 == 0 and step + 1 < steps:
            save(running, parameters, ema, optimizer, step + 1)
    load_into(parameters, ema)
    save_atomically({k: p.detach().contiguous() for k, p in parameters.items()}, finished)
    running.unlink(missing_ok=True)


def load_into(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(values[key])


def save_atomically(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def save(path: Path, parameters: dict, ema: dict, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {"step": torch.tensor(step)}
    for key, parameter in parameters.items():
        tensors |= {f"raw/{key}": parameter.detach().contiguous(), f"ema/{key}": ema[key].contiguous()}
        tensors |= {f"{slot}/{key}": value for slot, value in optimizer.state[parameter].items()}
    save_atomically(tensors, path)


def restore(path: Path, parameters: dict, ema: dict, optimizer: torch.optim.Optimizer) -> int:
    tensors = load_file(path)
    load_into(parameters, {k: tensors[f"raw/{k}"] for k in parameters})
    for key, parameter in parameters.items():
        ema[key].copy_(tensors[f"ema/{key}"])
        if f"exp_avg/{key}" in tensors:
            slots = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {slot: tensors[f"{slot}/{key}"] for slot in slots}
    return int(tensors["step"])


# ---------------------------------------------------------------------------------------------------- the trainings


def scene_bank(seed: int, count: int, work: Path) -> tuple[np.ndarray, list[Scene]]:
    """`count` drawn training scenes, none held out: pictures (N, H, W, 3) uint8, and what they show."""
    scenes = random_scenes(count, seed, held_out=False, distinct=False)
    path = work / "pictures.npy"
    if not path.exists():
        rng = random.Random(seed)
        pictures = np.stack([np.asarray(draw(s, rng)) for s in tqdm(scenes, desc="drawing", mininterval=5)])
        np.save(path.with_suffix(".tmp.npy"), pictures)
        path.with_suffix(".tmp.npy").replace(path)
    return np.load(path, mmap_mode="r"), scenes


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 → (B, 3, 1, H, W) in [−1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def train_vae(vae: AutoencoderKLWan, pictures: np.ndarray, steps: dict[str, int], work: Path) -> None:
    """Reconstruction, and a light pull of the latents towards a unit Gaussian.

    First absolute error in larger batches, for colours and places; then squared error in small ones, for sharp edges;
    then a stronger pull: latents that say less than they could are easier to learn, and a decoder that has seen them
    noisy forgives a transformer's errors. At last the decoder alone, on latents with all, some or none of their noise.
    """

    def loss(batch_size: int, absolute: float, squared: float, pull: float, frozen_encoder: bool = False):
        def evaluate(step: int, generator: torch.Generator) -> torch.Tensor:
            indices = torch.randint(len(pictures), (batch_size,), generator=generator).sort().values
            x = to_tensor(pictures[indices.numpy()])
            with torch.set_grad_enabled(not frozen_encoder):
                posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            if frozen_encoder:
                noise *= torch.rand(batch_size, 1, 1, 1, 1, generator=generator)
            error = vae.decode(posterior.mean + posterior.std * noise).sample - x
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            return absolute * error.abs().mean() + squared * error.square().mean() + pull * kl

        return evaluate

    train("vae", {"vae": vae}, loss(16, 1.0, 1.0, 5e-4), steps["vae"], 1.5e-3, work, ema_decay=0.995)
    train("vae_edges", {"vae": vae}, loss(6, 0.2, 5.0, 2e-4), steps["vae_edges"], 1.2e-3, work, ema_decay=0.998)
    train("vae_smooth", {"vae": vae}, loss(6, 0.2, 5.0, 4e-3), steps["vae_smooth"], 8e-4, work, ema_decay=0.998)
    decoder = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    train("decoder", decoder, loss(6, 0.2, 5.0, 0, True), steps["decoder"], 8e-4, work, ema_decay=0.998)


LABELS = (tuple(RADII), COLOURS, SHAPES, (*PLACES, *RELATIONS))  # of a thing: size, colour, shape, place


def thing_labels(scene: Scene) -> list[tuple[int, list[int]]]:
    """What the text encoder is asked: (position of a word that describes a thing, that thing's labels), word by word.

    A thing's labels are its size, colour, shape, and its place: one of nine alone, one of four sides beside another.
    """
    described = [(1, scene.things[0], scene.where)]  # position of its size's word, the thing, its place
    if len(scene.things) == 2:  # "a small red star · left of · a large blue ring"
        described.append((5 + len(scene.where.split()), scene.things[1], OPPOSITE[scene.where]))
    labels = []
    for start, thing, place in described:
        values = (thing.size, thing.colour, thing.shape, place)
        about = [known.index(value) for known, value in zip(LABELS, values, strict=True)]
        labels += [(start + word, about) for word in range(3)]
    return labels


def train_text_encoder(
    text_encoder: UMT5EncoderModel, tokens: dict[str, torch.Tensor], scenes: list[Scene], steps: int, work: Path
) -> None:
    """Reading, before drawing: each word about a thing learns to tell size, colour, shape and place of that thing.

    A real teacher's UMT5 has read before, too. Left to the pictures alone, this small one never learnt which of two
    things is to be on the left.
    """
    sizes = [len(known) for known in LABELS]
    heads = nn.Linear(text_encoder.config.d_model, sum(sizes))

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        indices = torch.randint(len(scenes), (128,), generator=generator)
        text = text_encoder(tokens["input_ids"][indices], tokens["attention_mask"][indices]).last_hidden_state
        asked = [(row, word, about) for row, i in enumerate(indices) for word, about in thing_labels(scenes[i])]
        rows, words, labels = (torch.tensor(column) for column in zip(*asked, strict=True))
        answers = heads(text[rows, words]).split(sizes, dim=1)
        return sum(F.cross_entropy(answer, labels[:, k]) for k, answer in enumerate(answers))

    train("text", {"text_encoder": text_encoder, "heads": heads}, loss, steps, 1e-3, work)


@torch.no_grad()
def latent_bank(vae: AutoencoderKLWan, pictures: np.ndarray, work: Path) -> torch.Tensor:
    """Latents of all pictures, (N, 16, 1, 8, 8), normalised; sets the VAE's `latents_mean` and `latents_std`.

    The spread counts the encoder's own uncertainty, so that a channel which says nothing stays small instead of being
    blown up to the size of those that matter.
    """
    path = work / "latents.safetensors"
    vae.eval()
    if not path.exists():
        means, variances = [], []
        for i in tqdm(range(0, len(pictures), 64), desc="latents", mininterval=5):
            posterior = vae.encode(to_tensor(pictures[i : i + 64])).latent_dist
            means.append(posterior.mean)
            variances.append(posterior.var.mean((0, 2, 3, 4)))
        uncertainty = torch.stack(variances).mean(0)  # (16,)
        save_atomically({"latents": torch.cat(means).contiguous(), "uncertainty": uncertainty}, path)
    bank = load_file(path)
    latents = bank["latents"]
    mean, std = latents.mean((0, 2, 3, 4)), (latents.var((0, 2, 3, 4)) + bank["uncertainty"]).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def noise_levels(u: torch.Tensor, t_range: tuple[float, float]) -> torch.Tensor:
    """Times t in `t_range` for u, (B,), uniform in [0, 1].

    Logit-normal (Esser et al. 2024, eq. 19), its middle at t = .6: shapes are decided between .4 and .8. Near pure
    noise, where that falls to nothing, as a grid of shift FLOW_SHIFT is spread.
    """
    low, high = (torch.tensor(t, dtype=torch.float64) for t in t_range)
    if t_range[1] == 1 and t_range[0] > 0.5:
        ends = [t / (FLOW_SHIFT - (FLOW_SHIFT - 1) * t) for t in (low, high)]  # shift_time, inverted
        return shift_time(ends[0] + (ends[1] - ends[0]) * u, FLOW_SHIFT).float()
    ends = [torch.special.ndtr(torch.logit(t) - LOGIT_MIDDLE) for t in (low, high)]
    return torch.sigmoid(torch.special.ndtri(ends[0] + (ends[1] - ends[0]) * u) + LOGIT_MIDDLE).float()


def train_transformer(
    name: str,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    tokens: dict[str, torch.Tensor],
    latents: torch.Tensor,
    t_range: tuple[float, float],
    steps: int,
    learning_rate: float,
    work: Path,
    with_text_encoder: bool,
) -> None:
    """Flow matching on the bank for t in `t_range`.

    Where the text encoder is trained too, the padding grows from almost none to its full length over the first
    PADDING_GROWS of the steps: at full length 19 of 20 positions are padding, and the words would hardly be heard.
    """
    modules = {"transformer": transformer} | ({"text_encoder": text_encoder} if with_text_encoder else {})

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        indices = torch.randint(len(latents), (64,), generator=generator)
        dropped = torch.rand(64, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], tokens["empty_ids"], tokens["input_ids"][indices])
        mask = torch.where(dropped[:, None], tokens["empty_mask"], tokens["attention_mask"][indices])
        with torch.set_grad_enabled(with_text_encoder):
            text = text_encoder(ids, mask).last_hidden_state
        grown = min(1.0, step / (PADDING_GROWS * steps)) if with_text_encoder else 1.0
        embeds = fold_text(text, mask.bool(), text.shape[1] + (MAX_SEQUENCE_LENGTH - text.shape[1]) ** grown)
        x0, noise = latents[indices], torch.randn(latents[indices].shape, generator=generator)
        # Stratified: the batch's times are spread evenly, which makes the loss and its gradient less noisy.
        t = noise_levels((torch.arange(64) + torch.rand(64, generator=generator)) / 64, t_range)
        v = transformer(add_noise(x0, noise, t), 1000 * t, embeds, return_dict=False)[0]
        return F.mse_loss(v, noise - x0)

    transformer.compile()  # a fifth faster; in place, and saved weights keep their names
    train(name, modules, loss, steps, learning_rate, work)


def tokenize(tokenizer: T5TokenizerFast, captions: list[str]) -> dict[str, torch.Tensor]:
    """Ids and masks of the captions, (N, L), and of the empty caption, (L,), all as short as the longest allows."""
    tokens = tokenizer(["", *captions], padding="longest", return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    return {"empty_ids": ids[0], "empty_mask": mask[0], "input_ids": ids[1:], "attention_mask": mask[1:]}


def make(output: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    """All stages, each skipped when its result is in `work`, and the pipeline in `output`."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder, vae, transformer = build_text_encoder(tokenizer), build_vae(), build_transformer()
    pictures, scenes = scene_bank(seed, BANK, work)
    train_vae(vae, pictures, steps, work)
    latents, tokens = latent_bank(vae, pictures, work), tokenize(tokenizer, [scene.caption for scene in scenes])
    train_text_encoder(text_encoder, tokens, scenes, steps["text"], work)
    shared = (text_encoder, tokens, latents)
    train_transformer("base", transformer, *shared, (0.0, 1.0), steps["base"], 1.5e-3, work, with_text_encoder=True)
    text_encoder.requires_grad_(False).eval()
    experts = {}
    for name, t_range in {"high": (BOUNDARY_RATIO, 1.0), "low": (0.0, BOUNDARY_RATIO)}.items():
        experts[name] = build_transformer()
        experts[name].load_state_dict(transformer.state_dict())
        train_transformer(name, experts[name], *shared, t_range, steps[name], 1e-3, work, with_text_encoder=False)
    assemble(output, tokenizer, text_encoder, vae, experts["high"], experts["low"])


def assemble(output: Path, tokenizer, text_encoder, vae, high, low) -> None:
    """A stock pipeline on disk. The large parts are stored in half precision; Diffusers loads them in float32."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.half().eval(),
        scheduler=scheduler,
        transformer=high.half().eval(),
        transformer_2=low.half().eval(),
        boundary_ratio=BOUNDARY_RATIO,
    ).save_pretrained(output)
    print(f"wrote {output}")


@torch.no_grad()
def measure_vae(folder: Path, count: int = 256, seed: int = 1_000_003) -> float:
    """PSNR in dB over `count` pictures that no training has seen, from the mean squared error of all their pixels."""
    vae = fold_time(AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)).eval()
    rng = random.Random(seed)
    scenes = random_scenes(count, seed, held_out=True)
    pictures = to_tensor(np.stack([np.asarray(draw(scene, rng)) for scene in scenes]))
    errors = [(vae.decode(vae.encode(x).latent_dist.mean).sample - x).square().mean() for x in pictures.split(32)]
    return 10 * math.log10(4 / torch.stack(errors).mean().item())  # pixels span 2, from −1 to 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=HOME, help="the pipeline's folder (models/tiny_wan)")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/tiny_wan_making"), help="finished and running stages"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=json.loads, default={}, help="e.g. '{\"vae\": 3000}'")
    parser.add_argument("--measure", action="store_true", help="only measure the VAE in --output")
    args = parser.parse_args()
    if args.measure:
        print(f"VAE reconstruction of held-out scenes: {measure_vae(args.output):.1f} dB PSNR")
        return
    make(args.output, args.work, STEPS | args.steps, args.seed)


if __name__ == "__main__":
    main()
