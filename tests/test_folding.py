"""The two short cuts against the stock networks they stand for."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from models.folding import MAX_SEQUENCE_LENGTH, PADDING_COLUMNS, fold_text, fold_text_attention, fold_time, pad_folded
from tests.conftest import TI2V_VAE, VAE

LENGTHS = (1, 7, 300, 508, 509, 510, 511, 512)
TEXT_DIM = 16


@pytest.fixture(scope="module")
def stock() -> WanTransformer3DModel:
    """A transformer in which the text matters, and padding is neither like text nor lost among it."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=48, num_layers=2, freq_dim=16, text_dim=TEXT_DIM,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.mul_(2)
        for block in transformer.blocks:
            block.attn2.norm_k.weight.mul_(1.5)
            block.attn2.to_v.weight.mul_(3)
            block.attn2.to_out[0].weight.mul_(3)
    return transformer.eval()


@pytest.fixture(scope="module")
def folded(stock) -> WanTransformer3DModel:
    return fold_text_attention(copy.deepcopy(stock))


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Latents (8, 4, 1, 4, 4), timesteps (8,), and one text (n, D) for each of LENGTHS."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(n, TEXT_DIM, generator=generator) for n in LENGTHS]
    return torch.randn(8, 4, 1, 4, 4, generator=generator), torch.linspace(999, 20, 8), texts


def stock_text(texts: list[torch.Tensor]) -> torch.Tensor:
    """(B, 512, D), as WanPipeline pads."""
    return torch.stack([F.pad(text, (0, 0, 0, MAX_SEQUENCE_LENGTH - len(text))) for text in texts])


def fold_together(texts: list[torch.Tensor]) -> torch.Tensor:
    """The texts in one batch; where a text ends, something stands that must not be read."""
    longest = max(map(len, texts))
    mask = torch.arange(longest) < torch.tensor([len(text) for text in texts])[:, None]
    padded = torch.stack([F.pad(text, (0, 0, 0, longest - len(text)), value=3.0) for text in texts])
    return fold_text(padded, mask)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of `b`'s spread."""
    return float((a.double() - b.double()).abs().max() / b.double().std())


@torch.no_grad()
def run(transformer, x, timestep, text) -> torch.Tensor:
    return transformer(x, timestep, text, return_dict=False)[0]


@pytest.mark.parametrize("i", range(len(LENGTHS)), ids=map(str, LENGTHS))
def test_folded_text_equals_512_padded_tokens(stock, folded, inputs, i):
    x, timestep, texts = (part[i : i + 1] for part in inputs)
    expected = run(stock, x, timestep, stock_text(texts))
    assert distance(run(folded, x, timestep, fold_together(texts)), expected) < 1e-5


def test_texts_of_different_lengths_share_a_batch(stock, folded, inputs):
    x, timestep, texts = inputs
    text = fold_together(texts)
    assert text.shape == (8, 512 + PADDING_COLUMNS, TEXT_DIM + 1)
    assert distance(run(folded, x, timestep, text), run(stock, x, timestep, stock_text(texts))) < 1e-5


def test_padding_matters(stock, inputs):
    """Else the tests above would show nothing."""
    x, timestep, texts = (part[1:2] for part in inputs)
    assert distance(run(stock, x, timestep, texts[0][None]), run(stock, x, timestep, stock_text(texts))) > 0.05


def test_scores_account_for_all_padding_and_are_the_same_in_bf16(inputs):
    for text in inputs[2]:
        scores = fold_together([text])[0, :, -1]
        assert torch.equal(scores, scores.bfloat16().float())
        assert torch.equal(scores[: len(text)], torch.zeros(len(text)))
        padding = scores[len(text) :].double().exp().sum().item()
        assert math.isclose(padding, MAX_SEQUENCE_LENGTH - len(text), rel_tol=1e-6, abs_tol=1e-9)


