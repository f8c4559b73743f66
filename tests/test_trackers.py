"""Trackers: real ones where they are installed, offline; broken ones as small fakes."""

import json
import logging
import sqlite3
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from config.config import RunConfig
from config.errors import UserError
from distillation import trackers
from distillation.progress import Progress
from distillation.trackers import TRACKERS, Trackers, chosen_trackers
from distributed.process_group import Ranks

PROMPTS = ["a cat", "a dog/wolf, 50 % each", "a bird", "a fish"]
ROW = {"step": 2, "epoch": 1, "phase": 1, "objective": "trajectory", "loss": 0.5, "lr": 1e-3, "samples_per_second": 3.0}


@pytest.fixture
def samples(tmp_path):
    """Two ranks' rows; the last picture failed, and a file of its name is from an earlier run."""
    folder = tmp_path / "samples"
    folder.mkdir()
    rows = []
    for index, prompt in enumerate(PROMPTS):
        row = {"file": f"epoch_0001_rank_{index // 2}_sample_{index % 2:02d}.png", "prompt": prompt, "step": 2}
        rows.append(row | {"prompt_index": index, "weights": "raw", "ok": index < 3})
        Image.new("RGB", (32, 16), (40 * index, 200, 90)).save(folder / row["file"])
    return SimpleNamespace(folder=folder, rows=rows)


def run_config(folder, *names):
    return RunConfig(output_dir=str(folder / "out"), report_to=names, run_name="my_run")


def track(config, samples):
    """A short run: the teacher's round, a row, a round."""
    with Trackers(config, is_main=True) as tracking:
        tracking.start({"seed": 0, "sample_prompts": ("a cat",)})
        tracking.log_round(0, [row | {"weights": "teacher"} for row in samples.rows], samples.folder, {"health": 1.0})
        tracking.log(2, ROW)
        tracking.log_round(2, samples.rows, samples.folder, {"health": 0.75})


def fake_wandb(monkeypatch, fails_at="", seen=None):
    """wandb as far as it is used; what `fails_at` names raises. What it is told goes into `seen`."""
    seen = [] if seen is None else seen

    def reach(name):
        if name == fails_at:
            raise ConnectionError(f"{name} is\nout of order")

    class Run:
        def __init__(self, **options):
            reach("init")

        def log(self, values, step, commit):
            reach("log")
            seen.append((values, step, commit))

        def finish(self, exit_code):
            reach("finish")

    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="fake")
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="online"))
    module.login = lambda **options: fails_at != "key"
    module.Image = lambda path, caption: (path, caption)
    module.init = Run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


# ---------------------------------------------------------------------------------------------- the real ones


