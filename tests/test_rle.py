"""Run-length masks: equal to pycocotools' where they are whole, and refused before it could misread them."""

import numpy as np
import torch
from pycocotools import mask as mask_api

from transfer.detection.rle import BadMask, compressed_rle, decode, encode, first_bad, rle_of, runs_of


def test_run_lengths_are_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 70, 2)
        masks = rng.random((3, height, width)) < rng.choice([0, 0.01, 0.4, 0.99, 1])
        masks[0, : height // 2, : width // 2 + 1] = True
        for mask, rle in zip(masks, encode(torch.from_numpy(masks)), strict=True):
            assert rle.counts == mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
            assert (decode(rle) == mask).all()
            assert compressed_rle(rle.counts, int(height), int(width)) == rle
            assert rle_of({"size": [height, width], "counts": runs_of(rle).tolist()}, height, width) == rle
    assert encode(torch.zeros(0, 4, 5, dtype=torch.bool)) == []


def test_a_changed_run_length_never_gives_uninitialised_memory() -> None:
    rng = np.random.default_rng(1)
    masks = torch.zeros(4, 50, 70, dtype=torch.bool)
    masks[0, 10:30, 20:60] = masks[1, :, ::3] = masks[2, 5] = masks[3, 49, 69] = True
    refused = 0
    for rle in encode(masks) * 300:
        data = bytearray(rle.counts)
        if rng.random() < 0.3:
            data = data[: rng.integers(len(data))]
        else:
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            changed = compressed_rle(bytes(data), 50, 70)
        except BadMask:
            refused += 1
            continue
        coded = {"size": [50, 70], "counts": changed.counts}
        mask = mask_api.decode(coded)
        assert mask.max() <= 1 and mask.sum() == mask_api.area(coded) and (mask == decode(changed)).all()
    assert 900 < refused < 1200


def test_the_first_bad_mask_of_many_is_found() -> None:
    masks = torch.rand(9, 20, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    counts = [rle.counts for rle in encode(masks)] * 300  # more than are checked at once
    pixels = np.full(len(counts), 600)
    assert first_bad(counts, pixels) is None and first_bad([], pixels[:0]) is None
    for place in (0, 1023, 1024, 2699):
        assert first_bad([*counts[:place], counts[place][:-1], *counts[place + 1 :]], pixels) == place
    for text in (b"", b"\x00", b"o", b"oooooooooo0", "\u00e9".encode(), b"0" * 600):
        assert first_bad([counts[0], text, counts[1]], pixels[:3]) == 1