def test_padding_folded_text_further_changes_nothing(folded, inputs):
    x, timestep, texts = (part[1:2] for part in inputs)
    text = fold_together(texts)
    longer = pad_folded(text, 40)
    assert longer.shape[1] == 40
    assert distance(run(folded, x, timestep, longer), run(folded, x, timestep, text)) < 3e-6


def test_bfloat16_is_no_worse_than_stock_bfloat16(stock, folded, inputs):
    x, timestep, texts = inputs
    exact = run(stock, x, timestep, stock_text(texts))

    def error(transformer, text):
        half = copy.deepcopy(transformer).to(torch.bfloat16)
        return (run(half, x.bfloat16(), timestep, text.bfloat16()).float() - exact).square().mean().sqrt()

    ours, theirs = error(folded, fold_together(texts)), error(stock, stock_text(texts))
    assert 0 < ours < 1.5 * theirs


def gradients(transformer: WanTransformer3DModel, x, timestep, text) -> dict[str, torch.Tensor]:
    transformer = copy.deepcopy(transformer).train()
    v = transformer(x, timestep, text, return_dict=False)[0]
    (v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum().backward()
    return {k: p.grad for k, p in transformer.named_parameters()}


def test_gradients_agree(stock, folded, inputs):
    x, timestep, texts = (part[:3] for part in inputs)
    expected = gradients(stock, x, timestep, stock_text(texts))
    got = gradients(folded, x, timestep, fold_together(texts))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_gradient_checkpointing_changes_no_gradient(folded, inputs):
    x, timestep, texts = (part[:3] for part in inputs)
    text = fold_together(texts)
    checkpointed = copy.deepcopy(folded)
    checkpointed.enable_gradient_checkpointing()
    expected, got = (gradients(network, x, timestep, text) for network in (folded, checkpointed))
    assert checkpointed.is_gradient_checkpointing
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


def test_weights_keep_their_names_and_copies_work(stock, folded, inputs):
    assert list(folded.state_dict()) == list(stock.state_dict())
    x, timestep, texts = (part[1:2] for part in inputs)
    twin = copy.deepcopy(folded)
    with torch.no_grad():
        twin.proj_out.weight.mul_(2)
        twin.proj_out.bias.mul_(2)
    text = fold_together(texts)
    torch.testing.assert_close(run(twin, x, timestep, text), 2 * run(folded, x, timestep, text))


# ------------------------------------------------------------------------------------------------ time


@pytest.fixture(scope="module", params=[VAE, TI2V_VAE], ids=["wan2.1", "ti2v"])
def vaes(request) -> tuple[AutoencoderKLWan, AutoencoderKLWan]:
    torch.manual_seed(0)
    stock = AutoencoderKLWan(**request.param).eval()
    with torch.no_grad():
        stock.decoder.conv_out.weight.mul_(2)
    return stock, fold_time(copy.deepcopy(stock))


@torch.no_grad()
def there_and_back(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    latents = vae.encode(video).latent_dist.mode()
    return latents, vae.decode(3 * latents, return_dict=False)[0]


@pytest.mark.parametrize("frames", [1, 5])
def test_folded_vae_equals_stock(vaes, frames):
    stock, folded = vaes
    video = torch.rand(2, 3, frames, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for got, expected in zip(there_and_back(folded, video), there_and_back(stock, video), strict=True):
        assert got.shape == expected.shape and expected.std() > 0.01
        assert distance(got, expected) < 1e-4
    assert list(folded.state_dict()) == list(stock.state_dict())


def test_one_frame_meets_no_3d_convolution(vaes, monkeypatch):
    def forward(*args, **kwargs):
        raise AssertionError("a 3-D convolution ran")

    monkeypatch.setattr(WanCausalConv3d, "forward", forward)
    there_and_back(vaes[1], torch.zeros(1, 3, 1, 32, 32))
    with pytest.raises(AssertionError, match="3-D"):
        there_and_back(vaes[1], torch.zeros(1, 3, 5, 32, 32))