def test_tensorboard_holds_figures_and_pictures_of_all_ranks_at_their_steps(tmp_path, samples):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(run_config(tmp_path, "tensorboard"), samples)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    figures = {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert figures["train/loss"] == [(2, 0.5)] and figures["train/samples_per_second"] == [(2, 3.0)]
    assert figures["scores/health"] == [(2, 0.75)] and figures["teacher_scores/health"] == [(0, 1.0)]
    pictures = {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}
    names = [f"{index:03d} {prompt}" for index, prompt in enumerate(PROMPTS[:3])]
    assert pictures == {f"samples/{n}": [2] for n in names} | {f"teacher_samples/{n}": [0] for n in names}
    assert events.Images(f"samples/{names[0]}")[0].width == 32
    assert b"sample_prompts" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_wandb_offline_drops_nothing(tmp_path, samples, monkeypatch, capfd):
    pytest.importorskip("wandb", minversion="0.31")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    track(run_config(tmp_path, "wandb"), samples)
    [log] = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    assert all(text in written for text in (b"my_run", b"train/loss", b"scores/health", PROMPTS[2].encode()))
    assert PROMPTS[3].encode() not in written
    assert len(list(log.parent.glob("files/media/images/*.png"))) == 6
    assert "monotonic" not in capfd.readouterr().err
    assert not any(b"f" * 40 in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_trackio_local(tmp_path, samples, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    track(run_config(tmp_path, "trackio"), samples)
    with sqlite3.connect(tmp_path / "trackio" / "wan-distillation.db") as database:
        found = [(step, json.loads(m)) for step, m in database.execute("select step, metrics from metrics order by id")]
    assert [step for step, _ in found] == [0, 2, 2]
    assert found[1][1]["train/loss"] == 0.5 and found[2][1]["scores/health"] == 0.75
    captions = {key: value["caption"] for key, value in found[2][1].items() if key.startswith("samples/")}
    assert captions == {f"samples/{index:03d}": prompt for index, prompt in enumerate(PROMPTS[:3])}
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 6


# ---------------------------------------------------------------------------------------------- what W&B is told


def test_wandb_closes_a_step_with_its_pictures_and_loses_no_row_that_comes_late(tmp_path, samples, monkeypatch):
    seen = []
    fake_wandb(monkeypatch, seen=seen)
    with Trackers(run_config(tmp_path, "wandb"), is_main=True) as tracking:
        tracking.start({})
        tracking.log(2, ROW)
        tracking.log_round(2, samples.rows, samples.folder, {})
        tracking.log(2, ROW)
        tracking.log(4, ROW)
    assert [(step, commit) for _, step, commit in seen] == [(2, False), (2, True), (3, False), (4, False)]
    assert [caption for _, caption in seen[1][0]["samples"]] == PROMPTS[:3]


def test_wandb_gets_many_pictures_in_several_galleries(tmp_path, samples, monkeypatch):
    seen = []
    fake_wandb(monkeypatch, seen=seen)
    rows = [samples.rows[0] | {"prompt_index": index} for index in range(205)]
    with Trackers(run_config(tmp_path, "wandb"), is_main=True) as tracking:
        tracking.start({})
        tracking.log_round(2, rows, samples.folder, {})
    [(values, _, _)] = seen
    assert {name: len(gallery) for name, gallery in values.items()} == {
        "samples": 100,
        "samples_from_100": 100,
        "samples_from_200": 5,
    }


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("fails_at", ["init", "key", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(tmp_path, samples, monkeypatch, caplog, fails_at):
    fake_wandb(monkeypatch, fails_at)
    kept = []
    told = SimpleNamespace(
        log=lambda step, figures: kept.append(step),
        log_round=lambda step, group, pictures, figures: kept.append((step, group)),
        close=lambda failed: kept.append("closed"),
    )
    monkeypatch.setitem(TRACKERS, "trackio", lambda about: told)
    monkeypatch.setattr(trackers, "chosen_trackers", lambda names: list(names))
    track(run_config(tmp_path, "wandb", "trackio"), samples)
    [message] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert message.startswith("--report_to wandb failed and is left out from here on: ") and "\n" not in message
    assert ("WANDB_API_KEY" if fails_at == "key" else f"ConnectionError: {fails_at} is out of order") in message
    assert kept == [(0, "teacher_samples"), 2, (2, "samples"), "closed"]


def test_a_tracker_that_hangs_holds_nobody_up(tmp_path, samples, monkeypatch, caplog):
    never = threading.Event()
    fake_wandb(monkeypatch).init = lambda **options: never.wait()
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    started = time.monotonic()
    track(run_config(tmp_path, "wandb"), samples)
    assert time.monotonic() - started < 5
    [message] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert message == "--report_to wandb: not done after 0.2 seconds; it is not waited for"
    never.set()


def test_a_missing_package_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--report_to wandb: .*; run: pip install 'wandb>=0.31'$"):
        chosen_trackers(("wandb",))
    assert chosen_trackers(("all",)) == chosen_trackers(("none",)) == chosen_trackers(()) == []


def test_a_folder_of_a_trackers_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "my_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(TRACKERS["wandb"], "package", "my_tracker")
    assert not trackers.is_installed("wandb")
    (tmp_path / "my_tracker" / "__init__.py").touch()
    assert trackers.is_installed("wandb")


def test_all_says_which(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(trackers, "is_installed", lambda name: name != "wandb")
    assert Trackers(run_config(tmp_path, "all"), is_main=True).names == ["tensorboard", "trackio"]
    assert "--report_to all: tensorboard, trackio" in caplog.text
    assert Trackers(run_config(tmp_path, "all"), is_main=False).names == []


# ---------------------------------------------------------------------------------------------- where rows come from


def test_a_row_of_metrics_goes_to_the_trackers_too(tmp_path):
    told = []
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), False)
    tracking = SimpleNamespace(log=lambda step, row: told.append((step, row)))
    progress = Progress(tmp_path / "metrics.jsonl", 4, 2, 8, ranks, tracking)
    trained = {"student": SimpleNamespace(learning_rate=1e-3)}
    for step in (1, 2, 3):
        progress.advance(step, 1, 1, "trajectory", {"loss": torch.tensor(float(step))}, trained, ends_phase=False)
    progress.close()
    [row] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told == [(2, row)] and row["loss"] == 1.5
