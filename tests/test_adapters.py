"""Adapters: students and fake scores on the teacher's own weights, which are held once and never change."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from data.prompt_embeddings import Batch
from distillation.objective import Noise, Setup, build_objective
from distributed.process_group import Ranks
from distributed.sharding import wrap
from models.adapters import Adapted, remove_adapters
from models.compiling import compile_blocks
from models.flow import few_step_grid
from models.folding import fold_text
from models.scores import fake_scores
from models.teacher import WanVelocity, inspect_teacher, load_teacher
from tests.conftest import TEXT_DIM, TRANSFORMER
from tests.ranks import run_ranks

TINY = Path(__file__).parents[1] / "models" / "tiny_wan"


@pytest.fixture
def asked():
    torch.manual_seed(0)
    text = fold_text(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    return torch.randn(2, 16, 1, 4, 4), 0.5, text


def student_of(teacher, rank: int = 2, alpha: float | None = None, moved: bool = False) -> Adapted:
    """On the low-noise expert; `moved`: with adapters that do something."""
    student = Adapted(teacher.experts[1].field.transformer, "student", rank, alpha)
    if moved:
        move(student, 1)
    return student


@torch.no_grad()
def move(network: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_training_a_student_learns_and_leaves_the_embedded_teacher_as_it_is():
    torch.manual_seed(0)
    info = inspect_teacher(str(TINY))
    teacher = load_teacher(info, torch.device("cpu"), torch.float32, torch.zeros(1, 128), 4.0, 2.0)
    base = teacher.experts[1].field.transformer
    weights = {name: weight.clone() for name, weight in base.named_parameters()}
    shape = info.latent_shape(64, 64)
    noise = Noise(0, 0, 0, latent_shape=shape)
    embeds = torch.randn(2, 6, base.config.text_dim)
    batch = Batch([0, 1], embeds, torch.ones(2, 6, dtype=torch.bool))
    x, text = noise.latents(2), fold_text(embeds, batch.prompt_mask)
    before = teacher(x, torch.tensor([0.95, 0.4]), text)
    student = Adapted(base, "student", rank=4)
    grid = few_step_grid(4, info.flow_shift)
    setup = Setup(teacher, WanVelocity(student), grid, info.flow_shift, student)
    objective = build_objective("trajectory", setup, {"teacher_substeps": 1})
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=5e-3), []
    for _ in range(10):
        loss, _ = objective.loss("student", batch, Noise(0, 0, 0, latent_shape=shape))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    assert torch.equal(teacher(x, torch.tensor([0.95, 0.4]), text), before)
    now = {name.replace(".base_layer", ""): weight for name, weight in base.named_parameters() if ".lora_" not in name}
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in weights)
    assert all(weight.grad is None for weight in now.values())


def test_a_student_is_its_adapters_alone(teacher, asked):
    base = teacher.experts[1].field.transformer
    size = sum(p.numel() for p in base.parameters())
    student = student_of(teacher, rank=3)
    assert len(student.state_dict()) == len(list(student.parameters())) == 2 * len(base.blocks) * 10
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in base.parameters()) - size
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    with torch.no_grad():
        assert torch.equal(WanVelocity(student)(*asked), teacher.conditional(*asked)), "at first it is the teacher"


@torch.no_grad()
def test_alpha_weighs_the_adapters(teacher, asked):
    """B·A·alpha/r: twice the alpha is twice the B."""
    student = student_of(teacher, rank=2, alpha=4.0, moved=True)
    doubled, weights = WanVelocity(student)(*asked), student.state_dict()
    student = student_of(teacher, rank=2)  # takes the place of the other
    student.load_state_dict(weights)
    assert not torch.equal(WanVelocity(student)(*asked), doubled)
    for name, parameter in student.named_parameters():
        if name.endswith("lora_B"):
            parameter.mul_(2)
    torch.testing.assert_close(WanVelocity(student)(*asked), doubled)


def test_student_and_fakes_stand_side_by_side_on_one_expert(teacher, asked):
    expected = teacher.conditional(*asked)
    student = student_of(teacher, moved=True)
    with torch.no_grad():
        drawn = WanVelocity(student)(*asked)
    for kind in ("lora", "full", "lora"):
        fake = fake_scores(teacher, kind, rank=3)["fake_score_2"]
        assert all(p.requires_grad for p in [*student.parameters(), *fake.parameters()])
        with torch.no_grad():
            torch.testing.assert_close(WanVelocity(fake)(*asked), expected)
            move(fake, 2)
            assert not torch.allclose(WanVelocity(fake)(*asked), expected, atol=1e-3)
            assert torch.equal(WanVelocity(student)(*asked), drawn) and not torch.allclose(drawn, expected, atol=1e-3)
            assert torch.equal(teacher.conditional(*asked), expected)
    remove_adapters(teacher.experts[1].field.transformer)
    assert torch.equal(teacher.conditional(*asked), expected)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpointed_gradients_are_the_same_whatever_is_called_in_between(teacher, asked, kind):
    student, fake = student_of(teacher, moved=True), fake_scores(teacher, kind, rank=2)["fake_score_2"]
    move(fake, 2)

    def gradients() -> list[torch.Tensor]:
        found = []
        for trained, other in ((student, fake), (fake, student)):
            loss = WanVelocity(trained)(*asked).square().mean()
            with torch.no_grad():
                WanVelocity(other)(*asked)
            teacher(*asked)
            for parameter in trained.parameters():
                parameter.grad = None
            loss.backward()
            found += [parameter.grad for parameter in trained.parameters()]
        return found

    plain = gradients()
    counted = []
    block = teacher.experts[1].field.transformer.blocks[0] if kind == "lora" else fake.blocks[0]
    block.register_forward_pre_hook(lambda *_: counted.append(torch.is_grad_enabled()))
    gradients()
    without = sum(counted)
    for network in (student, fake):
        network.enable_gradient_checkpointing()
    counted.clear()
    recomputed = gradients()
    assert sum(counted) == 2 * without, "blocks are computed again in backward, the fake score's too"
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    for expected, found in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_copy_stays_what_the_student_was(teacher, asked):
    student = student_of(teacher, moved=True)
    with torch.no_grad():
        drawn = WanVelocity(student)(*asked)
    held = sum(p.numel() for p in teacher.experts[1].field.transformer.parameters())
    network, field = Setup(
        teacher, None, None, 3.0, student, lambda n, dtype: WanVelocity(n, dtype=dtype)
    ).frozen_student()
    assert sum(p.numel() for p in teacher.experts[1].field.transformer.parameters()) == held, "the base is not copied"
    assert [p.shape for p in network.parameters()] == [p.shape for p in student.parameters()]
    assert not any(p.requires_grad for p in network.parameters())
    loss = WanVelocity(student)(*asked).square().mean()
    torch.testing.assert_close(field(*asked), drawn)
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    move(student, 3)
    assert torch.equal(field(*asked), drawn)
    with torch.no_grad():
        assert not torch.allclose(WanVelocity(student)(*asked), drawn, atol=1e-3)
    network.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(field(*asked), WanVelocity(student)(*asked))


def test_an_error_inside_leaves_all_switched_off(teacher, asked):
    expected, student = teacher(*asked), student_of(teacher, moved=True)
    for network in (student, copy.deepcopy(student)):
        with pytest.raises(RuntimeError):
            WanVelocity(network)(asked[0][:, :3], *asked[1:])
        assert torch.equal(teacher(*asked), expected)


@torch.no_grad()
def test_merged_weights_compute_the_same(teacher, asked):
    student = student_of(teacher, rank=2, alpha=1.0, moved=True)
    expected = WanVelocity(student)(*asked)
    merged = copy.deepcopy(teacher.experts[1].field.transformer)
    remove_adapters(merged)
    state = {key.replace(".base_layer", ""): key for key in merged.state_dict()}
    weights = dict(student.merged())
    assert weights.keys() == state.keys()
    merged.load_state_dict({state[key]: weight for key, weight in weights.items()})
    torch.testing.assert_close(WanVelocity(merged)(*asked), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(WanVelocity(student)(*asked), expected)


def test_compiled_blocks_compute_the_same_with_each_one_s_adapters(teacher, asked):
    """Traced, and run as it was traced: which adapters are on is decided outside of what is compiled."""
    student, fake = student_of(teacher, moved=True), fake_scores(teacher, "lora", rank=2)["fake_score_2"]
    move(fake, 2)
    for network in (student, fake):
        network.enable_gradient_checkpointing()

    def answers() -> list[torch.Tensor]:
        found = [teacher(*asked), teacher.conditional(*asked)]
        for trained in (student, fake):
            velocity = WanVelocity(trained)(*asked)
            teacher(*asked)
            velocity.square().mean().backward()
            found += [velocity.detach(), *(parameter.grad for parameter in trained.parameters())]
            trained.zero_grad()
            with torch.no_grad():
                found.append(WanVelocity(trained)(*asked))
        return found

    expected = answers()
    compile_blocks(student, *(expert.field.transformer for expert in teacher.experts), backend="eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for _ in range(2):
        for plain, compiled in zip(expected, answers(), strict=True):
            torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 3 and not counters["graph_break"]


def _over_a_base(ranks: Ranks, sharded: bool) -> list[torch.Tensor]:
    """On one of two ranks: the bare base's answer, the student's, and the gradients of its adapters."""
    torch.manual_seed(0)
    base = WanTransformer3DModel(**TRANSFORMER).requires_grad_(False).eval()
    if sharded:
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        for part in (*base.blocks, base):
            fully_shard(part, mesh=mesh)
    student = Adapted(base, "student", rank=2)
    move(student, 1)
    student.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(ranks.rank)
    x, text = torch.randn(2, 16, 1, 4, 4, generator=generator), torch.randn(2, 5, TEXT_DIM, generator=generator)
    asked, as_tuple = (x, torch.tensor([900.0, 100.0]), text), {"return_dict": False}
    velocity = wrap(student, ranks)(*asked, **as_tuple)[0]
    with torch.no_grad():
        bare = base(*asked, **as_tuple)[0]
    velocity.square().mean().backward()
    return [bare, velocity.detach(), *(parameter.grad for parameter in student.parameters())]


def _whole_and_sharded(ranks: Ranks) -> float:
    answers = zip(_over_a_base(ranks, False), _over_a_base(ranks, True), strict=True)
    return max((whole - sharded).abs().max().item() for whole, sharded in answers)


def test_adapters_train_over_a_base_that_is_sharded():
    """FSDP2 holds the base, DDP the adapters; neither knows of the other."""
    assert max(run_ranks(_whole_and_sharded, 2)) < 1e-6
