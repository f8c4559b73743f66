"""Captioned drawn scenes: the embedded teacher's world, and the reader that turns a picture back into its caption.

A scene is one or two coloured shapes on a plain background. `draw` renders it with jitter in position, size,
rotation and colour, so one caption has many right pictures. `read` goes the other way and is the project's honest
yardstick: it names what it sees, or says why it cannot.

    python -m data.scenes --write data/scene_prompts.txt --count 3000     # training captions, no held-out ones
    python -m data.scenes --check                                         # how often the reader is right
"""

import argparse
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

SIZE = 64  # pixels, height and width
OVERSAMPLING = 4  # drawn at 256×256, averaged down: anti-aliased edges

PALETTE = {
    "red": (215, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 215),
    "purple": (140, 60, 175),
    "white": (248, 248, 248),
    "black": (18, 18, 20),
    "gray": (128, 128, 132),
    "pink": (250, 175, 195),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUNDS = ("white", "black", "gray", "pink", "yellow", "blue")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"small": (7.5, 9.0), "large": (11.5, 13.5)}  # pixels
SIZE_THRESHOLD = 10.25
REACH = 1.12  # no shape reaches farther from its centre than this many radii
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PLACES = {
    "in the top left": (0, 0),
    "at the top": (1, 0),
    "in the top right": (2, 0),
    "on the left": (0, 1),
    "in the middle": (1, 1),
    "on the right": (2, 1),
    "in the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "in the bottom right": (2, 2),
}
PLACE_CENTRES = (19.0, 32.0, 45.0)  # pixels, either axis
JITTER = 2.5  # pixels, position within a place

