"""Attention as it is usually written: the baseline of the benchmarks of detectors and segmentors."""

import torch
from torch import Tensor

from core.attention import Attention, Grid, relative_table
from core.vit import ViT


class PlainAttention(Attention):
    """Softmax of explicit logits; relative positions as a bias of all pairs, made in every call."""

    def forward(self, x: Tensor, num_queries: int | None = None, grid: Grid | None = None) -> Tensor:
        """[B, N, D] to the same; all tokens query."""
        q, k, v = self._heads(self.qkv(x), 3)  # each [B, heads, N, D / heads]
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # [B, heads, N, N]
        if self.has_rel_pos:
            assert grid is not None, "relative positions need a grid"
            placed = q.unflatten(2, grid)  # [B, heads, rows, columns, d]
            by_row, by_column = relative_table(self.rel_pos_h, grid[0]), relative_table(self.rel_pos_w, grid[1])
            to_rows = torch.einsum("bhijd,imd->bhijm", placed, by_row.to(q.dtype))
            to_columns = torch.einsum("bhijd,jnd->bhijn", placed, by_column.to(q.dtype))
            bias = to_rows.unsqueeze(-1) + to_columns.unsqueeze(-2)  # [B, heads, rows, columns, rows, columns]
            logits = logits + bias.flatten(4).flatten(2, 3)  # [B, heads, N, N]
        if self.has_bias:
            logits = logits + self._bias(q.shape[2])
        out = logits.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))  # [B, N, D]


def make_attention_plain(vit: ViT) -> None:
    """Replace the attention of every block, which keeps its weights."""
    config = vit.config
    bias_grid = config.grid if config.rel_pos_bias else None
    for i, block in enumerate(vit.blocks):
        attention = PlainAttention(config.embed_dim, config.num_heads, config.table_grid(i), bias_grid)
        attention.load_state_dict(block.attn.state_dict())  # type: ignore[union-attr]
        block.attn = attention
