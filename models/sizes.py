"""A Wan transformer in numbers: what its weights, its activations and its forwards take. Shapes only, on `meta`.

Activations are counted as autograd keeps them on a GPU: each tensor that a backward needs, once. Attention is fused
(no scores are kept), RMSNorm is one operation, and under autocast the norms and the gates stay in float32.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import UMT5Config, UMT5EncoderModel

from models.adapters import LORA_TARGETS
from models.folding import PADDING_COLUMNS, fold_time
from models.student import parameter_dtype
from models.vae import decode

# Linear layers whose rows are the text's tokens, and the time's; all others' are the picture's.
TEXT_LAYERS = ("attn2.to_k", "attn2.to_v", "text_embedder.linear_1", "text_embedder.linear_2")
TIME_LAYERS = ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")


@dataclass(frozen=True)
class WanSize:
    """Counts are of parameters unless they say otherwise; `block_` stands for one block, the rest for the whole."""

    layers: int
    width: int
    ffn: int
    latent_channels: int
    patch: int  # latents of a token
    expand_timesteps: bool
    parameters: int
    float32: int  # what Diffusers keeps in float32, whatever the rest is loaded in
    storable: int  # what layerwise casting stores in fewer bits
    multiplied: int  # weights and biases of linear and convolution layers: what autocast makes copies of
    block_parameters: int
    block_multiplied: int
    adapted: int  # rows and columns of the layers that take adapters, summed
    buffer_bytes: int
    picture_weights: int  # of linear layers and convolutions, by what their rows are
    text_weights: int
    time_weights: int
    packed: int = 0  # bytes of weights that a quantiser has packed

    def bytes(self, dtype: torch.dtype, storage_dtype: torch.dtype | None = None) -> int:
        """Of the weights as loaded in `dtype`, with what can be stored so in `storage_dtype`; and of the buffers."""
        if self.packed:
            return self.packed + self.buffer_bytes
        whole = (self.parameters - self.float32) * dtype.itemsize + self.float32 * 4 + self.buffer_bytes
        return whole - self.storable * (dtype.itemsize - storage_dtype.itemsize) if storage_dtype else whole

    def gathered_bytes(self, itemsize: int) -> int:
        """What stands whole on a GPU while a network sharded by block runs: embedders and head, one block and the next
        one, which is fetched meanwhile."""
        outside = self.parameters - self.layers * self.block_parameters
        return (outside + min(2, self.layers) * self.block_parameters) * itemsize

    def adapters(self, rank: int) -> int:
        """Parameters of adapters of a rank on all linear layers of the blocks."""
        return rank * self.adapted

    def tokens(self, latent_shape: tuple[int, ...]) -> int:
        return math.prod(latent_shape[1:]) // self.patch

    # -------------------------------------------------------------------------------- activations, for one latent

    def block_saved_bytes(
        self, tokens: int, text: int, itemsize: int, adapters: bool = False, fused_norms: bool = True
    ) -> int:
        """What one block keeps for its backward.

        Args:
            tokens, text: of one latent, and of its folded text.
            itemsize: of the dtype that matrices are multiplied in.
            adapters: low-rank adapters on a frozen block, which read copies of their inputs.
            fused_norms: RMSNorm keeps its input alone; where it is computed in steps, as on a CPU, twice that.
        """
        rms = 1 if fused_norms else 2
        wide = 6 + 3 * rms + 8 * self.expand_timesteps  # in float32: norms, what is gated, each token's modulation
        # Input and output of both attentions with q, k, v of the first and q of the second; and of the feed-forward.
        narrow = 10 + 4 * adapters
        own = self.width * (4 * wide + itemsize * narrow) + 2 * itemsize * self.ffn
        # k before its norm, k and v; and under autocast, what each of them is made of.
        of_text = 4 * rms + itemsize * (2 if itemsize == 4 else 4)
        return tokens * own + text * self.width * of_text

    def saved_bytes(
        self,
        tokens: int,
        text: int,
        itemsize: int,
        checkpointing: bool,
        adapters: bool = False,
        fused_norms: bool = True,
    ) -> int:
        """What a forward of one latent keeps for its backward; with checkpointing, each block's input alone."""
        block = self.block_saved_bytes(tokens, text, itemsize, adapters, fused_norms)
        if checkpointing:
            block = tokens * self.width * itemsize
        head = tokens * self.width * (4 * (2 + self.expand_timesteps) + itemsize)
        embedded = 2 * tokens * self.patch * self.latent_channels * itemsize + 3 * text * self.width * itemsize
        time = tokens * self.width * (10 if itemsize == 2 else 12) if self.expand_timesteps else 0
        if checkpointing and self.expand_timesteps:  # every block's modulation, once
            time += 6 * tokens * self.width * itemsize
        return self.layers * block + head + embedded + time

    def backward_bytes(self, tokens: int, text: int, itemsize: int, adapters: bool = False) -> int:
        """What the backward of one latent needs inside a block that is recomputed: its activations and their
        gradients at the widest place."""
        gradients = tokens * (4 * 3 * self.width + 2 * itemsize * self.ffn)
        return self.block_saved_bytes(tokens, text, itemsize, adapters) + gradients

    def forward_bytes(self, tokens: int, text: int, itemsize: int) -> int:
        """The widest place of a forward of one latent that keeps nothing."""
        modulation = 4 * 6 * 2 + 6 * itemsize if self.expand_timesteps else 0  # a sum in float32, of two such
        norm = self.width * (4 * 4 + 2 * itemsize)
        attention = self.width * 8 * itemsize
        feed_forward = self.width * 3 * itemsize + 2 * self.ffn * itemsize
        return tokens * (max(norm, attention, feed_forward) + self.width * modulation) + text * self.width * 4

    # -------------------------------------------------------------------------------- operations, for one latent

    def forward_flops(self, tokens: int, text: int) -> int:
        """Multiplications and additions of one forward's matrix products, attention among them."""
        linear = self.picture_weights * tokens + self.text_weights * text
        linear += self.time_weights * (tokens if self.expand_timesteps else 1)
        attention = 2 * self.layers * self.width * tokens * (tokens + text)  # scores, and what they weigh
        return 2 * (linear + attention)


