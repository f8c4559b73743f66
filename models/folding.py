"""Two exact short cuts for one frame and padded text. Neither changes a weight, a key or what is exported.

Text: Wan's cross-attention reads all 512 text positions, padding included. All padding is alike, so attention over n
padding positions equals attention over one whose score gets + log n. `fold_text` makes such a short text and
`fold_text_attention` teaches a transformer to read it.

Time: on a single frame a causal convolution sees zeros in the past, so only its last temporal slice counts.
`fold_time` runs the VAE's 3-D convolutions as the 2-D ones that they then are.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

MAX_SEQUENCE_LENGTH = 512  # what WanPipeline pads the text to
# Scores are rounded to bf16, so that they are the same in every dtype a network may run in. One column would then be
# off by up to 3 % of n; each further one carries what rounding left over of those before.
PADDING_COLUMNS = 4
_ALMOST_NOTHING = -30.0  # a score that adds e⁻³⁰: for columns that stand for no padding at all


def fold_text(
    prompt_embeds: torch.Tensor, mask: torch.Tensor, sequence_length: float = MAX_SEQUENCE_LENGTH
) -> torch.Tensor:
    """Text as `fold_text_attention` reads it: zeros for padding, and one more channel for the attention scores.

    Args:
        prompt_embeds: (B, L, D) embeddings of real tokens; what stands where `mask` is False is ignored.
        mask: (B, L), True for real tokens, which come first.
        sequence_length: real tokens and padding together; as many as `WanPipeline` pads to.

    Returns:
        (B, L + PADDING_COLUMNS, D + 1); the last channel is what to add to a position's attention score.
    """
    text = F.pad(prompt_embeds * mask[..., None], (0, 0, 0, PADDING_COLUMNS))  # (B, L + 4, D)
    lengths = mask.sum(1)
    scores = torch.zeros(text.shape[:2], dtype=torch.float32, device=text.device)
    scores.masked_fill_(torch.arange(text.shape[1], device=text.device) >= lengths[:, None], _ALMOST_NOTHING)
    left = (sequence_length - lengths).float().clamp(min=0)  # padding positions not yet accounted for
    for column in range(PADDING_COLUMNS):
        score = _round_down(left.log().clamp(min=_ALMOST_NOTHING))
        scores.scatter_(1, (lengths + column)[:, None], score[:, None])
        left = (left - score.exp()).clamp(min=0)
    return torch.cat([text, scores.to(text.dtype)[..., None]], dim=-1)


def fold_texts(texts: list[torch.Tensor]) -> torch.Tensor:
    """Several texts' real tokens, (n, D) each, as one folded batch in float32: (B, L + PADDING_COLUMNS, D + 1)."""
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).float()  # (B, L, D)
    lengths = torch.tensor([len(text) for text in texts], device=padded.device)
    mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return fold_text(padded, mask)


def pad_folded(folded: torch.Tensor, length: int) -> torch.Tensor:
    """Folded text with further columns that weigh nothing, (B, length, D + 1), so that texts can share a batch."""
    padded = F.pad(folded, (0, 0, 0, length - folded.shape[1]))
    padded[:, folded.shape[1] :, -1].fill_(_ALMOST_NOTHING)
    return padded


def _round_down(value: torch.Tensor) -> torch.Tensor:
    """The largest bf16 number that is no larger than `value`, in float32."""
    rounded = value.bfloat16()
    lower = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.float() > value, lower, rounded).float()


class _FoldedTextProjection(PixArtAlphaTextProjection):
    """The text MLP, which lets the channel of attention scores pass by."""

    def forward(self, caption: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(caption[..., :-1]), caption[..., -1:]], dim=-1)


class _FoldedTextAttnProcessor(WanAttnProcessor):
    """Cross-attention that adds the text's last channel to its scores."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        scores = encoder_hidden_states[..., -1].to(hidden_states.dtype)[:, None, None]  # (B, 1, 1, L)
        return super().__call__(attn, hidden_states, encoder_hidden_states[..., :-1], scores, rotary_emb)


def fold_text_attention(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """Make a stock Wan transformer read text from `fold_text`. In place; weights and their names stay as they are."""
    # Swapping the class keeps parameters, hooks and copies of the module intact; wrapping it would rename its keys.
    transformer.condition_embedder.text_embedder.__class__ = _FoldedTextProjection
    for block in transformer.blocks:
        block.attn2.set_processor(_FoldedTextAttnProcessor())
    return transformer


class _FoldedCausalConv3d(WanCausalConv3d):
    """A causal convolution that knows a single first frame when it sees one."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[2] != 1 or cache_x is not None or self.stride[0] != 1:
            return super().forward(x, cache_x)
        height, width = self._padding[2], self._padding[0]
        out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (height, width))
        return out[:, :, None]  # (B, C, 1, H, W)


def fold_time(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Make a Wan VAE run single frames through 2-D convolutions. In place; several frames work as before."""
    for module in vae.modules():
        if type(module) is WanCausalConv3d:
            module.__class__ = _FoldedCausalConv3d
    return vae
