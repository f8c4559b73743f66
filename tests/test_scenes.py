"""The drawn world and its reader: captions round-trip, held-out scenes stay out, the reader is right and says no."""

import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from data import scenes
from data.scenes import PALETTE, SIZE, Scene, Thing, draw, parse_caption, random_scene, random_scenes, read, reads_as

ROOT = Path(__file__).parent.parent
SEED = 90210  # the reader was tuned on single-digit seeds

PAIR = "a small red star left of a large blue ring on a yellow background"


def drawn(caption: str, seed: int = 0) -> Image.Image:
    return draw(parse_caption(caption), random.Random(seed))


@cache
def drawn_scenes(count: int) -> list[tuple[Scene, Image.Image]]:
    rng = random.Random(SEED)
    return [(scene, draw(scene, rng)) for scene in (random_scene(rng) for _ in range(count))]


def noisy(picture: Image.Image, sigma: float, seed: int) -> Image.Image:
    pixels = np.asarray(picture) + np.random.default_rng(seed).normal(0, sigma, (SIZE, SIZE, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------- captions


def test_captions_round_trip():
    for scene in random_scenes(500, SEED, held_out=False) + random_scenes(100, SEED, held_out=True):
        assert parse_caption(scene.caption) == scene


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "",
        PAIR + " ",
        PAIR.replace("small", "tiny"),
        PAIR.replace("red", "crimson"),
        PAIR.replace("star", "heart"),
        PAIR.replace("yellow background", "green background"),
        PAIR.replace("blue", "red"),  # two things of one colour
        PAIR.replace("blue", "yellow"),  # a thing of the background's colour
        "a small red star left of on a yellow background",
    ],
)
def test_other_text_is_no_caption(text):
    with pytest.raises(ValueError, match="not a scene caption"):
        parse_caption(text)


def test_held_out_scenes_are_kept_apart():
    assert not any(s.held_out for s in random_scenes(1500, SEED, held_out=False))
    assert all(s.held_out for s in random_scenes(300, SEED, held_out=True))
    assert parse_caption("a small red star on the left on a yellow background").held_out
    assert not parse_caption("a small red star on the left on a black background").held_out
    # A held-out pair told from either side is one picture.
    assert parse_caption("a large red star left of a small blue ring on a black background").held_out
    assert parse_caption("a small blue ring right of a large red star on a black background").held_out
    assert not parse_caption("a small blue ring left of a large red star on a black background").held_out