def measure(transformer: WanTransformer3DModel, expand_timesteps: bool = False) -> WanSize:
    """The numbers of a transformer, which may be on the meta device."""
    config, named = transformer.config, dict(transformer.named_parameters())
    layers = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv3d)}

    def weights(chosen) -> int:
        return sum(m.weight.numel() for name, m in layers.items() if chosen(name))

    def with_bias(chosen) -> int:
        return sum(p.numel() for name, m in layers.items() if chosen(name) for p in m.parameters())

    skipped = (*DEFAULT_SKIP_MODULES_PATTERN, *transformer._skip_layerwise_casting_patterns)
    return WanSize(
        layers=config.num_layers,
        width=config.num_attention_heads * config.attention_head_dim,
        ffn=config.ffn_dim,
        latent_channels=config.in_channels,
        patch=math.prod(config.patch_size),
        expand_timesteps=expand_timesteps,
        parameters=sum(p.numel() for p in named.values()),
        float32=sum(p.numel() for name, p in named.items() if parameter_dtype(name, torch.bfloat16) == torch.float32),
        storable=with_bias(lambda name: name.startswith("blocks.") and not any(s in name for s in skipped)),
        multiplied=with_bias(lambda name: True),
        block_parameters=sum(p.numel() for p in transformer.blocks[0].parameters()),
        block_multiplied=with_bias(lambda name: name.startswith("blocks.0.")),
        adapted=sum(
            m.in_features + m.out_features
            for name, m in layers.items()
            if any(name.endswith(f".{target}") for target in LORA_TARGETS)
        ),
        buffer_bytes=sum(b.numel() * b.element_size() for b in transformer.buffers()),
        picture_weights=weights(lambda name: not name.endswith((*TEXT_LAYERS, *TIME_LAYERS))),
        text_weights=weights(lambda name: name.endswith(TEXT_LAYERS)),
        time_weights=weights(lambda name: name.endswith(TIME_LAYERS)),
    )


def wan_size(config: dict, expand_timesteps: bool = False) -> WanSize:
    """The numbers of the transformer that a config describes."""
    with torch.device("meta"):
        return measure(WanTransformer3DModel.from_config(config), expand_timesteps)


def folded_length(text_tokens: int) -> int:
    """Columns of a folded text."""
    return text_tokens + PADDING_COLUMNS


# ------------------------------------------------------------------------------------------------ text encoder and VAE


@dataclass(frozen=True)
class TextSize:
    """UMT5's encoder."""

    parameters: int
    width: int
    ffn: int
    heads: int

    def bytes(self, dtype: torch.dtype) -> int:
        return self.parameters * dtype.itemsize

    def forward_bytes(self, prompts: int, tokens: int, dtype: torch.dtype) -> int:
        """Besides the weights: the gated feed-forward at its widest, and attention scores, which are made whole here:
        with their position bias, and in float32 for the softmax."""
        rows = prompts * tokens * dtype.itemsize * (3 * self.ffn + 3 * self.width)
        return rows + prompts * self.heads * tokens**2 * (2 * dtype.itemsize + 4)


def text_size(config: UMT5Config) -> TextSize:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UMT5EncoderModel(config).parameters())
    return TextSize(parameters, config.d_model, config.d_ff, config.num_heads)


def vae_bytes(config: dict, latent_shape: tuple[int, ...]) -> tuple[int, int]:
    """(weights, the most that decoding one picture holds besides them), in float32: decoded on the meta device."""
    with torch.device("meta"):
        vae = fold_time(AutoencoderKLWan.from_config(config)).eval()
        latents = torch.empty(1, *latent_shape)
        with torch.no_grad(), LiveBytes() as live:
            decode(vae, latents)
    return sum(p.numel() * p.element_size() for p in vae.parameters()), live.peak


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within hold at one time, on any device, also meta."""

    def __enter__(self):
        self.now, self.peak, self._alive = 0, 0, WeakIdKeyDictionary()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in inputs:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._alive:
            return
        size = storage.nbytes()
        self.now += size
        self._alive[storage] = _Freed(self, size)


class _Freed:
    """Tells its count when the storage that it stands beside is gone."""

    def __init__(self, live: LiveBytes, size: int) -> None:
        self._live, self._size = live, size

    def __del__(self) -> None:
        self._live.now -= self._size