# Combinations that no training picture or caption holds. The parts of each are common in training; together they
# are new, so a held-out caption asks whether the teacher has learnt to compose.
HELD_OUT_ON_BACKGROUND = frozenset(  # (colour, shape, background)
    {
        ("red", "star", "yellow"),
        ("red", "circle", "white"),
        ("orange", "cross", "gray"),
        ("orange", "triangle", "blue"),
        ("yellow", "ring", "black"),
        ("yellow", "square", "pink"),
        ("green", "triangle", "pink"),
        ("green", "star", "white"),
        ("blue", "ring", "yellow"),
        ("blue", "square", "gray"),
        ("purple", "circle", "pink"),
        ("purple", "cross", "yellow"),
        ("white", "star", "blue"),
        ("white", "triangle", "black"),
        ("black", "ring", "white"),
        ("black", "circle", "gray"),
    }
)
HELD_OUT_PAIRS = frozenset(  # (shape, relation, shape), also read from the other side
    {
        ("star", "left of", "ring"),
        ("cross", "above", "circle"),
        ("triangle", "left of", "square"),
        ("ring", "above", "triangle"),
        ("circle", "left of", "star"),
        ("square", "above", "cross"),
    }
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One shape: its size ("small", "large"), colour and kind."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing and its place, or two things and how the first lies to the second, on a background."""

    things: tuple[Thing, ...]
    where: str
    background: str

    @property
    def caption(self) -> str:
        ground = f"on a {self.background} background"
        if len(self.things) == 1:
            return f"{self.things[0]} {self.where} {ground}"
        return f"{self.things[0]} {self.where} {self.things[1]} {ground}"

    @property
    def canonical(self) -> "Scene":
        """The same scene told with "left of" or "above": the two captions of a pair mean one picture."""
        if len(self.things) == 2 and self.where in ("right of", "below"):
            return Scene(self.things[::-1], OPPOSITE[self.where], self.background)
        return self

    @property
    def held_out(self) -> bool:
        """True when the scene holds a combination that training never sees."""
        if any((t.colour, t.shape, self.background) in HELD_OUT_ON_BACKGROUND for t in self.things):
            return True
        if len(self.things) == 1:
            return False
        told = self.canonical
        return (told.things[0].shape, told.where, told.things[1].shape) in HELD_OUT_PAIRS


_THING = r"a (small|large) (\w+) (\w+)"
_ONE = re.compile(rf"{_THING} ({'|'.join(PLACES)}) on a (\w+) background")
_TWO = re.compile(rf"{_THING} ({'|'.join(RELATIONS)}) {_THING} on a (\w+) background")


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes. Raises ValueError for text that is no caption of this world."""
    if match := _ONE.fullmatch(caption):
        size, colour, shape, where, background = match.groups()
        things = (Thing(size, colour, shape),)
    elif match := _TWO.fullmatch(caption):
        parts = match.groups()
        things, where, background = (Thing(*parts[:3]), Thing(*parts[4:7])), parts[3], parts[7]
    else:
        raise ValueError(f"not a scene caption: {caption!r}; one looks like {random_scene(random.Random(0)).caption!r}")
    known = background in BACKGROUNDS and all(t.colour in COLOURS and t.shape in SHAPES for t in things)
    if not known or len({background, *(t.colour for t in things)}) != len(things) + 1:
        raise ValueError(f"not a scene caption: {caption!r}; unknown word, or two things of one colour")
    return Scene(things, where, background)


def random_scene(rng: random.Random) -> Scene:
    """Any scene of this world: one thing a third of the time, else two. All colours in a scene differ."""
    background = rng.choice(BACKGROUNDS)
    colours = rng.sample([c for c in COLOURS if c != background], 2)
    things = tuple(Thing(rng.choice(tuple(RADII)), c, rng.choice(SHAPES)) for c in colours)
    if rng.random() < 1 / 3:
        return Scene(things[:1], rng.choice(tuple(PLACES)), background)
    return Scene(things, rng.choice(tuple(RELATIONS)), background)


def random_scenes(count: int, seed: int, held_out: bool, distinct: bool = True) -> list[Scene]:
    """`count` scenes, all held out or none of them; with `distinct`, no caption twice."""
    rng, scenes, seen = random.Random(seed), [], set()
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene.held_out == held_out and not (distinct and scene.caption in seen):
            seen.add(scene.caption)
            scenes.append(scene)
    return scenes


# ---------------------------------------------------------------------------------------------- drawing


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1 around the origin, y downwards, upright."""
    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    if shape == "triangle":
        return [(REACH * math.sin(a), -REACH * math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    if shape == "star":
        radii = (REACH, 0.46)
        return [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]
    if shape == "cross":
        a, b = 0.34, 1.04
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    raise ValueError(f"{shape!r} is not a polygon")


def coverage(shape: str, centre: tuple[float, float], radius: float, angle: float = 0.0) -> np.ndarray:
    """Share of each pixel that the shape covers: (SIZE, SIZE) in [0, 1]. Centre and radius in pixels, angle in radians."""
    scale = OVERSAMPLING
    canvas = Image.new("L", (SIZE * scale, SIZE * scale))
    pen = ImageDraw.Draw(canvas)
    x, y, r = centre[0] * scale, centre[1] * scale, radius * scale
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            pen.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=0)
    else:
        cos, sin = math.cos(angle), math.sin(angle)
        pen.polygon([(x + r * (u * cos - v * sin), y + r * (u * sin + v * cos)) for u, v in _polygon(shape)], fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255


def _centres(scene: Scene, radii: list[float], rng: random.Random) -> list[tuple[float, float]]:
    if len(scene.things) == 1:
        column, row = PLACES[scene.where]
        jitter = [rng.uniform(-JITTER, JITTER) for _ in range(2)]
        return [(PLACE_CENTRES[column] + jitter[0], PLACE_CENTRES[row] + jitter[1])]
    reach = [r * REACH for r in radii]
    dx, dy = RELATIONS[scene.where]
    order = (0, 1) if dx + dy < 0 else (1, 0)  # which thing comes first along the axis
    first, second = reach[order[0]], reach[order[1]]
    slack = SIZE - 2 * (first + second) - 2  # pixels to share out before, between and after the two
    cuts = sorted(rng.uniform(0, max(slack, 0.0)) for _ in range(2))
    along = {order[0]: 1 + first + cuts[0], order[1]: 1 + 2 * first + second + cuts[1]}
    # Across the axis the two may differ by up to half their distance, so that the relation stays plain.
    distance = along[order[1]] - along[order[0]]
    low = [r + 1 for r in reach]
    across = [rng.uniform(low[0], SIZE - low[0])]
    nearest, farthest = across[0] - distance / 2, across[0] + distance / 2
    across.append(rng.uniform(max(low[1], nearest), min(SIZE - low[1], farthest)))
    points = [(along[i], across[i]) for i in range(2)]
    return points if dx else [(b, a) for a, b in points]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """One picture of the scene, with jitter from `rng`: RGB, SIZE × SIZE."""

    def shade(name: str) -> np.ndarray:
        return np.clip([c + rng.uniform(-7, 7) for c in PALETTE[name]], 0, 255)

    pixels = np.broadcast_to(shade(scene.background), (SIZE, SIZE, 3))  # (H, W, 3)
    radii = [rng.uniform(*RADII[t.size]) for t in scene.things]
    for thing, radius, centre in zip(scene.things, radii, _centres(scene, radii, rng), strict=True):
        cover = coverage(thing.shape, centre, radius, math.radians(rng.uniform(-9, 9)))[..., None]
        pixels = pixels * (1 - cover) + shade(thing.colour) * cover
    return Image.fromarray(np.round(pixels).astype(np.uint8))
