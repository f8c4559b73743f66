"""The teacher against the stock pipeline that it was read from, for all three families."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

import models.teacher
from config.errors import UserError
from models.flow import few_step_grid, few_step_scheduler
from models.folding import fold_text
from models.teacher import (
    Expert,
    Teacher,
    TeacherInfo,
    WanVelocity,
    check_weights,
    default_guidance,
    download_weights,
    encode_text,
    inspect_teacher,
    load_teacher,
    load_text_pipeline,
    resolve_dtype,
)
from models.vae import decode, load_vae, to_pil
from sampling.ddim import randn, rollout

CPU = torch.device("cpu")
FAMILIES = ("random_pipeline_dir", "random_single_pipeline_dir", "random_ti2v_pipeline_dir")
PROMPT, NEGATIVE = "a small red star left of a large blue ring on a yellow background", "a green triangle"
NUM_STEPS, SHIFT, SEED = 6, 3.0, 11


def fold_alone(embeds: torch.Tensor) -> torch.Tensor:
    """(1, n + 4, D + 1) from (n, D)."""
    return fold_text(embeds[None], torch.ones(1, len(embeds), dtype=torch.bool))


def note_timesteps(transformers: list) -> list[torch.Tensor]:
    """A list that fills with the timesteps that the transformers are given, the first sample's alone."""
    timesteps = []

    def note(module, args, kwargs):
        timesteps.append((args[1] if len(args) > 1 else kwargs["timestep"])[0].clone())

    for transformer in transformers:
        transformer.register_forward_pre_hook(note, with_kwargs=True)
    return timesteps


class Family:
    """One teacher, ours and stock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.info = folder, inspect_teacher(str(folder))
        self.stock = WanPipeline.from_pretrained(folder)
        self.stock.scheduler = few_step_scheduler(SHIFT)
        self.stock.set_progress_bar_config(disable=True)
        self.embeds, self.negative = encode_text(load_text_pipeline(self.info, CPU, torch.float32), [PROMPT, NEGATIVE])
        self.size = 2 * self.info.pixels_per_patch  # the least with two patches either way

    def teacher(self, guidance_scale: float | None = None, guidance_scale_2: float | None = None) -> Teacher:
        return load_teacher(self.info, CPU, torch.float32, self.negative, guidance_scale, guidance_scale_2)

    def draw(self, teacher: Teacher) -> torch.Tensor:
        noise = randn(self.info.latent_shape(self.size, self.size), [torch.Generator().manual_seed(SEED)])
        return rollout(teacher, noise, few_step_grid(NUM_STEPS, SHIFT), fold_alone(self.embeds)).latents

    def draw_stock(self, guidance_scale: float, guidance_scale_2: float | None = None, output_type: str = "latent"):
        return self.stock(
            PROMPT, NEGATIVE, height=self.size, width=self.size, num_frames=1, num_inference_steps=NUM_STEPS,
            guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2, output_type=output_type,
            generator=torch.Generator().manual_seed(SEED),
        ).frames  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    return Family(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def two_experts(random_pipeline_dir) -> Family:
    return Family(random_pipeline_dir)


# ------------------------------------------------------------------------------------------------ as WanPipeline


def test_draws_what_the_stock_pipeline_draws(family):
    ours, theirs = family.draw(family.teacher(4.0)), family.draw_stock(4.0)
    assert ours.shape == theirs.shape == (1, *family.info.latent_shape(family.size, family.size))
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for other in (family.draw_stock(3.0), family.draw_stock(1.0)):  # what is compared can tell guidance scales apart
        assert (other - theirs).abs().max() > 1e-2


def test_decodes_what_the_stock_pipeline_decodes(family):
    latents = family.draw(family.teacher(4.0))
    ours = to_pil(decode(load_vae(family.folder, CPU), latents))[0]
    theirs = family.draw_stock(4.0, output_type="pil")[0][0]
    assert ours.size == theirs.size == (family.size, family.size) and np.std(theirs) > 5
    differences = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int))
    assert differences.max() <= 1 and differences.mean() < 0.01  # rounded alike, but for values between two levels


@pytest.mark.parametrize("guidance", [(4.0, 2.5), (2.0, 6.0), (3.0, 1.0), (1.0, 1.0), (1.0, 3.0), (0.0, 2.0)])
def test_each_expert_has_its_guidance(two_experts, guidance):
    ours, theirs = two_experts.draw(two_experts.teacher(*guidance)), two_experts.draw_stock(*guidance)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_guidance_that_is_not_given_is_wan_s_own(family):
    own = (4.0, 3.0) if family.info.boundary_ratio else (5.0, None)
    torch.testing.assert_close(family.draw(family.teacher()), family.draw_stock(*own), rtol=0, atol=1e-4)


def test_networks_are_told_the_scheduler_s_timesteps(family):
    teacher = family.teacher(4.0)
    ours = note_timesteps([expert.field.transformer for expert in teacher.experts])
    family.draw(teacher)
    stock = [t for t in (family.stock.transformer, family.stock.transformer_2) if t is not None]
    theirs = note_timesteps(stock)
    family.draw_stock(4.0)
    theirs = theirs[::2]  # two calls a step, one for each branch; ours has both in one
    assert len(ours) == len(theirs) == NUM_STEPS
    for a, b, expected in zip(ours, theirs, family.stock.scheduler.timesteps, strict=True):
        assert a.shape == b.shape and a.unique().tolist() == b.unique().tolist() == [float(expected)]


def test_a_tensor_of_times_is_the_same_as_a_number(family):
    teacher, text = family.teacher(4.0), fold_alone(family.embeds)
    x = torch.randn(2, *family.info.latent_shape(family.size, family.size), generator=torch.Generator().manual_seed(0))
    expected = teacher(x, 0.3, text.expand(2, -1, -1))
    for t in (torch.tensor(0.3), torch.tensor([0.3, 0.3])):
        torch.testing.assert_close(teacher(x, t, text.expand(2, -1, -1)), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_and_embeddings(two_experts):
    pipeline = load_text_pipeline(two_experts.info, CPU, torch.bfloat16)
    embeds, negative = encode_text(pipeline, [PROMPT, NEGATIVE])
    assert embeds.dtype == torch.bfloat16 and pipeline.text_encoder.dtype == torch.bfloat16
    teacher = load_teacher(two_experts.info, CPU, torch.bfloat16, negative, 4.0)
    assert {expert.field.transformer.dtype for expert in teacher.experts} == {torch.bfloat16}
    noise = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    v, exact = (
        field(noise, 0.5, text)
        for field, text in ((teacher, fold_alone(embeds)), (two_experts.teacher(4.0), fold_alone(two_experts.embeds)))
    )
    assert v.dtype == torch.float32
    assert 0 < (v - exact).square().mean().sqrt() < 0.1 * exact.std()


# ------------------------------------------------------------------------------------------------ experts


class Constant:
    """A velocity field of one value, which notes the batches that it is asked for."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, []

    def __call__(self, x_t, t, prompt_embeds):
        self.calls.append((len(x_t), t))
        return torch.full_like(x_t, self.value)


