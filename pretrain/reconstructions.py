"""The picture of a pretraining run: input, masked input, and what student and teacher make of it, for a few images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from core.datasets import ImageSource
from core.images import MAX_PIXELS, BadImage
from core.loader import read_image, sample_rng
from core.transforms import normalize, resize_center_crop
from core.vit import gather_patches, patchify, unpatchify
from pretrain.mae import TARGET_EPS, MaskedAutoencoder, random_masking

GREY = 0.5
GAP_PX, CAPTION_PX, MIN_SIDE_PX = 6, 22, 128


@dataclass(frozen=True)
class Reconstructions:
    """A few fixed images under a fixed mask; call it with the networks to draw them."""

    images: Tensor  # uint8 [N, C, H, W]
    noise: Tensor  # [N, L]
    mask_ratio: float
    norm_pix_loss: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def __call__(self, student: MaskedAutoencoder, teacher: MaskedAutoencoder | None) -> np.ndarray:
        """One row per image, as uint8 [height, width, 3]; a student or teacher column shows what it was given too."""
        device = student.mask_token.device
        grid, side = student.config.grid, student.config.patch_size
        images = self.images.to(device)
        pixels = patchify(images.float() / 255, side)  # [N, L, V] in 0..1
        ids_keep, ids_hidden = random_masking(self.noise.to(device), self.mask_ratio)
        patches = patchify(normalize(images, self.mean, self.std, torch.float32), side)
        columns = {"input": pixels, "masked": self._with_hidden(pixels, ids_hidden, GREY)}
        for name, network in (("student", student), ("teacher", teacher)):
            if network is not None:
                guess = self._to_pixels(network(patches, ids_keep, ids_hidden).float(), patches, ids_hidden)
                columns[name] = self._with_hidden(pixels, ids_hidden, guess)
        rows = [unpatchify(x.clamp(0, 1), side, grid).cpu() for x in columns.values()]  # each [N, C, H, W]
        note = "patches scaled by their true mean and deviation" if self.norm_pix_loss else ""
        return contact_sheet(list(columns), torch.stack(rows, dim=1), note)

    def _to_pixels(self, prediction: Tensor, patches: Tensor, ids_hidden: Tensor) -> Tensor:
        if self.norm_pix_loss:  # the network predicts normalised patches; only their true statistics make them pictures
            variance, mean = torch.var_mean(gather_patches(patches, ids_hidden), dim=-1, keepdim=True)
            prediction = prediction * (variance + TARGET_EPS).sqrt() + mean
        repeat = prediction.shape[-1] // len(self.mean)  # values run (row, column, channel): channels fastest
        scale, shift = (prediction.new_tensor(values).repeat(repeat) for values in (self.std, self.mean))
        return prediction * scale + shift  # [N, M, V] in about 0..1

    @staticmethod
    def _with_hidden(pixels: Tensor, ids_hidden: Tensor, content: Tensor | float) -> Tensor:
        index = ids_hidden.unsqueeze(-1).expand(-1, -1, pixels.shape[-1])
        source = content if isinstance(content, Tensor) else torch.full_like(index, 0, dtype=pixels.dtype) + content
        return pixels.scatter(1, index, source)


def choose_images(source: ImageSource, num_images: int, img_size: tuple[int, int], channels: int) -> Tensor:
    """The first readable of evenly spread images, centre-cropped: uint8 [N, C, *img_size], N <= num_images."""
    chosen: list[Tensor] = []
    for index in np.linspace(0, len(source) - 1, 3 * num_images).round().astype(int):
        try:
            image = read_image(source, int(index), channels, MAX_PIXELS)
        except BadImage:
            continue
        chosen.append(resize_center_crop(image, img_size, 1.0))
        if len(chosen) == num_images:
            break
    return torch.stack(chosen) if chosen else torch.empty(0, channels, *img_size, dtype=torch.uint8)


def fixed_noise(seed: int, num_images: int, num_patches: int) -> Tensor:
    """The noise of the picture's masks, float32 [N, L]: the same throughout a run."""
    return torch.from_numpy(
        sample_rng(seed, num_images, num_patches).random((num_images, num_patches), dtype=np.float32)
    )


def contact_sheet(titles: Sequence[str], rows: Tensor, note: str) -> np.ndarray:
    """Rows of pictures [N, columns, C, H, W] in 0..1 under titles, enlarged if small, as uint8 [height, width, 3]."""
    N, columns, _, H, W = rows.shape
    zoom = max(1, -(-MIN_SIDE_PX // min(H, W)))
    cell_h, cell_w = H * zoom + GAP_PX, W * zoom + GAP_PX
    foot = CAPTION_PX if note else 0
    sheet = Image.new("RGB", (columns * cell_w + GAP_PX, CAPTION_PX + N * cell_h + GAP_PX + foot), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for c, title in enumerate(titles):
        draw.text((GAP_PX + c * cell_w, 3), title, fill="black", font=font)
        for n in range(N):
            pixels = (rows[n, c] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()  # [H, W, C]
            image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            image = image.resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (GAP_PX + c * cell_w, CAPTION_PX + n * cell_h))
    if note:
        draw.text((GAP_PX, sheet.height - CAPTION_PX), note, fill="dimgray", font=font)
    return np.array(sheet)
