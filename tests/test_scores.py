"""Fake scores on real transformers: they start as the experts, and training them leaves the experts alone."""

import pytest
import torch

from models.folding import fold_text
from models.scores import fake_scores
from models.sizes import measure
from models.teacher import WanVelocity


@pytest.fixture
def asked():
    torch.manual_seed(0)
    text = fold_text(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    return torch.randn(2, 16, 1, 4, 4), text


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_they_start_as_the_experts_without_guidance(teacher, asked, kind):
    x, text = asked
    before = {t: (teacher(x, t, text), teacher.conditional(x, t, text)) for t in (0.95, 0.5)}
    networks = fake_scores(teacher, kind, rank=2)
    assert list(networks) == ["fake_score", "fake_score_2"]
    for network, t in zip(networks.values(), (0.95, 0.5), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(WanVelocity(network)(x, t, text), before[t][1])
        assert torch.equal(teacher(x, t, text), before[t][0]), "the teacher is what it was"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_them_moves_them_and_not_the_teacher(teacher, asked, kind):
    x, text = asked
    before = teacher(x, 0.5, text)
    size = measure(teacher.experts[1].field.transformer)
    expected = size.parameters if kind == "full" else size.adapters(rank=2)
    network = fake_scores(teacher, kind, rank=2)["fake_score_2"]
    trained = [p for p in network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == expected
    if kind == "lora":
        assert all(p.dtype == torch.float32 for p in trained)
        assert expected < 0.5 * sum(p.numel() for p in teacher.experts[1].field.transformer.parameters())
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(30):
        loss = (WanVelocity(network)(x, 0.5, text) - x).square().mean()
        assert torch.equal(teacher(x, 0.5, text), before)  # also between a forward and its backward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert torch.equal(teacher(x, 0.5, text), before)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_adapters_of_an_earlier_phase_are_taken_off(teacher, asked, kind):
    x, text = asked
    size = measure(teacher.experts[1].field.transformer)
    expected = size.parameters if kind == "full" else size.adapters(rank=3)
    first = fake_scores(teacher, "lora", rank=2)["fake_score_2"]
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    second = fake_scores(teacher, kind, rank=3)["fake_score_2"]
    assert sum(p.numel() for p in second.parameters() if p.requires_grad) == expected
    with torch.no_grad():
        torch.testing.assert_close(WanVelocity(second)(x, 0.5, text), teacher.conditional(x, 0.5, text))
