"""Captioned drawn scenes: the embedded teacher's world, and the reader that turns a picture back into its caption.

A scene is one or two coloured shapes on a plain background. `draw` renders it with jitter in position, size,
rotation and colour, so one caption has many right pictures. `read` goes the other way and is the project's honest
yardstick: it names what it sees, or says why it cannot.

    python -m data.scenes --write data/scene_prompts.txt --count 3000     # training captions, no held-out ones
    python -m data.scenes --check                                         # how often the reader is right
"""

import argparse
import io
import math
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, lru_cache
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
RADII = {"small": (8.0, 9.0), "large": (12.0, 13.5)}  # pixels
SIZE_THRESHOLD = 10.25
HOLE = 0.5  # a ring's, in its radii: a thinner band would be narrower than the VAE can keep clean
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
PAIR_CENTRE = 17.0  # pixels from its side of the picture, one of two things
JITTER = 1.5  # pixels, position within a place, and towards or away from the other thing
PAIR_JITTER = 2.0  # pixels, the other axis of a pair
TILT = 4.0  # degrees

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
        return [
            (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)
        ]
    if shape == "cross":
        a, b = 0.34, 1.04
        top, bottom = [(-a, -b), (a, -b), (a, -a), (b, -a)], [(a, b), (-a, b), (-a, a), (-b, a)]
        return [*top, (b, a), (a, a), *bottom, (-b, -a), (-a, -a)]
    raise ValueError(f"{shape!r} is not a polygon")