@pytest.fixture
def constants_of_two() -> Teacher:
    """Two experts, unguided: 1 for high noise, 2 for low."""
    return Teacher([Expert(Constant(1.0), 1.0, 0.875), Expert(Constant(2.0), 1.0, 0.0)], torch.zeros(1, 16))


@pytest.mark.parametrize(("t", "expert"), [(1.0, 1), (0.876, 1), (0.875, 1), (0.8749, 2), (0.3, 2), (0.0, 2)])
def test_the_boundary_belongs_to_high_noise(constants_of_two, t, expert):
    x = torch.zeros(2, 16, 1, 2, 2)
    for form in (t, torch.tensor(t), torch.tensor([t, t])):
        assert constants_of_two(x, form, torch.zeros(2, 5, 17)).unique().tolist() == [expert]


def test_a_boundary_that_no_float_holds_exactly():
    teacher = Teacher([Expert(Constant(1.0), 1.0, 0.9), Expert(Constant(2.0), 1.0, 0.0)], torch.zeros(1, 16))
    x = torch.zeros(1, 16, 1, 2, 2)
    for form in (0.9, torch.tensor(0.9), torch.tensor([0.9])):
        assert teacher(x, form, torch.zeros(1, 5, 17)).unique().tolist() == [1]


@pytest.mark.parametrize("method", ["__call__", "conditional"])
def test_mixed_times_choose_each_sample_s_expert(two_experts, method):
    velocity = getattr(two_experts.teacher(4.0, 2.5), method)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 16, 1, 4, 4, generator=generator)
    text = fold_text(torch.randn(5, 6, 16, generator=generator), torch.ones(5, 6, dtype=torch.bool))
    t = torch.tensor([0.3, 0.95, 0.875, 0.8749, 1.0])
    together = velocity(x, t, text)
    for i in range(5):
        alone = velocity(x[i : i + 1], t[i].item(), text[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_conditional_is_guidance_1(two_experts):
    x = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    text = fold_alone(two_experts.embeds)
    for t in (0.95, 0.3):
        conditional = two_experts.teacher(4.0).conditional(x, t, text)
        assert torch.equal(conditional, two_experts.teacher(1.0)(x, t, text))
        assert (conditional - two_experts.teacher(4.0)(x, t, text)).abs().max() > 1e-2


def test_both_branches_in_one_forward_and_one_without_guidance():
    x, text, t = torch.zeros(3, 16, 1, 2, 2), torch.zeros(3, 5, 17), torch.tensor([0.2, 0.4, 0.6])
    for guidance_scale, batch in ((4.0, 6), (1.0, 3)):
        field = Constant(1.0)
        Teacher([Expert(field, guidance_scale, 0.0)], torch.zeros(7, 16))(x, t, text)
        ((size, told),) = field.calls
        assert size == batch and told.tolist() == t.tolist() * (batch // 3)


def test_no_gradient_reaches_the_teacher(two_experts):
    teacher = two_experts.teacher(4.0)
    x = torch.randn(1, 16, 1, 4, 4, requires_grad=True)
    assert not teacher(x, 0.5, fold_alone(two_experts.embeds)).requires_grad
    for expert in teacher.experts:
        assert not expert.field.transformer.training
        assert not any(p.requires_grad for p in expert.field.transformer.parameters())


def test_autocast_keeps_the_output_in_float32(two_experts):
    transformer = two_experts.teacher(1.0).experts[1].field.transformer
    x, text = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0)), fold_alone(two_experts.embeds)
    exact = WanVelocity(transformer)(x, 0.5, text)
    v = WanVelocity(transformer, autocast=torch.bfloat16)(x, 0.5, text)
    assert v.dtype == torch.float32
    assert 0 < (v - exact).square().mean().sqrt() < 0.1 * exact.std()


# ------------------------------------------------------------------------------------------------ text


def test_text_is_the_pipeline_s_own(two_experts):
    prompts = [PROMPT, "", "  a red &amp; blue   star ", "a", "a star on a red background " * 120]
    got = encode_text(load_text_pipeline(two_experts.info, CPU, torch.float32), prompts)
    with torch.no_grad():
        expected, _ = two_experts.stock.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
    for embeds, padded in zip(got, expected, strict=True):
        length = int(padded.abs().sum(1).gt(0).sum())  # padding is zero, tokens are not
        assert embeds.shape == (length, 16)
        torch.testing.assert_close(embeds, padded[:length], rtol=1e-5, atol=1e-5)
    assert len(got[1]) == 1 and len(got[4]) == 512 and len({len(e) for e in got}) == 5


# ------------------------------------------------------------------------------------------------ inspection


@pytest.mark.parametrize("part", ["transformer_2", "text_encoder", "vae"])
def test_configs_without_weights(random_pipeline_dir, tmp_path, part):
    folder = Path(shutil.copytree(random_pipeline_dir, tmp_path / "teacher"))
    check_weights(inspect_teacher(str(folder)))
    for file in (folder / part).glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=f"--teacher_path {folder}: no weights in {part}; .*safetensors"):
        check_weights(inspect_teacher(str(folder)))


