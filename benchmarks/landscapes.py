"""Another teacher in the same layout, of other pictures: recipes must not be fitted to the embedded one's scenes.

    python benchmarks/landscapes.py            # writes a teacher, prompts and a student config to outputs/landscapes

Plains, hills or mountains under a sky with a sun or a moon, drawn and trained on in 20 minutes on two cores, by the
code that made the embedded teacher: its VAE, a text encoder and tokenizer of their own, and two smaller experts.
docs/quality.md says how to distil it.
"""

import argparse
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file: this folder, where this file would hide other packages, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from benchmarks.arguments import at_least_one
from data.scenes import PALETTE
from models.folding import fold_text_attention, fold_time
from models.tiny_wan import (
    BOUNDARY_RATIO,
    HOME,
    TEXT_ENCODER,
    TRANSFORMER,
    assemble,
    latent_bank,
    tokenize,
    train,
    train_transformer,
)

SIZE, SCALE = 64, 4  # pixels; drawn so many times as large, and shrunk
# Colours that the VAE knows: it has seen no others, and turns them into these.
SKIES = {name: PALETTE[name] for name in ("blue", "pink", "gray", "black")}
GROUNDS = {name: PALETTE[name] for name in ("green", "red", "yellow", "purple")}
RIDGES = {"plains": 0.02, "hills": 0.1, "mountains": 0.2}  # height of the waves, as a share of the picture
DISCS = {"sun": PALETTE["orange"], "moon": PALETTE["white"]}
DISC_SIZES = {"small": 0.1, "large": 0.15}  # radius, likewise
PLACES = {"on the left": 0.2, "in the middle": 0.5, "on the right": 0.8}
HEIGHTS = {"low": 0.4, "high": 0.2}
TRANSFORMER_HERE = TRANSFORMER | {"num_attention_heads": 3, "ffn_dim": 448, "num_layers": 4}
STEPS = {"text": 300, "base": 4000, "high": 1200, "low": 2400}
BANK, HELD_OUT = 24_000, 352


class Landscape(NamedTuple):
    ground: str
    ridge: str
    sky: str
    size: str
    disc: str
    height: str
    place: str

    @property
    def caption(self) -> str:
        disc = f"{self.size} {self.disc} {self.height} {self.place}"
        return f"{self.ground} {self.ridge} under a {self.sky} sky with a {disc}"


KNOWN = (GROUNDS, RIDGES, SKIES, DISC_SIZES, DISCS, HEIGHTS, PLACES)  # values of a landscape's fields


def all_landscapes() -> list[Landscape]:
    """Each one there is, in an order of no meaning."""
    every = [Landscape(*values) for values in itertools.product(*KNOWN)]
    random.Random(0).shuffle(every)
    return every


def draw(landscape: Landscape, rng: random.Random) -> Image.Image:
    """One of many pictures that a caption fits: places, waves and colours vary."""
    side = SIZE * SCALE
    sky, ground = (
        tuple(min(255, max(0, c + rng.randint(-7, 7))) for c in colour)
        for colour in (SKIES[landscape.sky], GROUNDS[landscape.ground])
    )
    picture = Image.new("RGB", (side, side), sky)
    pen = ImageDraw.Draw(picture)
    x = (PLACES[landscape.place] + rng.uniform(-0.06, 0.06)) * side
    y = (HEIGHTS[landscape.height] + rng.uniform(-0.03, 0.03)) * side
    radius = DISC_SIZES[landscape.size] * rng.uniform(0.9, 1.1) * side
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=DISCS[landscape.disc])
    waves = [(rng.uniform(0.6, 1.0), k, rng.uniform(0, 2 * math.pi)) for k in (1, 2.5)]
    points = []
    for column in range(0, side + 1, SCALE):
        u = 2 * math.pi * column / side
        wave = sum(a * wave_at(landscape.ridge, k * u + phase) / k for a, k, phase in waves) / 1.4
        points.append((column, (0.72 - RIDGES[landscape.ridge] * wave) * side))
    pen.polygon([(0, side), *points, (side, side)], fill=ground)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def wave_at(ridge: str, phase: float) -> float:
    """−1 to 1: round, or with peaks for mountains."""
    return 2 / math.pi * math.asin(math.sin(phase)) if ridge == "mountains" else math.sin(phase)


