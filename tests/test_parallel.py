"""Sampling rounds: a picture depends on its prompt and seed alone, and a failing one on nobody else's account."""

import contextlib
import io
import json
import logging
import threading
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from distributed.process_group import Ranks
from models.flow import few_step_grid, few_step_scheduler
from models.teacher import WanVelocity, encode_text, inspect_teacher, load_text_pipeline, load_transformer
from models.vae import load_vae
from sampling import parallel
from sampling.parallel import ParallelSampler, Round, RoundFailed, Row, share
from sampling.review import read_manifest
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SHIFT = 3.0
LATENT = (16, 1, 2, 4)  # pictures of 16 × 32 pixels
PROMPTS = ("a red circle", "a small blue star left of a large green ring", "", "ein Bär <b>", "two yellow squares")
ROUND = Round(PROMPTS, epoch=3, step=120, grid=few_step_grid(4, SHIFT), shift=SHIFT, height=16, width=32, seed=1000)
# The manifest's columns, as tools that read it expect them.
COLUMNS = [
    "file", "prompt", "prompt_index", "epoch", "step", "rank", "seed", "sampler", "num_inference_steps", "eta", "shift",
    "weights", "height", "width", "phase", "seconds", "ok", "error", "scores",
]  # fmt: skip


@pytest.fixture(scope="module")
def vae(random_single_pipeline_dir):
    return load_vae(random_single_pipeline_dir, CPU)


@pytest.fixture(scope="module")
def field(random_single_pipeline_dir):
    return WanVelocity(load_transformer(random_single_pipeline_dir, "transformer", torch.float32))


@pytest.fixture(scope="module")
def text(random_single_pipeline_dir):
    pipeline = load_text_pipeline(inspect_teacher(str(random_single_pipeline_dir)), CPU, torch.float32)
    return encode_text(pipeline, list(PROMPTS))


def ranks_of(rank=0, world_size=1) -> Ranks:
    return Ranks(rank, world_size, rank, world_size, CPU, launched_by_torchrun=world_size > 1)


def sampler_in(folder, vae, rank=0, world_size=1, batch_size=None) -> ParallelSampler:
    return ParallelSampler(vae, LATENT, folder, ranks_of(rank, world_size), batch_size)


def pixels(folder: Path, file: str) -> np.ndarray:
    return np.asarray(Image.open(folder / file)).astype(int)


def pictures(folder: Path, rows: list[Row]) -> dict[int, np.ndarray]:
    return {row.prompt_index: pixels(folder, row.file) for row in rows if row.ok}


def draw(folder: Path, vae, field, text, round_=None, **kwargs) -> dict[int, np.ndarray]:
    """Prompt index → pixels of a round."""
    return pictures(folder, sampler_in(folder, vae, **kwargs).draw(round_ or ROUND, field, text))


def identity(text: list[torch.Tensor], index: int) -> float:
    """What the failing fields below know a prompt by: folded text keeps its first token's embedding."""
    return float(text[index][0, 0])


def failing_for(field, text, index, how):
    """`field`, but `how` happens to prompt `index`."""

    def failing(x_t, t, prompt_embeds):
        v = field(x_t, t, prompt_embeds)
        hit = prompt_embeds[:, 0, 0] == identity(text, index)
        if hit.any() and isinstance(how, Exception):
            raise how
        return torch.where(hit[:, None, None, None, None], torch.nan, v)

    return failing


# ------------------------------------------------------------------------------------------------ shares


def test_five_prompts_on_four_ranks():
    assert [len(share(5, rank, 4)) for rank in range(4)] == [2, 2, 1, 0]


