"""The plain twin: one RC-MAE step written for reading, doing all the work that the published implementation does.

Tests hold the fast path against it, benchmarks measure from it. It shares no module with the fast path (only the
parameter names are the same): convolution for the patches, explicit softmax attention, every patch embedded and
predicted, masks and un-shuffling by sorting, a Python loop for the EMA, an unfused optimizer, losses read every step.
Source: spec section 7.1, column "official"; He et al. arXiv:2111.06377, Lee et al. arXiv:2210.02077.

Letters: B batch, L patches, K kept, D encoder width, E decoder width, V values per patch, P patch side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.vit import ViTConfig, sincos_pos_embed
from pretrain.mae import DecoderConfig


class PlainAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, with the scores in memory unless `fused`."""

    def __init__(self, dim: int, num_heads: int, fused: bool = False) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
            return self.proj(out.transpose(1, 2).reshape(B, N, D))
        scores = (q @ k.transpose(-2, -1)) * (D // self.num_heads) ** -0.5  # [B, heads, N, N]
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, D))


class PlainMlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return self.fc2(self.act(self.fc1(x)))


class PlainBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, fused: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PlainAttention(dim, num_heads, fused)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = PlainMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PlainPatchEmbed(nn.Module):
    def __init__(self, vit: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(vit.in_chans, vit.embed_dim, vit.patch_size, stride=vit.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, L, D]


class PlainMAE(nn.Module):
    """Masked autoencoder that predicts every patch; loads the same state dict as `MaskedAutoencoder`.

    `fused_attention` alone is not the published work: a benchmark shows with it what that one change brings.
    """

    def __init__(self, vit: ViTConfig, decoder: DecoderConfig, fused_attention: bool = False) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(vit.embed_dim, vit.grid), requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder.embed_dim, vit.grid), requires_grad=False)
        self.patch_embed = _PlainPatchEmbed(vit)
        self.blocks = nn.ModuleList(
            PlainBlock(vit.embed_dim, vit.num_heads, vit.mlp_ratio, fused_attention) for _ in range(vit.depth)
        )
        self.norm = nn.LayerNorm(vit.embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(vit.embed_dim, decoder.embed_dim)
        self.decoder_blocks = nn.ModuleList(
            PlainBlock(decoder.embed_dim, decoder.num_heads, vit.mlp_ratio, fused_attention)
            for _ in range(decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder.embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder.embed_dim, vit.patch_values)

    def forward(self, images: Tensor, ids_shuffle: Tensor, num_keep: int) -> Tensor:
        """Predict all patches [B, L, V] of images [B, C, H, W] from the first `num_keep` of ids_shuffle [B, L]."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]  # [B, L, D]
        ids_keep = ids_shuffle[:, :num_keep]
        x = torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, x.shape[-1]))  # [B, K, D]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # [B, 1 + K, D]
        for block in self.blocks:
            x = block(x)
        return self._decode(self.norm(x), ids_shuffle)

    def _decode(self, x: Tensor, ids_shuffle: Tensor) -> Tensor:
        x = self.decoder_embed(x)  # [B, 1 + K, E]
        B, L = ids_shuffle.shape
        hidden = self.mask_token.repeat(B, L + 1 - x.shape[1], 1)  # [B, M, E]
        patches = torch.cat([x[:, 1:], hidden], dim=1)  # [B, L, E], shuffled
        ids_restore = ids_shuffle.argsort(dim=1)
        patches = torch.gather(patches, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[-1]))  # spatial order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # [B, 1 + L, E]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # [B, L, V]


def plain_target(images: Tensor, patch_size: int, norm_pix_loss: bool) -> Tensor:
    """Target [B, L, V] of every patch, loop by loop over the grid: pixels, or normalised per patch."""
    patches = []
    for top in range(0, images.shape[2], patch_size):
        for left in range(0, images.shape[3], patch_size):
            patch = images[:, :, top : top + patch_size, left : left + patch_size]  # [B, C, P, P]
            patches.append(patch.permute(0, 2, 3, 1).reshape(len(images), -1))  # channel fastest
    target = torch.stack(patches, dim=1)  # [B, L, V]
    if norm_pix_loss:
        mean = target.mean(dim=-1, keepdim=True)
        variance = ((target - mean) ** 2).sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        target = (target - mean) / torch.sqrt(variance + 1e-6)
    return target


def plain_losses(
    student: PlainMAE, teacher: PlainMAE, images: Tensor, ids_shuffle: Tensor, mask_ratio: float, norm_pix_loss: bool
) -> tuple[Tensor, Tensor]:
    """Reconstruction and (unweighted) consistency loss, both by the published mask-weighted mean."""
    L = ids_shuffle.shape[1]
    num_keep = math.floor(L * (1 - mask_ratio))
    mask = torch.ones_like(ids_shuffle, dtype=images.dtype).scatter(1, ids_shuffle[:, :num_keep], 0.0)  # 1 = hidden
    patch_size = math.isqrt(images.shape[2] * images.shape[3] // L)
    target = plain_target(images, patch_size, norm_pix_loss)
    prediction = student(images, ids_shuffle, num_keep)
    with torch.no_grad():
        expected = teacher(images, ids_shuffle, num_keep)
    reconstruction = (((prediction - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()
    consistency = (((prediction - expected) ** 2).mean(dim=-1) * mask).sum() / mask.sum()
    return reconstruction, consistency


def plain_optimizer(student: PlainMAE, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Unfused AdamW with the published groups: biases and 1-D tensors do not decay."""
    trainable = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    plain = [p for name, p in trainable if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in trainable if not (p.ndim == 1 or name.endswith(".bias"))]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)


@torch.no_grad()
def plain_ema(teacher: PlainMAE, student: PlainMAE, momentum: float) -> None:
    """Teacher = momentum * teacher + (1 - momentum) * student, tensor by tensor, position tables included."""
    for kept, new in zip(teacher.parameters(), student.parameters(), strict=True):
        kept.copy_(momentum * kept + (1 - momentum) * new)


def plain_step(
    student: PlainMAE,
    teacher: PlainMAE,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    *,
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = True,
    gamma: float = 1.0,
    momentum: float = 0.996,
) -> dict[str, float]:
    """One whole step on normalised images [B, C, H, W] as published: fp16 autocast and a gradient scaler on a GPU.

    Args:
        scaler: torch.amp.GradScaler, disabled on a CPU.
    Returns: the losses, read from the device.
    Raises: ArithmeticError if the total is not finite.
    """
    L = student.pos_embed.shape[1] - 1
    ids_shuffle = torch.rand(len(images), L, device=images.device).argsort(dim=1)
    with torch.autocast(images.device.type, dtype=torch.float16, enabled=images.device.type == "cuda"):
        reconstruction, consistency = plain_losses(student, teacher, images, ids_shuffle, mask_ratio, norm_pix_loss)
        total = reconstruction + gamma * consistency
    figures = {"loss": total.item(), "reconstruction": reconstruction.item(), "consistency": consistency.item()}
    if not math.isfinite(figures["loss"]):
        raise ArithmeticError(f"loss is {figures['loss']}")
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(student.parameters(), math.inf)  # the published loop computes the norm and drops it
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    plain_ema(teacher, student, momentum)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return figures