def test_info_of_each_family(random_pipeline_dir, random_single_pipeline_dir, random_ti2v_pipeline_dir):
    two, one, ti2v = (
        inspect_teacher(str(d)) for d in (random_pipeline_dir, random_single_pipeline_dir, random_ti2v_pipeline_dir)
    )
    assert list(two.transformer_configs) == ["transformer", "transformer_2"] and two.boundary_ratio == 0.875
    assert list(one.transformer_configs) == ["transformer"] and one.boundary_ratio is None
    assert (two.expand_timesteps, one.expand_timesteps, ti2v.expand_timesteps) == (False, False, True)
    assert [i.latent_shape(64, 96) for i in (two, ti2v)] == [(16, 1, 8, 12), (48, 1, 4, 6)]
    assert [i.pixels_per_patch for i in (two, ti2v)] == [16, 32]
    assert two.flow_shift == 3.0 and inspect_teacher(str(random_pipeline_dir), flow_shift=12.0).flow_shift == 12.0


def test_shift_of_a_flow_match_euler_scheduler(random_pipeline_dir, tmp_path):
    folder = copy_configs(random_pipeline_dir, tmp_path)
    (folder / "scheduler/scheduler_config.json").write_text('{"shift": 5.0}')
    assert inspect_teacher(str(folder)).flow_shift == 5.0


