"""Neck, heads and cross entropy: golden values of mmsegmentation, and what must hold besides."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden_files import require
from tools.verify.golden import FOLDER, read_golden
from tools.verify.measure import Measure
from tools.verify.segmentation_parts import heads, losses, neck
from transfer.segmentation.losses import pixel_cross_entropy
from transfer.segmentation.necks import Feature2Pyramid
from transfer.segmentation.resizing import conv3x3_of_resized, resize
from transfer.segmentation.upernet import FCNHead, UPerHead, channel_dropout

SCALES = (1, 2, 3, 6)


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compared", [neck, heads, losses], ids=["neck", "heads", "losses"])
def test_golden(compared: Callable[[Path], Iterator[Measure]]) -> None:
    require(compared(FOLDER))


@pytest.mark.parametrize("average", ["all_pixels", "valid_pixels"])
def test_the_loss_of_ignored_pixels_is_zero(average: str) -> None:
    golden, _ = read_golden(FOLDER, "segmentation_loss")
    assert golden["all_ignored.decode.loss_ce"] == golden["all_ignored.aux.loss_ce"] == 0
    logits = golden["logits.main"].requires_grad_()
    loss = pixel_cross_entropy(logits, torch.full_like(golden["label"], 255), average, 255)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


# ---- what must hold besides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["all_pixels", "valid_pixels"])
def test_the_loss_equals_one_over_the_whole_batch(average: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, 6, generator=generator)
    labels = torch.randint(0, 5, (3, 16, 24), generator=generator)
    labels[0, :9] = labels[1] = 255
    found, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = pixel_cross_entropy(found, labels.to(torch.uint8), average, 255)
    resized = F.interpolate(plain, size=(16, 24), mode="bilinear")
    expected = F.cross_entropy(resized, labels, ignore_index=255)  # its mean is over valid pixels
    if average == "all_pixels":
        expected = expected * (labels != 255).sum() / labels.numel()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(found.grad, plain.grad)
    with torch.no_grad():
        torch.testing.assert_close(pixel_cross_entropy(logits, labels, average, 255), expected)


def test_the_loss_is_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 4, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, 5, (2, 16, 16), generator=generator)
    plain = pixel_cross_entropy(logits.float(), labels, "all_pixels", 255)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_cross_entropy(logits, labels, "all_pixels", 255)
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)


@pytest.mark.parametrize("sizes", [[(16, 12), (8, 6), (4, 3), (1, 1)], [(3, 5), (6, 6), (2, 9)], [(7, 5), (7, 5)]])
def test_a_convolution_of_resized_maps_equals_one_of_all(sizes: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3 + i, *size, generator=generator).requires_grad_() for i, size in enumerate(sizes)]
    channels = sum(x.shape[1] for x in maps)
    weight = torch.randn(5, channels, 3, 3, generator=generator).requires_grad_()
    expected = F.conv2d(torch.cat([resize(x, sizes[0]) for x in maps], dim=1), weight, padding=1)
    found = conv3x3_of_resized(maps, weight, sizes[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    seed = torch.randn(expected.shape, generator=generator)
    pairs = zip(*(torch.autograd.grad((y * seed).sum(), [*maps, weight]) for y in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert torch.autograd.gradcheck(  # of the path that is not PyTorch's own convolution
        lambda x, w: conv3x3_of_resized([x], w, (5, 4)),
        (torch.randn(1, 2, 3, 2, dtype=torch.float64, generator=generator).requires_grad_(),
         torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=generator).requires_grad_()),
    )  # fmt: skip


def test_scores_and_labels_of_as_many_images() -> None:
    with pytest.raises(ValueError, match="scores of 2 images, labels of 3"):
        pixel_cross_entropy(torch.zeros(2, 5, 4, 4), torch.zeros(3, 4, 4), "all_pixels", 255)


def test_channel_dropout() -> None:
    x = torch.randn(64, 32, 2, 3, generator=torch.Generator().manual_seed(0)) + 10
    before = torch.random.get_rng_state()
    dropped, again = (channel_dropout(x, 0.25, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(dropped, again) and torch.equal(torch.random.get_rng_state(), before)
    kept = dropped.flatten(2).ne(0)
    assert torch.equal(kept.all(dim=2), kept.any(dim=2))  # whole channels
    assert abs(kept.float().mean() - 0.75) < 0.03
    torch.testing.assert_close(dropped[dropped != 0], (x / 0.75)[dropped != 0])
    assert channel_dropout(x, 0.25, None) is x and channel_dropout(x, 0.0, torch.Generator()) is x


def test_initial_weights_come_from_the_generator_alone() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        heads = nn.ModuleList([Feature2Pyramid(8), UPerHead(8, 4, 3, SCALES, 0.1), FCNHead(8, 4, 3, 0.1)])
        for head in heads:
            head.init_weights(torch.Generator().manual_seed(seed))
        return heads.state_dict()

    first, second, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    same = {name for name in first if torch.equal(first[name], other[name])}
    assert same == {n for n in first if ".bn." in n or "upsample_4x.1" in n or n.endswith("conv_seg.bias")}
    std = drawn(3)["1.fpn_bottleneck.conv.weight"].std()
    assert abs(std / (2 / (9 * 4)) ** 0.5 - 1) < 0.1  # fan out: kernel times channels
