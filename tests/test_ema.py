"""The moving average of weights against a plain loop, and its exchange with the trained ones."""

import pytest
import torch
from torch import nn

from distillation.ema import EMA


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return network


def train_a_little(network: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_equals_a_plain_loop_in_float64(network, decay):
    ema = EMA(network, decay)
    expected = {k: p.detach().double() for k, p in network.named_parameters()}
    frozen = network[0].bias.clone()
    for n in range(1, 31):
        train_a_little(network, n)
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        for k, p in network.named_parameters():
            expected[k] = d * expected[k] + (1 - d) * p.detach().double()
    with ema.applied():
        for k, p in network.named_parameters():
            torch.testing.assert_close(p.detach().double(), expected[k], rtol=1e-5, atol=1e-5)
    assert torch.equal(network[0].bias, frozen)


def test_applied_swaps_and_restores(network):
    ema = EMA(network, 0.9)
    train_a_little(network, 0)
    ema.update()
    parameters = list(network.parameters())
    trained, averaged = [p.detach().clone() for p in parameters], [w.clone() for w in ema.weights]
    with ema.applied():
        inside = [p.detach().clone() for p in network.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(inside, averaged, strict=True))
    assert not torch.equal(inside[0], trained[0])
    assert all(p is q and torch.equal(p, t) for p, q, t in zip(network.parameters(), parameters, trained, strict=True))
    assert all(torch.equal(w, a) for w, a in zip(ema.weights, averaged, strict=True))


def test_applied_restores_after_an_exception(network):
    ema = EMA(network, 0.9)
    train_a_little(network, 0)
    ema.update()
    trained = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"), ema.applied():
        raise RuntimeError("out of memory")
    assert all(torch.equal(p, t) for p, t in zip(network.parameters(), trained, strict=True))


def test_goes_on_from_a_saved_state(network):
    ema = EMA(network, 0.9)
    for step in range(3):
        train_a_little(network, step)
        ema.update()
    again = EMA(network, 0.9)
    again.load_state_dict(ema.state_dict())
    train_a_little(network, 3)
    for one in (ema, again):
        one.update()
    assert again.updates == 4
    assert all(torch.equal(a, b) for a, b in zip(ema.weights, again.weights, strict=True))
    assert all(a is not b for a, b in zip(ema.weights, again.weights, strict=True))