def test_scene_prompts_are_distinct_training_captions():
    captions = (ROOT / "data" / "scene_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(captions) == len(set(captions)) == 3000
    assert captions == [s.caption for s in random_scenes(3000, 0, held_out=False)]


# ---------------------------------------------------------------------------------------------- drawing


def test_drawing_depends_on_its_seed_alone():
    assert np.array_equal(drawn(PAIR, 1), drawn(PAIR, 1))
    assert not np.array_equal(drawn(PAIR, 1), drawn(PAIR, 2))


def test_things_lie_inside_apart_and_as_told(monkeypatch):
    covers = []
    coverage = scenes.coverage
    monkeypatch.setattr(scenes, "coverage", lambda *pose: covers.append((pose, coverage(*pose))) or covers[-1][1])
    for scene, _ in drawn_scenes(300):
        covers.clear()
        draw(scene, random.Random(scene.caption))
        for (_, _, radius, _), cover in covers:
            edge = np.concatenate([cover[0], cover[-1], cover[:, 0], cover[:, -1]])
            assert edge.max() == 0, f"{scene.caption}: a shape is cut off"
            assert abs(radius - 10.25) > 1.2
        if len(scene.things) == 2:
            assert np.minimum(covers[0][1], covers[1][1]).max() < 0.02, f"{scene.caption}: shapes overlap"
            (x0, y0), (x1, y1) = covers[0][0][1], covers[1][0][1]
            dx, dy = scenes.RELATIONS[scene.where]
            along, across = ((x0 - x1) * dx, y0 - y1) if dx else ((y0 - y1) * dy, x0 - x1)
            assert along > 0 and abs(across) <= along / 2 + 1e-6


# ---------------------------------------------------------------------------------------------- reading


def test_reader_is_right_on_clean_blurred_and_noised_scenes():
    wrong = []
    for i, (scene, picture) in enumerate(drawn_scenes(300)):
        if i % 3 == 1:
            picture = picture.filter(ImageFilter.GaussianBlur(0.7))
        if i % 3 == 2:
            picture = noisy(picture, 6, seed=i)
        if problem := read(picture).problem_with(scene):
            wrong.append(f"{scene.caption}: {problem}")
    assert len(wrong) <= 3, wrong


def test_reading_measures_what_was_drawn():
    found = read(drawn("a large green square in the top left on a white background", 3)).found[0]
    assert found.thing == Thing("large", "green", "square")
    assert 11.3 < found.radius < 13.7
    assert np.allclose(found.centre, (19, 19), atol=scenes.JITTER + 0.3)
    assert read(np.asarray(drawn(PAIR))) == read(drawn(PAIR))


def test_every_wrong_caption_is_refused():
    rng = random.Random(SEED)
    kinds = set()
    for scene, picture in drawn_scenes(30):
        reading = read(picture)
        assert reading.problem_with(scene) is None
        for kind, wrong in scenes.wrong_scenes(scene, rng).items():
            kinds.add(kind)
            assert parse_caption(wrong.caption) == wrong
            assert reading.problem_with(wrong), f"{scene.caption} passed as {wrong.caption}"
    assert len(kinds) == 8


def test_the_same_pair_told_from_the_other_side_is_right():
    assert reads_as(drawn(PAIR), "a large blue ring right of a small red star on a yellow background")
    assert not reads_as(drawn(PAIR), "a large blue ring left of a small red star on a yellow background")


def test_every_spoiled_picture_is_refused():
    rng = random.Random(SEED)
    accepted = [
        f"{scene.caption}, {kind}"
        for scene, picture in drawn_scenes(18)
        for kind, broken in scenes.spoiled(scene, picture, rng).items()
        if reads_as(broken, scene.caption)
    ]
    assert not accepted


def blob(picture: Image.Image, box: tuple[int, ...], colour: tuple[int, int, int]) -> Image.Image:
    picture = picture.copy()
    ImageDraw.Draw(picture).rectangle(box, fill=colour)
    return picture


@pytest.mark.parametrize(
    ("picture", "problem"),
    [
        (Image.new("RGB", (SIZE, SIZE), PALETTE["pink"]), "no shape"),
        (Image.new("RGB", (SIZE, SIZE), PALETTE["green"]), "background of no known colour"),
        (Image.new("RGB", (SIZE, SIZE), (200, 120, 120)), "background of no known colour"),
        (drawn(PAIR).filter(ImageFilter.GaussianBlur(3)), "smeared"),
        (blob(drawn(PAIR), (40, 2, 48, 5), PALETTE["black"]), "explains only"),  # a bar is no shape
        (blob(drawn(PAIR), (58, 2, 61, 5), (0, 255, 255)), "belong to no shape"),
        (noisy(drawn("a large red square in the middle on a gray background"), 24, seed=0), "grainy"),
        (noisy(drawn(PAIR), 40, seed=0), "background of no known colour"),
    ],
)
def test_the_problem_is_named(picture, problem):
    reading = read(picture)
    assert problem in reading.problem
    assert reading.problem_with(parse_caption(PAIR)) == reading.problem


def test_three_shapes_and_twins_are_named():
    picture = np.asarray(drawn("a small red circle in the top left on a white background"), dtype=np.float32)
    first = scenes.coverage("circle", (46, 18), 8)[..., None]
    second = scenes.coverage("square", (46, 46), 8)[..., None]
    twins = (picture * (1 - first) + np.array(PALETTE["red"]) * first).astype(np.uint8)
    three = (twins * (1 - second) + np.array(PALETTE["blue"]) * second).astype(np.uint8)
    assert read(twins).problem == "two shapes are red"
    assert read(three).problem == "more than 2 shapes"


def test_a_shape_of_another_colour_or_size_is_no_clean_scene():
    white = np.full((SIZE, SIZE, 3), 248, np.float32)
    cover = scenes.coverage("circle", (32, 32), 8)[..., None]
    tiny = scenes.coverage("circle", (32, 32), 5)[..., None]
    red, washed_out = np.array(PALETTE["red"]), (np.array(PALETTE["red"]) + 248) / 2
    assert read((white * (1 - cover) + red * cover).astype(np.uint8)).problem is None
    assert read((white * (1 - cover) + washed_out * cover).astype(np.uint8)).problem
    assert "radius" in read((white * (1 - tiny) + red * tiny).astype(np.uint8)).problem


def test_a_picture_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="64×64"):
        read(Image.new("RGB", (32, 32)))


# ---------------------------------------------------------------------------------------------- command line


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.scenes", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_write_and_check_from_the_command_line(tmp_path):
    done = run("--write", str(tmp_path / "captions.txt"), "--count", "20", "--seed", "3")
    assert done.returncode == 0, done.stderr
    captions = (tmp_path / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert captions == [s.caption for s in random_scenes(20, 3, held_out=False)]
    done = run("--check", "--count", "3", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "as drawn" in done.stdout and "wrong colour" in done.stdout
    assert run("--check", "--count", "0").returncode == 2