def test_shares_are_contiguous_and_cover_every_prompt_once():
    for count in range(20):
        for world_size in range(1, 9):
            shares = [share(count, rank, world_size) for rank in range(world_size)]
            assert [i for s in shares for i in s] == list(range(count))
            assert all(len(s) <= -(-count // world_size) for s in shares)


# ------------------------------------------------------------------------------------------------ pictures


@pytest.fixture(scope="module")
def reference(tmp_path_factory, vae, field, text):
    """A round drawn by one rank in one batch: its folder and rows."""
    folder = tmp_path_factory.mktemp("reference")
    sampler = sampler_in(folder, vae)
    rows = sampler.draw(ROUND, field, text)
    sampler.finish()
    return folder, rows


@pytest.mark.parametrize("world_size", [2, 3])
def test_pictures_do_not_depend_on_the_number_of_ranks(world_size, reference, vae, field, text, tmp_path):
    got = {}
    for rank in range(world_size):
        got |= draw(tmp_path, vae, field, text, rank=rank, world_size=world_size)
    expected = pictures(*reference)
    assert list(got) == list(range(5))
    assert all(np.abs(got[i] - expected[i]).max() <= 1 for i in expected)


@pytest.mark.parametrize("eta, sampler", [(0.0, "ddim"), (0.7, "ddim"), (0.0, "renoise")])
def test_pictures_do_not_depend_on_the_batch_size(eta, sampler, vae, field, text, tmp_path):
    round_ = replace(ROUND, eta=eta, sampler=sampler)
    drawn = [draw(tmp_path, vae, field, text, round_, batch_size=size) for size in (1, 2, 8)]
    for other in drawn[1:]:
        assert all(np.abs(other[i] - drawn[0][i]).max() <= 1 for i in range(5))


def test_pictures_differ_by_prompt_and_seed(reference, vae, field, text, tmp_path):
    """Else the tests above would hold for grey pictures."""
    expected = pictures(*reference)
    assert all(p.std() > 10 for p in expected.values())
    other_text = [text[1], text[0], *text[2:]]
    swapped = draw(tmp_path, vae, field, other_text)
    assert np.abs(swapped[0] - expected[0]).max() > 5 and np.abs(swapped[2] - expected[2]).max() <= 1
    assert np.abs(expected[0] - expected[1]).max() > 20


def test_stock_pipeline_redraws_a_picture_from_its_row(reference, random_single_pipeline_dir):
    folder, _ = reference
    pipeline = WanPipeline.from_pretrained(random_single_pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    for row in read_manifest(folder)[1:4]:
        pipeline.scheduler = few_step_scheduler(row["shift"])
        picture = pipeline(
            row["prompt"], num_frames=1, height=row["height"], width=row["width"],
            num_inference_steps=row["num_inference_steps"], guidance_scale=1.0,
            generator=torch.Generator().manual_seed(row["seed"]), output_type="np",
        ).frames[0][0]  # fmt: skip
        assert np.abs((picture * 255).round() - pixels(folder, row["file"])).max() <= 1


def test_training_randomness_is_not_disturbed(vae, field, text, tmp_path):
    before = torch.get_rng_state()
    sampler_in(tmp_path, vae).draw(replace(ROUND, sampler="renoise"), field, text)
    assert torch.get_rng_state().equal(before)


def test_drawing_keeps_no_graph(vae, field, text, tmp_path):
    def checked(x_t, t, prompt_embeds):
        assert not torch.is_grad_enabled()
        return field(x_t, t, prompt_embeds)

    assert all(row.ok for row in sampler_in(tmp_path, vae).draw(ROUND, checked, text))


# ------------------------------------------------------------------------------------------------ in step


@pytest.mark.parametrize("world_size, batch_size", [(2, 1), (2, 2), (3, 2), (4, 1)])
def test_in_step_ranks_run_equally_many_forwards_and_draw_the_same(
    world_size, batch_size, reference, vae, field, text, tmp_path
):
    expected = pictures(*reference)
    for count in (1, 5):  # of prompts
        got, calls = {}, []
        for rank in range(world_size):
            counted = Counting(field)
            sampler = sampler_in(tmp_path, vae, rank, world_size, batch_size)
            round_ = replace(ROUND, prompts=PROMPTS[:count])
            got |= pictures(tmp_path, sampler.draw(round_, counted, text[:count], in_step=True))
            calls.append(counted.calls)
        assert len(set(calls)) == 1 and calls[0] > 0, "nobody waits in a forward that another one does not run"
        assert list(got) == list(range(count))
        assert all(np.abs(got[i] - expected[i]).max() <= 1 for i in got)


class Counting:
    def __init__(self, field) -> None:
        self.field, self.calls = field, 0

    def __call__(self, *args):
        self.calls += 1
        return self.field(*args)


@pytest.mark.parametrize("how", [ValueError("a fault"), torch.OutOfMemoryError("no memory")])
def test_in_step_a_failing_rank_leaves_at_once(how, vae, field, text, tmp_path):
    """Its peers wait inside a forward: only its end, which torchrun sees, ends theirs."""
    words = "--sample_batch_size" if isinstance(how, torch.OutOfMemoryError) else "a fault"
    failing = failing_for(field, text, 0, how)
    with pytest.raises((ValueError, RuntimeError), match=words):
        sampler_in(tmp_path, vae, 0, 2, batch_size=2).draw(ROUND, failing, text, in_step=True)


# ------------------------------------------------------------------------------------------------ what is left behind


def test_files_and_manifest(reference):
    folder, rows = reference
    names = [f"epoch_0003_rank_0_sample_{i:02d}.png" for i in range(5)]
    assert sorted(p.name for p in folder.iterdir()) == ["epoch_0003.png", *names, "index.html", "manifest.jsonl"]
    manifest = read_manifest(folder)
    assert manifest == [asdict(row) for row in rows]
    for i, row in enumerate(manifest):
        assert list(row) == COLUMNS
        assert (row["file"], row["prompt"], row["prompt_index"], row["seed"]) == (names[i], PROMPTS[i], i, 1000 + i)
        assert (row["epoch"], row["step"], row["rank"], row["ok"], row["error"]) == (3, 120, 0, True, None)
        assert (row["sampler"], row["num_inference_steps"], row["eta"], row["shift"]) == ("ddim", 4, 0.0, SHIFT)
        assert (row["weights"], row["height"], row["width"], row["scores"]) == ("raw", 16, 32, {})
        assert row["seconds"] > 0


def test_names_count_within_the_rank(vae, field, text, tmp_path):
    rows = sampler_in(tmp_path, vae, rank=1, world_size=2).draw(replace(ROUND, epoch=12), field, text)
    assert [row.file for row in rows] == ["epoch_0012_rank_1_sample_00.png", "epoch_0012_rank_1_sample_01.png"]
    assert [row.prompt_index for row in rows] == [3, 4] and [row.seed for row in rows] == [1003, 1004]


def test_teacher_rounds_have_their_own_names(vae, field, text, tmp_path):
    sampler = sampler_in(tmp_path, vae)
    rows = sampler.draw(replace(ROUND, weights="teacher"), field, text)
    sampler.finish()
    assert rows[0].file == "teacher_rank_0_sample_00.png" and (tmp_path / "teacher.png").exists()


def test_a_png_tells_its_row(reference):
    folder, rows = reference
    for row in rows:
        said = Image.open(folder / row.file).text
        # In the form that viewers of other programs' pictures read.
        assert said.pop("parameters").startswith(f"{row.prompt}\nSteps: 4, Sampler: ddim, Schedule shift: 3, Seed: ")
        expected = asdict(row)
        del expected["scores"]  # they come later
        assert {k: v if isinstance(expected[k], str) else json.loads(v) for k, v in said.items()} == expected


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("how, said", [(RuntimeError("bad kernel"), "RuntimeError: bad kernel"), (None, "not finite")])
def test_a_failing_picture_does_not_stop_the_others(how, said, reference, vae, field, text, tmp_path, caplog):
    rows = sampler_in(tmp_path, vae).draw(ROUND, failing_for(field, text, 1, how), text)
    assert [row.ok for row in rows] == [True, False, True, True, True]
    assert said in rows[1].error and read_manifest(tmp_path)[1]["error"] == rows[1].error
    assert rows[1].file in caplog.text and said in caplog.text
    assert not (tmp_path / rows[1].file).exists()
    expected, got = pictures(*reference), pictures(tmp_path, rows)
    assert sorted(got) == [0, 2, 3, 4] and all(np.abs(got[i] - expected[i]).max() <= 1 for i in got)


def test_a_picture_that_cannot_be_decoded(vae, field, text, tmp_path, monkeypatch):
    original, bad = parallel.decode, []

    def decode(vae, latents):
        bad.append(latents[1].clone()) if not bad else None
        if any(x.equal(bad[0]) for x in latents):
            raise RuntimeError("decoder says no")
        return original(vae, latents)

    monkeypatch.setattr(parallel, "decode", decode)
    rows = sampler_in(tmp_path, vae).draw(ROUND, field, text)
    assert [row.ok for row in rows] == [True, False, True, True, True]
    assert rows[1].error == "RuntimeError: decoder says no"


def test_pixels_that_are_not_finite(vae, field, text, tmp_path, monkeypatch):
    original = parallel.decode
    spoil = torch.tensor([1, 1, 1, torch.nan, 1])[:, None, None, None]
    monkeypatch.setattr(parallel, "decode", lambda vae, latents: original(vae, latents) * spoil)
    rows = sampler_in(tmp_path, vae).draw(ROUND, field, text)
    assert [row.ok for row in rows] == [True, True, True, False, True] and "not finite" in rows[3].error


def test_a_picture_that_cannot_be_written(vae, field, text, tmp_path, monkeypatch):
    original = Image.Image.save

    def full_disk(self, path, **kwargs):
        original(self, path, **kwargs)
        if "sample_02" in Path(path).name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    rows = sampler_in(tmp_path, vae).draw(ROUND, field, text)
    assert [row.ok for row in rows] == [True, True, False, True, True]
    assert "No space left on device" in rows[2].error and not (tmp_path / rows[2].file).exists()
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_an_unprintable_prompt_fails_alone(vae, field, text, tmp_path):
    """A shell in another encoding hands over bytes that are no text."""
    round_ = replace(ROUND, prompts=("a \udce4pfel", *PROMPTS[1:]))
    rows = sampler_in(tmp_path, vae).draw(round_, field, text)
    assert [row.ok for row in rows] == [False, True, True, True, True] and "UnicodeEncodeError" in rows[0].error


def test_when_every_picture_fails_the_round_fails_and_says_why(vae, text, tmp_path):
    def broken(x_t, t, prompt_embeds):
        raise RuntimeError("the weights are mush")

    with pytest.raises(RoundFailed, match="epoch_0003: every picture failed.*rank 0: RuntimeError: the weights are mu"):
        sampler_in(tmp_path, vae).draw(ROUND, broken, text)
    assert [row["ok"] for row in read_manifest(tmp_path)] == [False] * 5


def test_a_broken_review_page_costs_no_pictures(vae, field, text, tmp_path, caplog, monkeypatch):
    def full_disk(folder, rows, metrics=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parallel, "add_to_manifest", full_disk)
    monkeypatch.setattr(parallel, "write_review", full_disk)
    sampler = sampler_in(tmp_path, vae)
    rows = sampler.draw(ROUND, field, text)
    sampler.finish()
    assert all(row.ok for row in rows)
    assert "manifest of epoch_0003 could not be written" in caplog.text
    assert "contact sheet and review page of epoch_0003 could not be written" in caplog.text


def test_drawing_does_not_wait_for_the_last_rounds_review_page(vae, field, text, tmp_path, monkeypatch):
    may_write, written = threading.Event(), []

    def slow(folder, rows, metrics):
        assert may_write.wait(30)
        written.append(rows[0]["epoch"])

    monkeypatch.setattr(parallel, "write_review", slow)
    sampler = sampler_in(tmp_path, vae)
    sampler.draw(ROUND, field, text)
    assert not written and len(read_manifest(tmp_path)) == 5
    may_write.set()
    sampler.draw(replace(ROUND, epoch=4), field, text)
    sampler.finish()
    assert written == [3, 4]


def test_a_broken_manifest_is_kept_aside(vae, field, text, tmp_path, caplog):
    (tmp_path / "manifest.jsonl").write_text("{half a li")
    rows = sampler_in(tmp_path, vae).draw(ROUND, field, text)
    assert [row["file"] for row in read_manifest(tmp_path)] == [row.file for row in rows]
    assert (tmp_path / "manifest.jsonl.broken").read_text() == "{half a li" and "line 1 is no picture" in caplog.text


def test_out_of_memory_halves_the_batch_for_good(reference, vae, field, text, tmp_path):
    tried = []

    def small_gpu(x_t, t, prompt_embeds):
        tried.append(len(x_t)) if t == ROUND.grid.times[0] else None
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return field(x_t, t, prompt_embeds)

    sampler = sampler_in(tmp_path, vae, batch_size=8)
    got, expected = pictures(tmp_path, sampler.draw(ROUND, small_gpu, text)), pictures(*reference)
    assert tried == [5, 3, 2, 2, 1] and sampler.batch_size == 2
    assert all(np.abs(got[i] - expected[i]).max() <= 1 for i in expected)
    tried.clear()
    sampler.draw(ROUND, small_gpu, text)
    assert tried == [2, 2, 1]


def test_what_did_not_fit_is_freed_before_the_next_try(vae, field, text, tmp_path, monkeypatch):
    held, freed = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[-1]() is None))

    def small_gpu(x_t, t, prompt_embeds):
        activations = torch.zeros(len(x_t))
        held.append(weakref.ref(activations))
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return field(x_t, t, prompt_embeds)

    sampler_in(tmp_path, vae).draw(ROUND, small_gpu, text)
    assert freed == [True, True]


def test_decoding_runs_out_of_memory_too(reference, vae, field, text, tmp_path, monkeypatch):
    original, tried, held, freed = parallel.decode, [], [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[-1]() is None))

    def decode(vae, latents):
        activations = torch.zeros(len(latents))
        tried.append(len(latents))
        held.append(weakref.ref(activations))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return original(vae, latents)

    monkeypatch.setattr(parallel, "decode", decode)
    sampler = sampler_in(tmp_path, vae, batch_size=8)
    got, expected = pictures(tmp_path, sampler.draw(ROUND, field, text)), pictures(*reference)
    assert sorted(got) == sorted(expected) and all(np.abs(got[i] - expected[i]).max() <= 1 for i in expected)
    assert tried[0] == 5 and freed == [True] * len([n for n in tried if n > 2])
    tried.clear()
    sampler.draw(ROUND, field, text)
    assert max(tried) <= 2 and sampler.batch_size == 8, "remembered, for decoding alone"