# ------------------------------------------------------------------------------------------------ the teacher


def build_tokenizer() -> T5TokenizerFast:
    words = sorted({word for landscape in all_landscapes() for word in landscape.caption.split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def train_text_encoder(
    text_encoder: UMT5EncoderModel, tokens: dict[str, torch.Tensor], captions: list[Landscape], work: Path
) -> None:
    """Each word learns to tell all that its caption says, as in models/tiny_wan.py."""
    heads = nn.Linear(text_encoder.config.d_model, sum(map(len, KNOWN)))
    values = [[list(known).index(v) for known, v in zip(KNOWN, c, strict=True)] for c in captions]
    labels = torch.tensor(values)  # (N, fields)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(captions), (64,), generator=generator)
        mask = tokens["attention_mask"][rows]
        text = text_encoder(tokens["input_ids"][rows], mask).last_hidden_state  # (64, L, D)
        asked, words = mask.bool().nonzero(as_tuple=True)
        answers = heads(text[asked, words]).split([len(known) for known in KNOWN], dim=1)
        return sum(F.cross_entropy(answer, labels[rows[asked], k]) for k, answer in enumerate(answers))

    train("text", {"text_encoder": text_encoder, "heads": heads}, loss, STEPS["text"], 1e-3, work)


def drawn(landscapes: list[Landscape], work: Path) -> np.ndarray:
    """A picture of each, (N, H, W, 3) uint8."""
    path = work / f"pictures_{len(landscapes)}.npy"
    if not path.exists():
        rng = random.Random(1)
        np.save(path, np.stack([np.asarray(draw(one, rng)) for one in tqdm(landscapes, desc="drawing")]))
    return np.load(path, mmap_mode="r")


def make(output: Path, bank: int) -> None:
    """All stages, each skipped where its result is there already."""
    work = output / "making"
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    every = all_landscapes()
    held_out, known = every[:HELD_OUT], every[HELD_OUT:]
    shown = [known[i % len(known)] for i in range(bank)]
    vae = fold_time(AutoencoderKLWan.from_pretrained(HOME, subfolder="vae", torch_dtype=torch.float32))
    latents = latent_bank(vae, drawn(shown, work), work)
    tokenizer = build_tokenizer()
    tokens = tokenize(tokenizer, [landscape.caption for landscape in shown])
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT_ENCODER))
    train_text_encoder(text_encoder, tokens, shown, work)
    base = fold_text_attention(WanTransformer3DModel(**TRANSFORMER_HERE))
    shared = (text_encoder, tokens, latents)
    train_transformer("base", base, *shared, (0.0, 1.0), STEPS["base"], 1.5e-3, work, with_text_encoder=True)
    text_encoder.requires_grad_(False).eval()
    experts = []
    for name, t_range in {"high": (BOUNDARY_RATIO, 1.0), "low": (0.0, BOUNDARY_RATIO)}.items():
        experts.append(fold_text_attention(WanTransformer3DModel(**TRANSFORMER_HERE)))
        experts[-1].load_state_dict(base.state_dict())
        train_transformer(name, experts[-1], *shared, t_range, STEPS[name], 1e-3, work, with_text_encoder=False)
    assemble(output / "teacher", tokenizer, text_encoder, vae, *experts)
    for name, landscapes in {"prompts": known, "held_out": held_out, "sample_prompts": held_out[:8]}.items():
        (output / f"{name}.txt").write_text("".join(f"{one.caption}\n" for one in landscapes))
    (output / "student.json").write_text(json.dumps({"height": SIZE, "width": SIZE}) + "\n")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("outputs/landscapes"))
    parser.add_argument("--bank", type=at_least_one, default=BANK, help=f"pictures to learn from ({BANK})")
    args = parser.parse_args(argv)
    make(args.output, args.bank)


if __name__ == "__main__":
    main(sys.argv[1:])