def coverage(shape: str, centre: tuple[float, float], radius: float, angle: float = 0.0) -> np.ndarray:
    """Share of each pixel that the shape covers: (SIZE, SIZE) in [0, 1]. Centre, radius in pixels, angle in radians."""
    scale = OVERSAMPLING
    canvas = Image.new("L", (SIZE * scale, SIZE * scale))
    pen = ImageDraw.Draw(canvas)
    x, y, r = centre[0] * scale, centre[1] * scale, radius * scale
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            pen.ellipse((x - r * HOLE, y - r * HOLE, x + r * HOLE, y + r * HOLE), fill=0)
    else:
        cos, sin = math.cos(angle), math.sin(angle)
        pen.polygon([(x + r * (u * cos - v * sin), y + r * (u * sin + v * cos)) for u, v in _polygon(shape)], fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255


def _centres(scene: Scene, radii: list[float], rng: random.Random) -> list[tuple[float, float]]:
    if len(scene.things) == 1:
        column, row = PLACES[scene.where]
        jitter = [rng.uniform(-JITTER, JITTER) for _ in range(2)]
        return [(PLACE_CENTRES[column] + jitter[0], PLACE_CENTRES[row] + jitter[1])]
    dx, dy = RELATIONS[scene.where]
    sides = (0, 1) if dx + dy < 0 else (1, 0)  # 0: the left or upper half
    points = []
    for side, radius in zip(sides, radii, strict=True):
        # Each keeps to its own half, whole and apart from the other.
        near, far = 1 + REACH * radius, SIZE / 2 - 0.5 - REACH * radius
        inward = min(max(PAIR_CENTRE + rng.uniform(-JITTER, JITTER), near), far)
        along = inward if side == 0 else SIZE - inward
        points.append((along, SIZE / 2 + rng.uniform(-PAIR_JITTER, PAIR_JITTER)))
    return points if dx else [(b, a) for a, b in points]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """One picture of the scene, with jitter from `rng`: RGB, SIZE × SIZE."""

    def shade(name: str) -> np.ndarray:
        return np.clip([c + rng.uniform(-7, 7) for c in PALETTE[name]], 0, 255)

    pixels = np.broadcast_to(shade(scene.background), (SIZE, SIZE, 3))  # (H, W, 3)
    radii = [rng.uniform(*RADII[t.size]) for t in scene.things]
    for thing, radius, centre in zip(scene.things, radii, _centres(scene, radii, rng), strict=True):
        cover = coverage(thing.shape, centre, radius, math.radians(rng.uniform(-TILT, TILT)))[..., None]
        pixels = pixels * (1 - cover) + shade(thing.colour) * cover
    return Image.fromarray(np.round(pixels).astype(np.uint8))


# ---------------------------------------------------------------------------------------------- reading
#
# Analysis by synthesis. A picture of this world is a linear mixture, background + Σ coverage·(colour − background),
# so the reader fits that model, thing by thing, renders what it found, and accepts it only if little is left over.

COLOUR_TOLERANCE = 36.0  # RGB distance from the palette; its two closest colours lie 85 apart, `draw` strays 12 at most
PLAIN_SHARE = 0.55  # the background fills more of a picture than this; two large squares leave it 74 %
FITTED_RADII = (5.5, 15.5)  # pixels, what the fit tries
SHOWN_RADII = (6.6, 14.5)  # pixels, what it may find; the top half of a small triangle is a triangle of 6 at most
FITTED_TURN = math.radians(13)
MAX_BLUR = 1.8  # pixels, Gaussian: beyond this an edge counts as smeared
MIN_EXPLAINED = 0.92  # of a thing's pixels, by its best shape
MIN_MARGIN = 0.02  # of a thing's pixels, that the best shape explains beyond the runner-up
OFF_LINE = 45.0  # RGB distance from the mixtures of two colours, beyond which a pixel belongs to a third
STRAY = 40.0  # RGB distance, mean of 3×3 pixels, from which a pixel counts as unexplained
MAX_STRAY_PIXELS = 8
MAX_GRAIN = 20.0  # RMS of what is left over, per channel
SMALLEST_REGION = 25  # pixels; smaller patches are no shape, only left over


@dataclass(frozen=True)
class Found:
    """One thing that the reader saw. Centre and radius in pixels."""

    thing: Thing
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows. `problem` says why it is no clean scene, and is None where it is one."""

    background: str | None
    found: tuple[Found, ...]
    problem: str | None

    def problem_with(self, scene: Scene) -> str | None:
        """None if the picture shows `scene` with every attribute right, else the first thing wrong in words."""
        if self.problem:
            return self.problem
        if self.background != scene.background:
            return f"the background is {self.background}, not {scene.background}"
        if len(self.found) != len(scene.things):
            return f"{len(self.found)} shapes, not {len(scene.things)}"
        by_colour = {f.thing.colour: f for f in self.found}
        for wanted in scene.things:
            if wanted.colour not in by_colour:
                return f"nothing is {wanted.colour}"
            seen = by_colour[wanted.colour].thing
            if seen != wanted:
                return f"{seen} in place of {wanted}"
        where = _where([by_colour[t.colour].centre for t in scene.things])
        return None if where == scene.where else f"{where or 'no plain relation'}, not {scene.where}"


@dataclass(frozen=True)
class _Fit:
    """A shape laid over a region. `explained`: 1 − squared misfit / squared coverage."""

    shape: str
    pose: tuple[float, float, float, float, float]  # x, y, radius, angle, blur
    cover: np.ndarray  # (SIZE, SIZE)
    explained: float


def _where(centres: list[tuple[float, float]]) -> str | None:
    """The place of one thing, or how the first of two lies to the second; None where neither axis dominates."""
    if len(centres) == 1:
        cell = tuple(int(np.abs(np.subtract(PLACE_CENTRES, c)).argmin()) for c in centres[0])
        return next(name for name, place in PLACES.items() if place == cell)
    dx, dy = np.subtract(centres[0], centres[1])
    if min(abs(dx), abs(dy)) > 0.75 * max(abs(dx), abs(dy)):  # drawn: at most 0.5
        return None
    step = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
    return next(name for name, relation in RELATIONS.items() if relation == step)


def _length(vectors: np.ndarray) -> np.ndarray:
    """Euclidean length over the last axis."""
    return np.sqrt(np.einsum("...i,...i->...", vectors, vectors))


def _nearest_colour(rgb: np.ndarray, names: tuple[str, ...]) -> tuple[str, float]:
    distance = {name: float(np.linalg.norm(rgb - PALETTE[name])) for name in names}
    name = min(distance, key=distance.get)
    return name, distance[name]


def _box(values: np.ndarray) -> np.ndarray:
    """Sum over 3×3 pixels, edges repeated. (H, W, …) → (H, W, …)."""
    padded = np.pad(values, [(1, 1), (1, 1)] + [(0, 0)] * (values.ndim - 2), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _grow(mask: np.ndarray, times: int) -> np.ndarray:
    """The mask and all pixels within `times` steps of it, diagonal ones too."""
    for _ in range(times):
        rows = mask.copy()
        rows[1:] |= mask[:-1]
        rows[:-1] |= mask[1:]
        mask = rows.copy()
        mask[:, 1:] |= rows[:, :-1]
        mask[:, :-1] |= rows[:, 1:]
    return mask


def _connected(mask: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """The part of `mask` that hangs together with the pixel `seed` (row, column)."""
    region, size = np.zeros_like(mask), -1
    region[seed] = True
    while (grown := int(region.sum())) != size:
        size = grown
        region = _grow(region, 1) & mask
    return region


@lru_cache(maxsize=256)
def _blur_matrix(hundredths: int) -> np.ndarray:
    """B such that B @ picture @ B.T is a Gaussian blur of hundredths / 100 pixels: (SIZE, SIZE)."""
    distance = np.subtract.outer(np.arange(SIZE), np.arange(SIZE)).astype(np.float32)
    kernel = np.exp(-0.5 * (distance / max(hundredths / 100, 0.05)) ** 2)
    return kernel / kernel.sum(axis=1, keepdims=True)


@cache
def _area(shape: str) -> float:
    """Area of a shape of radius 1, as `coverage` draws it."""
    return float(coverage(shape, (SIZE / 2, SIZE / 2), 10.0).sum()) / 100


def _template(shape: str, pose: np.ndarray) -> np.ndarray:
    blur = _blur_matrix(round(100 * pose[4]))
    return blur @ coverage(shape, (pose[0], pose[1]), pose[2], pose[3]) @ blur.T


def _fit(shape: str, pose: np.ndarray, alpha: np.ndarray, window: np.ndarray) -> _Fit:
    cover = _template(shape, pose)
    seen, shown = alpha[window], cover[window]
    energy = float(shown @ shown) + 1e-9
    gain = min(max(float(seen @ shown) / energy, 0.8), 1.25)  # the colour that alpha was measured with is a guess
    misfit = seen - gain * shown
    return _Fit(shape, tuple(pose), cover, 1 - float(misfit @ misfit) / (gain**2 * energy))


_STEPS = np.array([0.5, 0.5, 0.5, 0.1, 0.4])  # finite differences; `coverage` itself moves in quarter pixels
_LOW = np.array([0, 0, FITTED_RADII[0], -FITTED_TURN, 0])
_HIGH = np.array([SIZE, SIZE, FITTED_RADII[1], FITTED_TURN, 4])


def _refine(fit: _Fit, alpha: np.ndarray, window: np.ndarray, rounds: int) -> _Fit:
    """Gauss–Newton on the pose; keeps the best pose seen."""
    free = [0, 1, 2, 4] if fit.shape in ("circle", "ring") else [0, 1, 2, 3, 4]  # a turned circle looks the same
    for _ in range(rounds):
        pose, shown = np.array(fit.pose), fit.cover[window]
        slopes = []
        for i in free:
            moved = pose.copy()
            moved[i] += _STEPS[i]
            slopes.append(_template(fit.shape, moved)[window] - shown)
        slopes = np.stack([*slopes, shown], axis=1)  # (pixels, free + 1); the last column is the gain
        ridge = 1e-2 * np.eye(len(free) + 1)
        update = np.linalg.solve(slopes.T @ slopes + ridge, slopes.T @ (alpha[window] - shown))[:-1]
        change = np.zeros_like(pose)
        change[free] = np.clip(update, -2, 2) * _STEPS[free]
        for share in (1.0, 0.3):
            candidate = _fit(fit.shape, np.clip(pose + share * change, _LOW, _HIGH), alpha, window)
            if candidate.explained > fit.explained:
                break
        else:
            break
        fit = candidate
    return fit


def _best_shapes(alpha: np.ndarray, window: np.ndarray) -> tuple[_Fit, _Fit]:
    """The two shapes that fit a region best, better one first. Area and centroid give each shape's first pose."""
    mass = np.where(window, alpha.clip(0, 1), 0)
    total = float(mass.sum()) + 1e-9
    grid = np.arange(SIZE) + 0.5
    x, y = float(mass.sum(0) @ grid) / total, float(mass.sum(1) @ grid) / total
    fits = []
    for shape in SHAPES:
        radius = min(max(math.sqrt(total / _area(shape)), FITTED_RADII[0]), FITTED_RADII[1])
        turns = (0.0,) if shape in ("circle", "ring") else (-0.12, 0.0, 0.12)
        tried = [_fit(shape, np.array([x, y, radius, turn, 0.6]), alpha, window) for turn in turns]
        fits.append(max(tried, key=lambda f: f.explained))
    fits.sort(key=lambda f: -f.explained)
    refined = [_refine(f, alpha, window, rounds=2) for f in fits[:2]]
    best, second = sorted(refined, key=lambda f: -f.explained)
    return _refine(best, alpha, window, rounds=1), second


def _unmix(pixels: np.ndarray, background: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel as background·(1 − α) + colour·α: α, and the RGB distance from that line. Both (SIZE, SIZE)."""
    line = colour - background
    offset = pixels - background
    alpha = offset @ line / (line @ line)
    return alpha, _length(offset - alpha[..., None] * line)


def _next_region(pixels: np.ndarray, rest: np.ndarray, background: np.ndarray, purity: np.ndarray):
    """The next unexplained patch of one palette colour: (colour (3,), region (SIZE, SIZE) of booleans), or None.

    `rest` (SIZE, SIZE, 3) is what the things found so far leave over, `purity` (SIZE, SIZE, colours) how near a pixel
    is to each colour. The seed lies where 3×3 pixels are purest: inside a thing rather than on its rim, since the rim
    of red on yellow is orange.
    """
    unexplained = _length(rest) > 1.25 * STRAY
    if unexplained.sum() < SMALLEST_REGION:
        return None
    purity = purity * unexplained[..., None]
    density = _box(purity)
    row, column, name = np.unravel_index(density.argmax(), density.shape)
    if density[row, column, name] < 1.5:
        return None
    around = np.s_[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    weights = purity[around][..., name, None]
    colour = (pixels[around] * weights).sum((0, 1)) / weights.sum()
    alpha, off_line = _unmix(pixels, background, colour)
    near = (alpha > 0.6) & (alpha < 1.4) & (off_line < OFF_LINE) & unexplained
    near[around] |= weights[..., 0] == weights.max()
    seed = np.unravel_index(weights.argmax(), weights.shape[:2])
    return colour, _connected(near, (around[0].start + seed[0], around[1].start + seed[1]))


def _mixture(pixels: np.ndarray, fits: list[_Fit]) -> tuple[np.ndarray, np.ndarray]:
    """Colours (1 + things, 3), background first, that mix best under the fitted coverages, and what is left over."""
    covers = np.stack([f.cover.ravel() for f in fits], axis=1) if fits else np.empty((SIZE * SIZE, 0), np.float32)
    shares = np.concatenate([1 - covers.sum(1, keepdims=True), covers], axis=1)  # (pixels, 1 + things)
    target = pixels.reshape(-1, 3)
    colours = np.linalg.solve(shares.T @ shares + 1e-6 * np.eye(shares.shape[1]), shares.T @ target)
    return colours, (target - shares @ colours).reshape(pixels.shape)


def _fit_things(pixels: np.ndarray, plain: np.ndarray, purity: np.ndarray):
    """All things: [(best fit, margin over the runner-up)], colours (1 + things, 3), what is left over (SIZE, SIZE, 3).

    `plain` (3,) is the background's colour, `purity` (SIZE, SIZE, colours) how near a pixel is to each colour.
    """
    fits, margins, rest, colours = [], [], pixels - plain, plain[None]
    while len(fits) < 3 and (patch := _next_region(pixels, rest, plain, purity)):
        colour, region = patch
        if region.sum() < SMALLEST_REGION:
            break
        alpha, off_line = _unmix(pixels, plain, colour)
        best, second = _best_shapes(alpha, _grow(region, 3) & ((off_line < OFF_LINE) | region))
        fits.append(best)
        margins.append(best.explained - second.explained)
        colours, rest = _mixture(pixels, fits)
    windows = [_grow(f.cover > 0.02, 2) for f in fits]
    if (
        len(fits) > 1 and sum(w.astype(int) for w in windows).max() > 1
    ):  # neighbours: each once more, without the others
        for i, fit in enumerate(fits):
            others = [
                f.cover[..., None] * (c - colours[0]) for f, c in zip(fits, colours[1:], strict=True) if f is not fit
            ]
            alpha, _ = _unmix(pixels - sum(others), colours[0], colours[i + 1])
            fits[i] = _refine(_fit(fit.shape, np.array(fit.pose), alpha, windows[i]), alpha, windows[i], rounds=2)
            colours, rest = _mixture(pixels, fits)
    return list(zip(fits, margins, strict=True)), colours, rest


def _problem(fits: list[tuple[_Fit, float]], found: tuple[Found, ...], colours: np.ndarray, rest: np.ndarray):
    """Why what was found is no clean scene, or None."""
    if not found:
        return "no shape"
    for (fit, margin), one, colour in zip(fits, found, colours[1:], strict=True):
        what = f"the {one.thing.colour} {fit.shape}"
        if fit.explained < MIN_EXPLAINED:
            return f"smeared: a {fit.shape} explains only {max(fit.explained, 0):.0%} of its pixels"
        if _nearest_colour(colour, COLOURS)[1] > COLOUR_TOLERANCE:
            return f"a {fit.shape} of no known colour: {tuple(int(c) for c in colour)}"
        if fit.pose[4] > MAX_BLUR:
            return f"smeared: {what} is blurred by {fit.pose[4]:.1f} pixels"
        if not SHOWN_RADII[0] <= one.radius <= SHOWN_RADII[1]:
            return f"{what} has a radius of {one.radius:.1f} pixels"
        if margin < MIN_MARGIN:
            return f"{what} could be another shape"
    if len(found) > 2:
        return "more than 2 shapes"
    if len({f.thing.colour for f in found}) < len(found):
        return f"two shapes are {found[0].thing.colour}"
    rims = [_grow((fit.cover > 0.02) & (fit.cover < 0.98), 1) for fit, _ in fits]  # their misfit is in `explained`
    stray = int(((_length(_box(rest) / 9) > STRAY) & ~np.any(rims, axis=0)).sum())
    if stray > MAX_STRAY_PIXELS:
        return f"{stray} pixels belong to no shape"
    grain = float(np.sqrt(np.square(rest).mean()))
    return f"grainy: noise of {grain:.0f} grey levels" if grain > MAX_GRAIN else None


def read(picture: Image.Image | np.ndarray) -> Reading:
    """What a picture shows. `picture`: RGB, SIZE × SIZE, or uint8 (SIZE, SIZE, 3); ValueError for any other size."""
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture, dtype=np.float32)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"a scene is {SIZE}×{SIZE} RGB pixels, not an array of shape {pixels.shape}")
    distance = {name: _length(pixels - np.float32(rgb)) for name, rgb in PALETTE.items()}
    background = min(BACKGROUNDS, key=lambda name: np.median(distance[name]))
    near = distance[background] < 1.25 * COLOUR_TOLERANCE
    if near.mean() < PLAIN_SHARE:
        return Reading(None, (), "background of no known colour")
    purity = np.stack([np.exp(-((distance[c] / 40) ** 2)) for c in COLOURS if c != background], axis=-1)
    fits, colours, rest = _fit_things(pixels, np.median(pixels[near], axis=0), purity)
    if np.linalg.norm(colours[0] - PALETTE[background]) > COLOUR_TOLERANCE:
        return Reading(None, (), "background of no known colour")
    colours = colours.clip(0, 255)  # a rim slightly too dark puts the mixture's black below 0
    found = []
    for (fit, _), colour in zip(fits, colours[1:], strict=True):
        x, y, radius = (float(value) for value in fit.pose[:3])
        size = "small" if radius < SIZE_THRESHOLD else "large"
        found.append(Found(Thing(size, _nearest_colour(colour, COLOURS)[0], fit.shape), (x, y), radius))
    return Reading(background, tuple(found), _problem(fits, tuple(found), colours, rest))


def reads_as(picture: Image.Image | np.ndarray, caption: str) -> bool:
    """True if every attribute of the caption is right in the picture, and nothing else is in it."""
    return read(picture).problem_with(parse_caption(caption)) is None


# ---------------------------------------------------------------------------------------------- checking the reader


def _noisy(picture: Image.Image, sigma: float, noise: np.random.Generator) -> Image.Image:
    pixels = np.asarray(picture) + noise.normal(0, sigma, (SIZE, SIZE, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _compressed(picture: Image.Image, noise: np.random.Generator) -> Image.Image:
    """Roughly what a small VAE leaves, about 29 dB: slight blur, colours off by up to 10 and unevenly so, ripples."""
    uneven = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6))) + noise.uniform(-10, 10, (1, 1, 3))
    pixels = pixels + (np.asarray(uneven) / 255 - 0.5) * 12
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=55, subsampling=0)
    return Image.open(file).convert("RGB")


def wrong_scenes(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """Scenes that differ from `scene` in one attribute of one thing, in its place, or in the number of things."""

    def other(options, *taken: str) -> str:
        return rng.choice([o for o in options if o not in taken])

    first, rest = scene.things[0], scene.things[1:]
    used = (scene.background, *(t.colour for t in scene.things))
    wrong = {
        "colour": Thing(first.size, other(COLOURS, *used), first.shape),
        "shape": Thing(first.size, first.colour, other(SHAPES, first.shape)),
        "size": Thing(other(RADII, first.size), first.colour, first.shape),
    }
    changed = {kind: Scene((thing, *rest), scene.where, scene.background) for kind, thing in wrong.items()}
    kind, names = ("relation", RELATIONS) if rest else ("place", PLACES)
    changed[kind] = Scene(scene.things, other(names, scene.where), scene.background)
    changed["background"] = Scene(scene.things, scene.where, other(BACKGROUNDS, *used))
    if rest:
        changed["one thing fewer"] = Scene((first,), rng.choice(tuple(PLACES)), scene.background)
    else:
        second = Thing(rng.choice(tuple(RADII)), other(COLOURS, *used), rng.choice(SHAPES))
        changed["one thing more"] = Scene((first, second), rng.choice(tuple(RELATIONS)), scene.background)
    return changed


def spoiled(scene: Scene, picture: Image.Image, rng: random.Random) -> dict[str, np.ndarray]:
    """Pictures that no longer show `scene`, each spoiled in one way: uint8 (SIZE, SIZE, 3)."""
    noise = np.random.default_rng(rng.randrange(2**32))
    pixels, plain = np.asarray(picture), np.asarray(picture)[0, 0]  # no thing reaches into a corner
    thing = read(picture).found[-1]
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    across, down = columns - thing.centre[0], rows - thing.centre[1]
    inside = _length(pixels - np.float32(PALETTE[thing.thing.colour])) < _length(pixels - plain.astype(np.float32))
    inside = _grow(inside & (np.maximum(abs(across), abs(down)) < thing.radius * REACH + 1), 1)
    half = rng.choice([across > 0, across < 0, down > 0, down < 0])
    used = (scene.background, *(t.colour for t in scene.things))
    free = np.ones((SIZE, SIZE), bool)  # where a further shape covers none of the others
    free[:9], free[-9:], free[:, :9], free[:, -9:] = False, False, False, False
    free &= ~_grow(_length(pixels - plain.astype(np.float32)) > 5, 9)
    spots = np.argwhere(free)
    row, column = spots[rng.randrange(len(spots))] if len(spots) else (9, 9)
    third = coverage(rng.choice(SHAPES), (column, row), rng.uniform(*RADII["small"]))[..., None]
    colour = np.array(PALETTE[rng.choice([c for c in COLOURS if c not in used])])
    other = draw(random_scene(rng), rng)
    waves = Image.fromarray(noise.integers(88, 168, (9, 9, 3), dtype=np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
    return {
        "shape missing": np.where(inside[..., None], plain, pixels),
        "shape half erased": np.where((inside & half)[..., None], plain, pixels),
        "a further shape": (pixels * (1 - third) + colour * third).astype(np.uint8),
        "smeared": np.asarray(picture.filter(ImageFilter.GaussianBlur(3))),
        "cross-fade of two": np.asarray(Image.blend(picture, other, 0.5)),
        "washed out": np.asarray(Image.blend(picture, Image.new("RGB", picture.size, (128, 128, 128)), 0.6)),
        "grey mush": np.asarray(waves),
        "noise": noise.integers(0, 256, pixels.shape, dtype=np.uint8),
        "flat colour": np.broadcast_to(plain, pixels.shape),
    }


def check(count: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """The reader on `count` fresh scenes: shares of pictures read right, and of wrong ones accepted, by kind."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    right, accepted = defaultdict(list), defaultdict(list)
    for _ in tqdm(range(count), desc="reading", disable=None):
        scene = random_scene(rng)
        picture = draw(scene, rng)
        blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 0.8)))
        reading = read(picture)
        right["as drawn"].append(reading.problem_with(scene) is None)
        right["blurred"].append(reads_as(blurred, scene.caption))
        right["noise of 6"].append(reads_as(_noisy(picture, 6, noise), scene.caption))
        right["blurred, noise of 6"].append(reads_as(_noisy(blurred, 6, noise), scene.caption))
        right["compressed"].append(reads_as(_compressed(picture, noise), scene.caption))
        for kind, wrong in wrong_scenes(scene, rng).items():
            accepted[f"wrong {kind}"].append(reading.problem_with(wrong) is None)
        for kind, broken in spoiled(scene, picture, rng).items():
            accepted[kind].append(reads_as(broken, scene.caption))
    return tuple({kind: sum(hits) / len(hits) for kind, hits in table.items()} for table in (right, accepted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="write distinct training captions, one a line")
    action.add_argument("--check", action="store_true", help="measure the reader on fresh scenes")
    parser.add_argument("--count", type=int, default=2000, help="captions or scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count: {arguments.count} is no positive number")
    if arguments.write:
        captions = [s.caption for s in random_scenes(arguments.count, arguments.seed, held_out=False)]
        arguments.write.write_text("\n".join(captions) + "\n", encoding="utf-8")
        return
    right, accepted = check(arguments.count, arguments.seed)
    for title, table in (("read fully right", right), ("wrongly accepted", accepted)):
        print(title)
        for kind, share in table.items():
            print(f"  {kind:<24}{share:8.2%}")


if __name__ == "__main__":
    main()
