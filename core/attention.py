"""Self-attention of the ViT: plain, in windows, and with either kind of relative positions.

Letters: B batch, N tokens, L patches, D width, d width of a head.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]  # patches per column and per row


class Attention(nn.Module):
    """Multi-head self-attention, fused; qkv channels are [q | k | v], each head-major.

    With `table_grid` it knows decomposed relative positions: two tables `rel_pos_h`, `rel_pos_w`, shared by all heads
    (ViTDet, arXiv:2203.16527; spec detection section 2.4). With `bias_grid` it adds a number per head and distance to
    the logits: `relative_position_bias_table` (BEiT, arXiv:2106.08254; spec segmentation section 1.3). All are zero at
    first.
    """

    def __init__(self, dim: int, num_heads: int, table_grid: Grid | None = None, bias_grid: Grid | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.has_rel_pos = table_grid is not None
        if table_grid is not None:
            head_dim = dim // num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_grid[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_grid[1] - 1, head_dim))
        self.has_bias = bias_grid is not None
        if bias_grid is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(num_distances(bias_grid), num_heads))
            index = relative_position_index(bias_grid).int()
            self.register_buffer("relative_position_index", index, persistent=False)  # [1 + L, 1 + L]

    def forward(self, x: Tensor, num_queries: int | None = None, grid: Grid | None = None) -> Tensor:
        """Attend over all N tokens of x [B, N, D]; with `num_queries` only the last so many query, and are returned.

        Args:
            grid: rows and columns of the tokens, which decomposed relative positions need: N = rows * columns.
        """
        if self.has_rel_pos:
            assert grid is not None, "relative positions need a grid"
            q, k, v = self._heads(self.qkv(x), 3)  # each [B, heads, N, D / heads]
            q, k = with_relative_positions(q, k, self.rel_pos_h, self.rel_pos_w, grid)
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            return self.proj(out.transpose(1, 2).flatten(2))  # [B, N, D]
        if num_queries is None:
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            dim = x.shape[-1]
            q_weight, kv_weight = self.qkv.weight.split([dim, 2 * dim])
            q_bias, kv_bias = self.qkv.bias.split([dim, 2 * dim])
            (q,) = self._heads(F.linear(x[:, -num_queries:], q_weight, q_bias), 1)
            k, v = self._heads(F.linear(x, kv_weight, kv_bias), 2)
        bias = self._bias(q.shape[2]).to(q.dtype) if self.has_bias else None  # [heads, queries, N]
        out = F.scaled_dot_product_attention(q, k, v, bias)  # [B, heads, N, D / heads]
        return self.proj(out.transpose(1, 2).flatten(2))  # [B, N, D]

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        x = x.unflatten(-1, (parts, self.num_heads, -1))  # [B, N, parts, heads, D / heads]
        return x.permute(2, 0, 3, 1, 4).unbind(0)  # parts x [B, heads, N, D / heads]

    def _bias(self, num_queries: int) -> Tensor:
        index = cast(Tensor, self.relative_position_index)[-num_queries:]  # [queries, N]
        # As an embedding: each row is wanted by up to L pairs, and that gradient sums them in a fixed order.
        return F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)  # [heads, queries, N]


def num_distances(grid: Grid) -> int:
    """Rows of a relative position bias table: one per distance in the grid, three that involve the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_position_index(grid: Grid) -> Tensor:
    """Which row of a bias table [num_distances, heads] belongs to query and key: [1 + L, 1 + L] int64.

    Token 0 is the class token. Patch (i, j) that looks at patch (m, n) has row (i - m + H - 1)(2W - 1) + j - n + W - 1;
    the last three rows are class to patch, patch to class, class to class. Source: spec segmentation section 1.3.
    """
    rows, columns = grid
    cells = torch.arange(rows * columns)
    i, j = cells // columns, cells % columns
    down, right = i[:, None] - i[None, :] + rows - 1, j[:, None] - j[None, :] + columns - 1  # [L, L]
    index = F.pad(down * (2 * columns - 1) + right, (1, 0, 1, 0))  # [1 + L, 1 + L]
    last = num_distances(grid) - 1
    index[0, :], index[:, 0], index[0, 0] = last - 2, last - 1, last
    return index


def with_relative_positions(
    q: Tensor, k: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose plain product holds the scaled logits and the decomposed relative positions.

    For a query at (i, j) and a key at (m, n) the logit is q.k / sqrt(d) + q.Rh[i - m] + q.Rw[j - n], with the unscaled
    q in the last two. They are put into further channels: q.Rh[i - m] for every m, q.Rw[j - n] for every n, and for the
    key a one at its own m and n. So no bias of the size of all pairs is ever made.

    Args:
        q, k: [B, heads, N, d] with N = rows * columns.
        rel_pos_h, rel_pos_w: [2 * S - 1, d]; resized linearly where S is not the grid's.
    Returns: both [B, heads, N, d + rows + columns], padded to a multiple of 8; attend with scale 1.
    """
    rows, columns = grid
    by_row = relative_table(rel_pos_h, rows).to(q.dtype)  # [rows of queries, rows of keys, d]
    by_column = relative_table(rel_pos_w, columns).to(q.dtype)
    placed = q.unflatten(2, grid)  # [B, heads, rows, columns, d]
    to_rows = torch.einsum("bhijd,imd->bhijm", placed, by_row).flatten(2, 3)  # [B, heads, N, rows]
    to_columns = torch.einsum("bhijd,jnd->bhijn", placed, by_column).flatten(2, 3)  # [B, heads, N, columns]
    cells = torch.arange(rows * columns, device=q.device)
    ones = [F.one_hot(cells // columns, rows), F.one_hot(cells % columns, columns)]
    place = torch.cat(ones, dim=1).to(k.dtype).expand(*k.shape[:2], -1, -1)  # [B, heads, N, rows + columns]
    pad = -(q.shape[-1] + rows + columns) % 8  # fused kernels want it
    q = torch.cat([q * q.shape[-1] ** -0.5, to_rows, to_columns], dim=-1)
    return F.pad(q, (0, pad)), F.pad(torch.cat([k, place], dim=-1), (0, pad))


def relative_table(table: Tensor, side: int) -> Tensor:
    """Rows of a relative position table [2 * S - 1, d] by query and key along one axis: [side, side, d].

    Entry (i, m) is that of distance i - m. A table made for another side is resized linearly (spec detection 2.4).
    """
    length = 2 * side - 1
    if len(table) != length:
        table = F.interpolate(table.T.unsqueeze(0), size=length, mode="linear")[0].T  # [2 * side - 1, d]
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place[None, :] + side - 1]


def split_windows(x: Tensor, grid: Grid, side: int) -> Tensor:
    """Tokens [B, N, D] of a grid cut into windows, row-major: [B * windows, side * side, D].

    The grid is padded with zeros at the bottom and right; as published these take part in the attention unmasked.
    """
    B, _, D = x.shape
    rows, columns = (-(-n // side) for n in grid)
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, columns * side - grid[1], 0, rows * side - grid[0]))
    x = x.view(B, rows, side, columns, side, D).transpose(2, 3)  # [B, rows, columns, side, side, D]
    return x.reshape(-1, side * side, D)


def merge_windows(windows: Tensor, grid: Grid, side: int) -> Tensor:
    """Inverse of `split_windows`; the padding is dropped: [B, N, D]."""
    rows, columns = (-(-n // side) for n in grid)
    x = windows.view(-1, rows, columns, side, side, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(len(x), rows * side, columns * side, -1)
    return x[:, : grid[0], : grid[1]].flatten(1, 2)  # [B, N, D]
