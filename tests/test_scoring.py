"""Scores: figures against independent references, and an engine that nothing can hold."""

import asyncio
import json
import logging
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config.config import ScoringConfig
from config.errors import UserError
from models.flow import few_step_grid
from sampling import scoring
from sampling.in_flight import Scoring
from sampling.parallel import ParallelSampler, Round
from sampling.review import read_manifest
from sampling.scoring import (
    Clip,
    Fidelity,
    Health,
    Judge,
    Scorer,
    Shot,
    alarms,
    build_scorers,
    check_scorers,
    compare_prompts,
    failures,
    look,
    means,
    psnr,
    read_judgement,
    ssim,
)
from tests.judge import SECRET, judge_server
from tests.ranks import run_ranks


def save(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)
    return path


def noise(seed: int, shape=(24, 32, 3)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


# ------------------------------------------------------------------------------------------------ figures


def test_figures_of_pictures_that_can_be_counted_by_hand():
    half = np.zeros((4, 4, 3), np.float32)
    half[:, 2:] = 1
    figures = look(half)
    assert figures["contrast"] == pytest.approx(0.5) and figures["saturation"] == 0
    # The Laplacian of a step in the middle is +1 on its dark side and −1 on its bright one.
    assert figures["sharpness"] == pytest.approx(1.0)
    red = np.zeros((4, 4, 3), np.float32)
    red[..., 0] = 1
    assert look(red) == {"contrast": 0, "sharpness": 0, "saturation": 1}


def ssim_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (picture[y : y + 11, x : x + 11] for picture in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(values))


def test_ssim_equals_the_formula_window_by_window():
    a, b = noise(0, (16, 19)), noise(1, (16, 19))
    for other in (b, 0.7 * a + 0.3 * b, 1 - a):
        assert ssim(a, other) == pytest.approx(ssim_by_loops(a, other), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)


def test_psnr():
    a = np.full((2, 2, 3), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20.0) and psnr(a, a) == 100.0


@pytest.mark.parametrize(
    "pixels, problem",
    [
        (np.zeros((16, 16, 3)), "black"),
        (0.02 * noise(0), "black"),
        (np.full((16, 16, 3), 0.5), "flat"),
        (0.5 + 0.005 * noise(0), "flat"),
        (np.stack([np.eye(16), np.zeros((16, 16)), np.zeros((16, 16))], -1), None),
        (noise(0), None),
    ],
)
def test_black_and_flat_pictures_score_zero(pixels, problem, tmp_path):
    verdict = Health(60).measure(Shot(save(tmp_path / "a.png", pixels), ""))
    assert (verdict["problem"], verdict["score"]) == (problem, 0.0 if problem else 1.0)


def test_health_is_measured_against_the_teachers_picture(tmp_path):
    teacher = save(tmp_path / "teacher.png", noise(0))
    pale = save(tmp_path / "pale.png", 0.5 + (noise(1) - 0.5) / 4)
    scores = [Health(60).measure(Shot(p, "", teacher))["score"] for p in (teacher, pale)]
    assert scores == [pytest.approx(1.0), pytest.approx(0.25, abs=0.02)]


def test_fidelity_needs_the_teachers_picture_in_the_same_size(tmp_path):
    a, b = save(tmp_path / "a.png", noise(0)), save(tmp_path / "b.png", noise(1, (16, 16, 3)))
    assert Fidelity(60).measure(Shot(a, "")) is None and Fidelity(60).measure(Shot(a, "", b)) is None
    assert Fidelity(60).measure(Shot(a, "", a)) == {"score": pytest.approx(1), "ssim": pytest.approx(1), "psnr": 100.0}


# ------------------------------------------------------------------------------------------------ a round as a whole


def rows_of(pictures: list[np.ndarray], folder: Path) -> list[dict]:
    """Manifest rows of a round with health scores."""
    folder.mkdir()
    engine, rows = Scoring([Health(60)]), []
    for i, pixels in enumerate(pictures):
        same = {"seed": i, "height": 32, "width": 32}
        rows.append({"file": f"{i}.png", "prompt": f"prompt {i}", "ok": True} | same)
        engine.submit(Shot(save(folder / f"{i}.png", pixels), f"prompt {i}"))
    scores = engine.collect()
    compare_prompts(scores, {row["file"]: row["prompt"] for row in rows})
    return [row | {"scores": scores[row["file"]]} for row in rows]


def patches(seed: int) -> np.ndarray:
    """Large coloured patches, as pictures have them."""
    return np.kron(noise(seed, (4, 4, 3)), np.ones((8, 8, 1)))


def test_a_healthy_round_raises_no_alarm(tmp_path):
    teacher = rows_of([patches(i) for i in range(8)], tmp_path / "teacher")
    assert alarms(rows_of([patches(i + 8) for i in range(8)], tmp_path / "student"), teacher) == []
    json.dumps(teacher)  # as the manifest holds them


@pytest.mark.parametrize(
    "name, spoil, said",
    [
        ("grey mush", lambda i: 0.5 + (patches(i) - 0.5) / 3, ["contrast is 3", "saturation is 3"]),
        ("oversaturated", lambda i: (patches(i) > 0.5).astype(float), ["contrast is 180%", "saturation is 150%"]),
        ("collapsed", lambda i: patches(0), ["pictures of different prompts are all the same"]),
        ("nearly collapsed", lambda i: (2 * patches(0) + patches(i)) / 3, ["difference between prompts is "]),
        ("one black", lambda i: patches(i) * (i != 3), ["1 of 8 pictures are black or flat, the first one 3.png"]),
    ],
)
def test_collapse_is_noticed(name, spoil, said, tmp_path):
    teacher = rows_of([patches(i) for i in range(8)], tmp_path / "teacher")
    found = alarms(rows_of([spoil(i) for i in range(8)], tmp_path / "student"), teacher)
    assert all(any(words in alarm for alarm in found) for words in said), found


def test_only_pictures_of_the_same_prompt_noise_and_size_are_compared(tmp_path):
    teacher = rows_of([patches(i) for i in range(8)], tmp_path / "teacher")
    pale = rows_of([0.5 + (patches(i) - 0.5) / 3 for i in range(8)], tmp_path / "student")
    for changed in ({"seed": 99}, {"height": 64}, {"prompt": "another"}):
        assert alarms([row | changed for row in pale], teacher) == []
    assert len(alarms(pale[:1], teacher)) == 4, "also where the round has fewer pictures than the teacher's"
    unscored = [row | {"scores": {}} for row in pale]
    assert alarms(unscored, teacher) == [] and alarms(pale, unscored) == []


def test_what_failed_enters_no_mean_and_is_counted():
    good = {"score": 8.0, "ok": True}
    bad = {"score": 0.0, "ok": False}
    row = {"file": "", "prompt": "", "seed": 0, "height": 8, "width": 8}
    rows = [row | {"scores": {"vlm": v}} for v in (good, bad, good, bad)] + [row]
    assert means(rows) == {"vlm": 8.0} and failures(rows) == {"vlm": (2, 4)}
    assert alarms(rows, []) == ["vlm failed for 2 of 4 pictures"]
    assert means(rows[1:2]) == {}, "nothing is known, which is not zero"


# ------------------------------------------------------------------------------------------------ the engine


class Scripted(Scorer):
    name, at_once = "scripted", None

    def __init__(self, measure, timeout=5.0, at_once=None):
        super().__init__(timeout)
        self._measure, self.at_once = measure, at_once

    def measure(self, shot):
        return self._measure(shot)


def score_all(scorers, count, **limits) -> tuple[dict, float]:
    engine = Scoring(scorers, **limits)
    for i in range(count):
        engine.submit(Shot(Path(f"{i}.png"), f"prompt {i}"))
    started = time.perf_counter()
    return engine.collect(), time.perf_counter() - started


def test_waiting_for_a_slot_takes_nothing_from_the_calls_time():
    def slow(shot):
        time.sleep(0.1)
        return {"score": 1.0}

    scores, _ = score_all([Scripted(slow, timeout=0.3)], 12, at_once=2)
    assert len(scores) == 12 and all(s["scripted"]["ok"] for s in scores.values())


def test_no_more_calls_at_once_than_allowed():
    running, most, lock = [0], [0], threading.Lock()

    def count(shot):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return {"score": 1.0}

    score_all([Scripted(count)], 20, at_once=3)
    assert most[0] == 3
    most[0] = 0
    score_all([Scripted(count, at_once=1)], 5, at_once=3)
    assert most[0] == 1


def test_a_call_that_hangs_is_given_up_and_the_others_are_kept(caplog):
    def hang_on_two(shot):
        if shot.path.name == "2.png":
            threading.Event().wait(60)
        return {"score": 1.0}

    scores, seconds = score_all([Scripted(hang_on_two, timeout=0.2)], 5)
    assert seconds < 2 and [s["scripted"]["ok"] for _, s in sorted(scores.items())] == [True, True, False, True, True]
    hung = scores["2.png"]["scripted"]
    assert hung["score"] == 0.0 and hung["error"] == "no answer within 0.2 s" and 0.2 <= hung["latency_s"] < 1
    assert "scripted of 2.png failed: no answer within 0.2 s | prompt: prompt 2" in caplog.text


def test_the_rounds_deadline_holds_whatever_the_calls_do():
    scores, seconds = score_all([Scripted(lambda shot: threading.Event().wait(60))], 8, at_once=2, deadline=0.3)
    assert seconds < 1 and len(scores) == 8
    assert {s["scripted"]["error"] for s in scores.values()} == {"not there 0.3 s after drawing"}


def test_a_scorer_that_blocks_the_event_loop_itself_does_not_hold_the_round():
    class Blocking(Scripted):
        async def score(self, shot):
            time.sleep(2)

    scores, seconds = score_all([Blocking(None)], 3, deadline=0.3)
    assert seconds < 1 and not any(s["scripted"]["ok"] for s in scores.values())


@pytest.mark.parametrize("result", [{"score": math.nan}, {"score": "high"}, {}, ZeroDivisionError()])
def test_results_that_are_no_scores_are_failures(result):
    def broken(shot):
        if isinstance(result, Exception):
            raise result
        return result

    scores, _ = score_all([Scripted(broken)], 1)
    assert scores["0.png"]["scripted"]["ok"] is False and scores["0.png"]["scripted"]["error"]


def test_a_judge_that_hangs_keeps_no_other_scorer_waiting():
    """Else the collapse alarm would be lost with the judge."""
    quick = Scripted(lambda shot: {"score": 1.0}, at_once=1)
    quick.name = "quick"
    hanging = Scripted(lambda shot: threading.Event().wait(60), timeout=60)
    scores, _ = score_all([hanging, quick], 16, at_once=2, deadline=0.5)
    assert [s["quick"]["ok"] for s in scores.values()] == [True] * 16
    assert not any(s["scripted"]["ok"] for s in scores.values())


def test_a_cancellation_from_within_is_a_failure():
    class Cancelled(Scripted):
        async def score(self, shot):
            raise asyncio.CancelledError

    scores, _ = score_all([Cancelled(None)], 1)
    assert scores["0.png"]["scripted"]["error"].startswith("CancelledError")


def test_long_errors_are_cut_to_a_line():
    def page(shot):
        raise ValueError("<html>\n" * 1000)

    error = score_all([Scripted(page)], 1)[0]["0.png"]["scripted"]["error"]
    assert len(error) < 350 and "\n" not in error


def test_a_scorer_with_nothing_to_say_leaves_no_score():
    assert score_all([Scripted(lambda shot: None)], 2)[0] == {}


# ------------------------------------------------------------------------------------------------ the judge


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """prompts → (prompt → verdict, the server's memory)."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(scoring, "JUDGE_PAUSE", 0.02)
    pytest.importorskip("openai")

    def ask(prompts, timeout=5.0, **limits):
        with judge_server() as server:
            engine = Scoring([Judge("judge", server.url, timeout)], **limits)
            for i, prompt in enumerate(prompts):
                engine.submit(Shot(save(tmp_path / f"{i}.png", noise(i)), prompt))
            scores = engine.collect()
            return {p: scores[f"{i}.png"]["vlm"] for i, p in enumerate(prompts)}, server

    return ask


def test_a_judge_sees_prompt_and_picture_and_its_score_is_kept(ask):
    verdicts, _ = ask(['a "quoted" cat', "slow grün"])
    for verdict in verdicts.values():
        assert verdict["ok"] and verdict["score"] == 7.0 and verdict["reason"] == "fine"
    assert verdicts["slow grün"]["latency_s"] >= 0.3


def test_only_what_may_pass_is_tried_again(ask):
    verdicts, server = ask(["429 a", "500 b", "400 c", "cut d", "nonsense e", "eleven f"])
    assert [v["ok"] for v in verdicts.values()] == [True, False, False, False, False, False]
    assert dict(server.asked) == {"429 a": 3, "500 b": 4, "400 c": 1, "cut d": 1, "nonsense e": 1, "eleven f": 1}
    said = ["InternalServerError", "BadRequestError", "APIConnectionError", "no JSON with a score", "not from 0 to 10"]
    assert all(words in v["error"] for words, v in zip(said, list(verdicts.values())[1:], strict=True))


def test_a_judge_that_hangs_is_given_up(ask):
    started = time.perf_counter()
    verdicts, _ = ask(["hang a", "b"], timeout=0.5)
    assert time.perf_counter() - started < 5
    assert verdicts["b"]["ok"] and verdicts["hang a"]["error"] == "no answer within 0.5 s"


def test_a_key_that_a_server_repeats_is_not_written_down(ask, caplog):
    verdicts, _ = ask(["key a"])
    assert "bad key" in verdicts["key a"]["error"] and "(key)" in verdicts["key a"]["error"]
    assert SECRET not in caplog.text + json.dumps(verdicts)


def test_at_most_so_many_questions_at_once(ask):
    _, server = ask([f"slow {i}" for i in range(9)], at_once=3)
    assert server.most == 3


@pytest.mark.parametrize(
    "answer", ['{"score": true}', '{"score": "7"}', '{"score": NaN}', "[7]", "", "{}", "{score: 7}"]
)
def test_nonsense_is_no_judgement(answer):
    with pytest.raises(ValueError, match="judge's"):
        read_judgement(answer)


# ------------------------------------------------------------------------------------------------ what the user asks


def test_what_cannot_work_is_said_before_weights_load(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for config, said in [
        (ScoringConfig(score=("clip",), clip_model=str(tmp_path)), "--clip_model"),
        (ScoringConfig(score=("vlm",)), "--judge_model"),
        (ScoringConfig(score=("vlm",), judge_model="m"), "--judge_base_url"),
    ]:
        with pytest.raises(UserError, match=said):
            check_scorers(config)
    assert build_scorers(ScoringConfig(score=("none",)), torch.device("cpu")) == []


def test_clip_gives_the_cosine_of_its_embeddings(tmp_path):
    """Against transformers' own similarity, which is the cosine times a learnt scale."""
    folder = random_clip(tmp_path / "clip")
    check_scorers(ScoringConfig(score=("clip",), clip_model=str(folder)))
    picture = save(tmp_path / "a.png", noise(0))
    clip = Clip(str(folder), torch.device("cpu"), 60)
    inputs = clip.processor(text=["a red circle"], images=[Image.open(picture)], return_tensors="pt")
    with torch.no_grad():
        scaled = clip.model(**inputs).logits_per_image.item()
        expected = 100 * scaled / clip.model.logit_scale.exp().item()
    assert clip.measure(Shot(picture, "a red circle"))["score"] == pytest.approx(expected, abs=1e-3)
    clip.measure(Shot(picture, "a very long prompt " * 100))  # cut to what the text encoder takes


def random_clip(folder: Path) -> Path:
    """A very small CLIP with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    folder.mkdir()
    pieces = [c for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    words = [*pieces, *(f"{c}</w>" for c in pieces), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = size | dict(vocab_size=len(words), max_position_embeddings=20, eos_token_id=len(words) - 1)
    config = CLIPConfig(text_config=text, vision_config=size | dict(image_size=16, patch_size=8), projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ on two ranks

PROMPTS = ("a", "slow b", "hang c", "cut d", "429 e", "500 f", "nonsense g")


def _draw_with_a_judge(ranks, pipeline: Path, folder: Path, url: str):
    from models.vae import load_vae

    logging.disable()
    scoring.JUDGE_PAUSE = 0.02
    shape = (16, 1, 2, 2)
    engine = Scoring([Health(60), Fidelity(60), Judge("judge", url, 2.0)], deadline=10)
    sampler = ParallelSampler(load_vae(pipeline, ranks.device), shape, folder, ranks, scoring=engine)
    text = [torch.full((3, 4), float(i + 1)) for i in range(len(PROMPTS))]
    grid = few_step_grid(2, 3.0)
    seen = {}
    for name, prompts in (("teacher", PROMPTS), ("student", PROMPTS), ("one", PROMPTS[:1])):
        round_ = Round(
            prompts, epoch=1 + (name == "one"), step=5, grid=grid, shift=3.0, height=16, width=16, seed=3,
            weights="teacher" if name == "teacher" else "raw",
        )  # fmt: skip
        started = time.perf_counter()
        rows = sampler.draw(round_, lambda x, t, text: x - text[:, 0, 0].view(-1, 1, 1, 1, 1), text[: len(prompts)])
        seen[name] = {row.prompt: row.scores for row in rows}, time.perf_counter() - started
    # A judge that is far from its own limit when the round's deadline comes, on one rank only.
    engine = Scoring([Judge("judge", url, 60.0)], deadline=0.5)
    sampler = ParallelSampler(load_vae(pipeline, ranks.device), shape, folder / "late", ranks, scoring=engine)
    round_ = Round(("a", "b", "hang c"), 1, 1, grid, 3.0, 16, 16, 3)
    started = time.perf_counter()
    rows = sampler.draw(round_, lambda x, t, text: x - text[:, 0, 0].view(-1, 1, 1, 1, 1), text[:3])
    seen["late"] = {row.prompt: row.scores for row in rows}, time.perf_counter() - started
    sampler.finish()
    return seen


def test_two_ranks_score_while_they_draw_and_agree(random_single_pipeline_dir, tmp_path):
    pytest.importorskip("openai")
    with judge_server() as server:
        first, second = run_ranks(_draw_with_a_judge, 2, random_single_pipeline_dir, tmp_path, server.url)
    for name in first:
        (scores, seconds), (others, other_seconds) = first[name], second[name]
        assert scores == others and seconds < 8 and other_seconds < 8
    judged = {prompt: by["vlm"]["ok"] for prompt, by in first["student"][0].items()}
    assert judged == dict.fromkeys(PROMPTS, False) | {"a": True, "slow b": True, "429 e": True}
    assert first["late"][0]["a"]["vlm"]["ok"] and first["late"][1] < 3
    assert first["late"][0]["hang c"]["vlm"]["error"] == "not there 0.5 s after drawing"
    assert "fidelity" not in first["teacher"][0]["a"], "the teacher is not compared with itself"
    same_noise = first["student"][0]["a"]
    assert same_noise["fidelity"]["psnr"] == 100.0 and same_noise["health"]["score"] == pytest.approx(1.0)
    manifest = read_manifest(tmp_path)
    assert {row["prompt"]: row["scores"] for row in manifest if row["weights"] == "raw" and row["epoch"] == 1} == (
        first["student"][0]
    )
