"""Masked autoencoder: masking, visible tokens, encoder, decoder, predictions of the hidden patches.

Letters: B batch, L patches, K kept (visible), M hidden = L - K, D encoder width, E decoder width, V values per patch.
Source: He et al., arXiv:2111.06377; spec sections 1 to 3. Only equivalences that re-associate sums are used (spec 7.1
a, b, c, f to i): what the loss never reads is not computed, and the decoder keeps the shuffled order.
"""

from collections.abc import Iterator

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from core.config import Config
from core.vit import LAYER_NORM_EPS, Block, ViT, ViTConfig, gather_patches, sincos_pos_embed

TARGET_EPS = 1e-6


class DecoderConfig(Config):
    """Sizes of the decoder; its MLP ratio is the encoder's."""

    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt

    def contradictions(self) -> Iterator[str]:
        """Sizes that cannot hold together."""
        if self.embed_dim % self.num_heads:
            yield f"decoder.embed_dim={self.embed_dim} is not divisible by decoder.num_heads={self.num_heads}"
        if self.embed_dim % 4:
            yield f"decoder.embed_dim={self.embed_dim} is not divisible by 4, as the sin-cos position table needs"


class MaskedAutoencoder(ViT):
    """ViT encoder and a small transformer decoder; parameter names are those of the published checkpoints."""

    def __init__(self, config: ViTConfig, decoder: DecoderConfig) -> None:
        super().__init__(config)
        self.pos_embed.requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder.embed_dim, config.grid), requires_grad=False)
        self.decoder_embed = nn.Linear(config.embed_dim, decoder.embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder.embed_dim, decoder.num_heads, config.mlp_ratio) for _ in range(decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder.embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder.embed_dim, config.patch_values)

    def forward(self, patches: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """Predict the hidden patches of images of which only the kept ones are seen.

        Args:
            patches: [B, L, V] patches of normalised images, as `patchify` gives them.
            ids_keep: [B, K] patches that the encoder sees.
            ids_hidden: [B, M] the others; the predictions follow their order.
        Returns: [B, M, V], at least float32 whatever the autocast, since student and teacher are subtracted.
        """
        tokens = self.encode(gather_patches(patches, ids_keep), ids_keep)  # [B, 1 + K, D]
        x = self._decoder_input(tokens, ids_keep, ids_hidden)  # [B, 1 + L, E]
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return self._predict(self.decoder_blocks[-1](x, num_queries=ids_hidden.shape[1]))

    def predict_all(self, patches: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """As `forward`, but every patch is predicted and returned in spatial order: [B, L, V]."""
        tokens = self.encode(gather_patches(patches, ids_keep), ids_keep)
        x = self._decoder_input(tokens, ids_keep, ids_hidden)
        for block in self.decoder_blocks:
            x = block(x)
        ids_restore = torch.cat([ids_keep, ids_hidden], dim=1).argsort(dim=1)  # [B, L]
        return gather_patches(self._predict(x[:, 1:]), ids_restore)

    def _decoder_input(self, tokens: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        positions = self.decoder_pos_embed[0, 1:]  # [L, E]; the class token's row is zero
        visible = self.decoder_embed(tokens)  # [B, 1 + K, E]
        seen = visible[:, 1:] + positions[ids_keep]
        hidden = self.mask_token + positions[ids_hidden]  # [B, M, E]
        return torch.cat([visible[:, :1].to(hidden.dtype), seen, hidden], dim=1)  # [B, 1 + L, E]

    def _predict(self, x: Tensor) -> Tensor:
        # Not under autocast: predictions rounded to bf16 lose the direction of small student-teacher differences.
        with torch.autocast(x.device.type, enabled=False):
            return self.decoder_pred(self.decoder_norm(x.to(self.decoder_pred.weight.dtype)))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise encoder and decoder; the two position tables are fixed. Source: spec section 1.5."""
        super().init_weights(generator)
        nn.init.normal_(self.mask_token, std=0.02, generator=generator)


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """K = floor(L * (1 - mask_ratio)) in floating point, as published: 49 of 196 at 0.75."""
    return int(num_patches * (1 - mask_ratio))


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Split patches by uniform noise [B, L]: the K smallest are kept, the others hidden.

    Returns: ids_keep [B, K] and ids_hidden [B, M], both in order of increasing noise.
    """
    ids_shuffle = noise.argsort(dim=1, stable=True)  # [B, L]; stable: the same on every device
    kept = num_kept(noise.shape[1], mask_ratio)
    return ids_shuffle[:, :kept], ids_shuffle[:, kept:]


def reconstruction_target(patches: Tensor, norm_pix_loss: bool) -> Tensor:
    """What is predicted for patches [B, M, V]: the pixels, or each patch normalised by its own mean and variance.

    The variance is unbiased (V - 1) and 1e-6 is added inside the root: a constant patch gives 0. Spec section 3.
    """
    if not norm_pix_loss:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + TARGET_EPS).sqrt()