def copy_configs(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "teacher", ignore=shutil.ignore_patterns("*.safetensors")))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_refused(name: Path | str, *words: str, **kwargs) -> None:
    """A one-line UserError which names the flag, the value and `words`."""
    with pytest.raises(UserError) as error:
        inspect_teacher(str(name), **kwargs)
    message = str(error.value)
    assert "\n" not in message
    for word in (kwargs.get("flag", "--teacher_path"), str(name), *words):
        assert word in message


def test_missing_folder_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused("no/such-teacher", "no such folder", "hub", "local folder")
    assert_refused("no/such-teacher", "no such folder", flag="--student_path")
    assert_refused(tmp_path / "missing", "no such folder")
    assert_refused("./missing", "no such folder")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(HTTPError("proxy said no"), "proxy said no"), (OSError("no disk\nmore"), "no disk"), (OSError(), "OSError")],
)
def test_a_broken_connection(monkeypatch, error, reason):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(models.teacher, "snapshot_download", snapshot_download)
    assert_refused("some/teacher", f"({reason})", "local folder")


def test_weights_are_those_of_the_configs_that_were_read(random_pipeline_dir, tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(random_pipeline_dir, snapshot)
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append(revision)
        return str(snapshot)

    monkeypatch.setattr(models.teacher, "snapshot_download", snapshot_download)
    download_weights(inspect_teacher("some/teacher", "a-branch-that-moves"))
    assert asked == ["a-branch-that-moves", "0123abc"]


@pytest.mark.parametrize("name", ["WanImageToVideoPipeline", "WanVACEPipeline", "FluxPipeline"])
def test_other_pipelines(random_pipeline_dir, tmp_path, name):
    folder = copy_configs(random_pipeline_dir, tmp_path)
    edit(folder / "model_index.json", _class_name=name)
    assert_refused(folder, name, "WanPipeline")


@pytest.mark.parametrize("changes", [{"image_dim": 1280}, {"in_channels": 36}])
def test_a_transformer_that_reads_pictures(random_pipeline_dir, tmp_path, changes):
    folder = copy_configs(random_pipeline_dir, tmp_path)
    edit(folder / "transformer_2/config.json", **changes)
    assert_refused(folder, "transformer_2", "text-to-video")


def test_original_checkpoints(tmp_path):
    for name in ("a14b", "wan2.1"):
        (tmp_path / name).mkdir()
    (tmp_path / "a14b/Wan2.1_VAE.pth").touch()
    (tmp_path / "wan2.1/config.json").write_text('{"_class_name": "WanModel", "dim": 1536}')
    for name in ("a14b", "wan2.1"):
        assert_refused(tmp_path / name, "model_index.json", "original", "Diffusers")


@pytest.mark.parametrize("changes", [{"boundary_ratio": None}, {"transformer_2": [None, None]}])
def test_experts_and_boundary_must_fit(random_pipeline_dir, tmp_path, changes):
    folder = copy_configs(random_pipeline_dir, tmp_path)
    edit(folder / "model_index.json", **changes)
    assert_refused(folder, "boundary_ratio")


def test_missing_and_broken_files(random_pipeline_dir, tmp_path):
    folder = copy_configs(random_pipeline_dir, tmp_path)
    (folder / "scheduler/scheduler_config.json").write_text("{not json")
    assert_refused(folder, "scheduler_config.json", "JSON")
    (folder / "scheduler/scheduler_config.json").unlink()
    assert_refused(folder, "scheduler/scheduler_config.json", "not found")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "model_index.json", "not found")


# ------------------------------------------------------------------------------------------------ small things


@pytest.mark.parametrize(
    ("boundary_ratio", "given", "expected"),
    [
        (0.875, (None, None), (4.0, 3.0)),
        (0.875, (None, 2.0), (4.0, 2.0)),
        (0.875, (None, 0.0), (4.0, 0.0)),
        (0.875, (6.0, None), (6.0, 6.0)),
        (0.875, (6.0, 2.0), (6.0, 2.0)),
        (0.875, (6.0, 0.0), (6.0, 0.0)),
        (0.875, (1.0, 3.0), (1.0, 1.0)),
        (0.875, (0.0, None), (1.0, 1.0)),
        (None, (None, None), (5.0, 5.0)),
        (None, (6.0, None), (6.0, 6.0)),
    ],
)
def test_default_guidance(boundary_ratio, given, expected):
    info = TeacherInfo("x", Path(), None, {}, boundary_ratio, False, 3.0, {})
    assert default_guidance(info, *given) == expected


def test_auto_dtype():
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("float16", torch.device("cuda")) == torch.float16
    with pytest.raises(UserError, match="--teacher_dtype float16"):
        resolve_dtype("float16", CPU)