def test_out_of_memory_for_a_single_picture_is_recorded(vae, text, tmp_path):
    def no_gpu(x_t, t, prompt_embeds):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(RoundFailed, match="OutOfMemoryError"):
        sampler_in(tmp_path, vae, batch_size=4).draw(ROUND, no_gpu, text)


def test_a_line_a_picture_up_to_four_prompts(vae, field, text, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sampling.parallel")
    sampler_in(tmp_path, vae).draw(replace(ROUND, prompts=PROMPTS[:4]), field, text)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 4 and lines[1].startswith("rank 0: epoch_0003_rank_0_sample_01.png (")
    assert lines[1].endswith(PROMPTS[1])


def test_a_bar_beyond_four_prompts(vae, field, text, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, "sampling.parallel")
    sampler_in(tmp_path, vae, batch_size=1).draw(ROUND, field, text)
    assert not caplog.records and "epoch_0003: 100%" in capsys.readouterr().err


def test_a_thumbnail_that_cannot_be_written_costs_no_picture(vae, field, text, tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parallel, "write_thumbnail", no_space)
    assert all(row.ok for row in sampler_in(tmp_path, vae).draw(ROUND, field, text))


def test_a_count_that_is_lost_costs_no_round(vae, field, text, tmp_path, monkeypatch):
    def gone(*args):
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(parallel, "tally", gone)
    assert all(row.ok for row in sampler_in(tmp_path, vae).draw(ROUND, field, text))


# ------------------------------------------------------------------------------------------------ real ranks


def _on_every_rank(ranks: Ranks, pipeline: Path, folder: Path) -> dict:
    """All that is tried on two real ranks, one after the other: starting processes is what takes time."""
    vae = load_vae(pipeline, CPU)
    seen = {}

    def draw(name: str, round_: Round, field=_toy_field, folder=None):
        text = [torch.full((2, 4), float(i)) for i in range(len(round_.prompts))]
        sampler = ParallelSampler(vae, LATENT, folder or main_folder / name, ranks)
        started = time.monotonic()
        try:
            seen[name] = [asdict(row) for row in sampler.draw(round_, field, text)]
        except RoundFailed as failure:
            seen[name] = str(failure)
        seen[f"{name} seconds"] = time.monotonic() - started

    main_folder = folder
    draw("five", ROUND)
    draw("one", replace(ROUND, prompts=PROMPTS[:1]))
    draw("none", replace(ROUND, prompts=()))
    with contextlib.redirect_stderr(io.StringIO()) as bar:
        draw("ten", replace(ROUND, prompts=PROMPTS * 2))
    seen["bar"] = bar.getvalue()
    draw("rank 1 fails", ROUND, _failing_field if ranks.rank == 1 else _toy_field)
    draw("all fail", ROUND, _failing_field)
    (folder / "a file").touch()
    draw("no folder", ROUND, folder=folder / "a file" / "samples" if ranks.rank == 1 else None)
    return seen


def _toy_field(x_t, t, prompt_embeds):
    return x_t - prompt_embeds[:, 0, 0].view(-1, 1, 1, 1, 1)


def _failing_field(x_t, t, prompt_embeds):
    raise RuntimeError("this rank's GPU fell off the bus")


@pytest.fixture(scope="module")
def two_ranks(random_single_pipeline_dir, tmp_path_factory):
    """What each rank saw, and the folder that they drew into."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return run_ranks(_on_every_rank, 2, random_single_pipeline_dir, folder), folder


def test_two_ranks_draw_five_prompts(two_ranks):
    (first, second), folder = two_ranks
    assert first["five"] == second["five"] == read_manifest(folder / "five")
    assert [(row["rank"], row["prompt_index"], row["file"]) for row in first["five"]] == [
        (0, 0, "epoch_0003_rank_0_sample_00.png"),
        (0, 1, "epoch_0003_rank_0_sample_01.png"),
        (0, 2, "epoch_0003_rank_0_sample_02.png"),
        (1, 3, "epoch_0003_rank_1_sample_00.png"),
        (1, 4, "epoch_0003_rank_1_sample_01.png"),
    ]
    assert all(pixels(folder / "five", row["file"]).shape == (16, 32, 3) for row in first["five"])


def test_a_rank_without_prompts_takes_part(two_ranks):
    (first, second), folder = two_ranks
    assert first["one"] == second["one"] and [row["rank"] for row in first["one"]] == [0]
    assert first["none"] == second["none"] == [] and read_manifest(folder / "none") == []


def test_one_bar_counts_the_pictures_of_all_ranks(two_ranks):
    (first, second), _ = two_ranks
    assert "epoch_0003: 100%" in first["bar"] and "10/10" in first["bar"] and not second["bar"]


def test_a_rank_whose_pictures_all_fail_does_not_stop_the_other(two_ranks):
    (first, second), _ = two_ranks
    assert first["rank 1 fails"] == second["rank 1 fails"]
    assert [row["ok"] for row in first["rank 1 fails"]] == [True, True, True, False, False]


@pytest.mark.parametrize(
    "name, said", [("no folder", "epoch_0003: rank 1: NotADirectoryError"), ("all fail", "GPU fell off the bus")]
)
def test_all_ranks_fail_together_and_name_the_culprit(name, said, two_ranks):
    (first, second), _ = two_ranks
    assert first[name] == second[name] and said in first[name]
    assert first[f"{name} seconds"] < 5 and second[f"{name} seconds"] < 5


def test_what_the_other_rank_drew_is_kept(two_ranks):
    folder = two_ranks[1] / "no folder"
    assert [row["ok"] for row in read_manifest(folder)] == [True] * 3 and len(list(folder.glob("*_sample_*.png"))) == 3
