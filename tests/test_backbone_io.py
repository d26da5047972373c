"""The backbone directory: timm loads every export, nothing but the encoder is in it, and loading says what it did."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.backbone_io import CONFIG, TIMM_NAMES, WEIGHTS, export_backbone, load_backbone, timm_architecture
from core.errors import CheckpointError, NumericError
from core.transforms import IMAGENET_MEAN, IMAGENET_STD
from core.vit import ViT, ViTConfig, resize_pos_embed
from pretrain.mae import DecoderConfig, MaskedAutoencoder
from pretrain.presets import ENCODERS, preset


def sized(**changes: object) -> ViTConfig:
    values: dict = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return ViTConfig(**{**values, **changes})


def shallow(name: str) -> ViTConfig:
    """Two blocks of a preset at its full width."""
    return preset(name)[0].model_copy(update={"depth": 2})


SIZES = {
    "tiny": preset("tiny")[0],
    "small": preset("small")[0],
    "base": preset("base")[0],
    "large": preset("large")[0],
    "huge, two blocks": shallow("huge"),
    "cifar10_tiny": ViTConfig(img_size=(32, 32), patch_size=4, embed_dim=128, depth=6, num_heads=4),
    "tiny at 96 px": preset("tiny", (96, 96))[0],
    "non-square": sized(img_size=(32, 48)),
    "one channel": sized(in_chans=1),
    "mlp_ratio 2": sized(mlp_ratio=2.0),
    "all at once": sized(img_size=(24, 40), in_chans=4, mlp_ratio=1.5, embed_dim=32, num_heads=8),
}
# What timm must be told beyond the name of the architecture, written by hand.
BASE = "vit_base_patch16_224"
SMALL_ARGS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": [32, 32]}
ARCHITECTURES = {
    "tiny": ("vit_tiny_patch16_224", {}),
    "small": ("vit_small_patch16_224", {}),
    "base": (BASE, {}),
    "large": ("vit_large_patch16_224", {}),
    "huge, two blocks": (BASE, {"patch_size": 14, "embed_dim": 1280, "depth": 2, "num_heads": 16}),
    "cifar10_tiny": (BASE, {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "img_size": [32, 32]}),
    "tiny at 96 px": ("vit_tiny_patch16_224", {"img_size": [96, 96]}),
    "non-square": (BASE, {**SMALL_ARGS, "img_size": [32, 48]}),
    "one channel": (BASE, {**SMALL_ARGS, "in_chans": 1}),
    "mlp_ratio 2": (BASE, {**SMALL_ARGS, "mlp_ratio": 2.0}),
    "all at once": (
        BASE,
        {**SMALL_ARGS, "embed_dim": 32, "num_heads": 8, "img_size": [24, 40], "in_chans": 4, "mlp_ratio": 1.5},
    ),
}


def noisy(model: ViT, seed: int = 0) -> ViT:
    """Initialised, with noise on every tensor, so that none is zero or one and none can be taken for another."""
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.empty_like(parameter).uniform_(-0.05, 0.05, generator=generator)
    return model.eval().requires_grad_(False)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def images_for(vit: ViT) -> Tensor:
    shape = (1, vit.config.in_chans, *vit.config.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_timm_equals(model: torch.nn.Module, vit: ViT, tokens: Tensor) -> None:
    """Every tensor of the timm model is that of `vit`, and its features are `tokens`."""
    ours, theirs = vit.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    with torch.no_grad():
        features = model.eval().forward_features(images_for(vit))
    torch.testing.assert_close(features, tokens, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_timm_loads_the_export_by_both_routes(tmp_path: Path, name: str) -> None:  # base takes 10 s, large 30
    vit, folder = noisy(ViT(SIZES[name])), tmp_path / "backbone"
    tokens = vit.tokens(images_for(vit))
    export_backbone(folder, vit, {})
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_timm_equals(model, vit, tokens)
    assert model.num_features == vit.config.embed_dim and model.num_classes == 0
    del model

    description = json.loads((folder / CONFIG).read_bytes())
    assert (description["architecture"], description.get("model_args", {})) == ARCHITECTURES[name]
    assert ("model_args" in description) == bool(ARCHITECTURES[name][1])  # exactly where needed
    arguments = description.get("model_args", {})
    model = timm.create_model(description["architecture"], checkpoint_path=folder / WEIGHTS, num_classes=0, **arguments)
    assert_timm_equals(model, vit, tokens)
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert len(file.keys()) == 6 + 12 * vit.config.depth  # 150 for base


@pytest.mark.parametrize("name", ENCODERS)
def test_every_preset_is_an_architecture_of_timm(name: str) -> None:
    config = preset(name)[0]
    architecture, arguments = timm_architecture(config)
    assert arguments == {} and architecture.startswith(f"vit_{name}_patch{config.patch_size}_")
    with torch.device("meta"):  # full depth without its memory
        theirs, ours = timm.create_model(architecture, num_classes=0), ViT(config)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert {block.attn.num_heads for block in theirs.blocks} == {config.num_heads}
    assert {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert len(TIMM_NAMES) == len(ENCODERS)


def test_without_pretrained_timm_gives_other_weights(tmp_path: Path) -> None:
    vit = noisy(ViT(sized()))
    export_backbone(tmp_path / "backbone", vit, {})
    model = timm.create_model(f"local-dir:{tmp_path / 'backbone'}")
    ours, theirs = vit.state_dict(), model.state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours)


def test_config_says_what_timm_and_a_reader_need(tmp_path: Path) -> None:
    config = sized(img_size=(32, 48))
    provenance = {"branch": "teacher", "step": 7, "config": "0123456789ab", "git_commit": None}
    export_backbone(tmp_path / "a", noisy(ViT(config)), provenance, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    description = json.loads((tmp_path / "a" / CONFIG).read_bytes())
    assert (description["num_classes"], description["num_features"], description["global_pool"]) == (0, 24, "token")
    facts = description["pretrained_cfg"]
    assert (facts["mean"], facts["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (facts["input_size"], facts["num_classes"]) == ([3, 32, 48], 0)
    assert description["rcmae"] == {"vit": json.loads(config.model_dump_json()), **provenance}

    model = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert [tuple(data[key]) for key in ("mean", "std")] == [(0.1, 0.2, 0.3), (0.4, 0.5, 0.6)]
    assert data["input_size"] == (3, 32, 48)

    export_backbone(tmp_path / "b", noisy(ViT(config)), {})
    facts = json.loads((tmp_path / "b" / CONFIG).read_bytes())["pretrained_cfg"]
    assert (tuple(facts["mean"]), tuple(facts["std"])) == (IMAGENET_MEAN, IMAGENET_STD)


def test_export_of_a_masked_autoencoder_is_its_encoder(tmp_path: Path) -> None:
    model = noisy(MaskedAutoencoder(sized(), DecoderConfig(embed_dim=16, depth=2, num_heads=2)))
    export_backbone(tmp_path / "backbone", model, {})
    stored = load_file(tmp_path / "backbone" / WEIGHTS)
    assert stored.keys() == ViT(sized()).state_dict().keys()
    assert not [key for key in stored if key.startswith(("mask_token", "decoder"))]
    assert all(torch.equal(stored[key], model.state_dict()[key]) for key in stored)
    vit, _ = load_backbone(tmp_path / "backbone")
    tokens = model.tokens(images_for(model))
    assert torch.equal(vit.tokens(images_for(vit)), tokens)
    assert_timm_equals(timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True), vit, tokens)


@pytest.mark.parametrize("name", ["cifar10_tiny", "tiny at 96 px", "non-square", "all at once"])
def test_own_directory_loads_whole(tmp_path: Path, name: str) -> None:
    vit = noisy(ViT(SIZES[name]))
    export_backbone(tmp_path / "backbone", vit, {"step": 1})
    loaded, report = load_backbone(tmp_path / "backbone")
    assert loaded.config == vit.config
    ours, theirs = vit.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours) and ours.keys() == theirs.keys()
    assert set(report.loaded) == ours.keys() and (report.resized, report.new, report.ignored) == ((), (), ())
    assert report.lines() == ["layout   rcmae backbone", f"loaded   {len(ours)} tensors"]


@pytest.mark.parametrize(("stored", "wanted"), [((32, 32), (48, 64)), ((32, 48), (32, 32)), ((64, 16), (8, 8))])
def test_loading_for_another_size_resizes_the_positions_alone(
    tmp_path: Path, stored: tuple[int, int], wanted: tuple[int, int]
) -> None:
    vit = noisy(ViT(sized(img_size=stored)))
    export_backbone(tmp_path / "backbone", vit, {})
    loaded, report = load_backbone(tmp_path / "backbone", img_size=wanted)
    assert loaded.config == sized(img_size=wanted)
    (rows, columns), (new_rows, new_columns) = vit.config.grid, (wanted[0] // 8, wanted[1] // 8)
    assert report.resized == (f"pos_embed {rows}x{columns} -> {new_rows}x{new_columns}",)
    assert (report.new, report.ignored, len(report.loaded)) == ((), (), len(vit.state_dict()))

    table = vit.pos_embed[:, 1:].reshape(1, rows, columns, 24).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    table = F.interpolate(table, size=(new_rows, new_columns), mode="bicubic", align_corners=False)
    expected = torch.cat([vit.pos_embed[:, :1], table.permute(0, 2, 3, 1).reshape(1, -1, 24)], dim=1)
    torch.testing.assert_close(loaded.pos_embed.data, expected, atol=1e-6, rtol=0)
    ours, theirs = vit.state_dict(), loaded.state_dict()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == ["pos_embed"]
    assert loaded.tokens(torch.zeros(1, 3, *wanted)).shape == (1, 1 + new_rows * new_columns, 24)


def test_same_grid_at_another_patch_count_is_not_resized(tmp_path: Path) -> None:
    vit = noisy(ViT(sized(img_size=(32, 48))))
    export_backbone(tmp_path / "backbone", vit, {})
    loaded, report = load_backbone(tmp_path / "backbone", img_size=(32, 48))
    assert report.resized == () and torch.equal(loaded.pos_embed, vit.pos_embed)
    turned, report = load_backbone(tmp_path / "backbone", img_size=(48, 32))  # as many patches, another grid
    assert report.resized == ("pos_embed 4x6 -> 6x4",) and not torch.equal(turned.pos_embed, vit.pos_embed)


def test_half_precision_weights_become_float32_before_they_are_resized(tmp_path: Path) -> None:
    vit = noisy(ViT(sized()))
    export_backbone(tmp_path / "backbone", vit, {})
    half = {key: tensor.half() for key, tensor in vit.state_dict().items()}
    save_file(half, tmp_path / "backbone" / WEIGHTS)
    loaded, _ = load_backbone(tmp_path / "backbone", img_size=(48, 48))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.norm.weight.data, half["norm.weight"].float())
    assert torch.equal(loaded.pos_embed.data, resize_pos_embed(half["pos_embed"].float(), (4, 4), (6, 6)))


def read_pair(folder: Path) -> tuple[str, str]:
    """Digests of both files of one opened directory, whatever its name stands for a moment later."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        digests = []
        for name in (WEIGHTS, CONFIG):
            with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=handle), "rb") as file:
                digests.append(digest(file.read()))
        return digests[0], digests[1]
    finally:
        os.close(handle)


def test_a_reader_sees_whole_old_or_new_content_while_the_export_is_replaced(tmp_path: Path) -> None:
    versions = [noisy(ViT(sized()), seed) for seed in (0, 1)]
    pairs = []
    for i, vit in enumerate(versions):
        export_backbone(tmp_path / f"reference_{i}", vit, {"step": i})
        pairs.append(read_pair(tmp_path / f"reference_{i}"))
    assert pairs[0][0] != pairs[1][0] and pairs[0][1] != pairs[1][1]

    folder = tmp_path / "out" / "backbone"
    export_backbone(folder, versions[1], {"step": 1})
    done, seen, problems = threading.Event(), set(), []

    def reader() -> None:
        while not done.is_set():
            try:
                seen.add(read_pair(folder))
                seen_weights = digest((folder / WEIGHTS).read_bytes())
                assert seen_weights in {pairs[0][0], pairs[1][0]}
            except FileNotFoundError:  # between the two renames, or from the old folder while it is removed
                continue
            except Exception as error:
                problems.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    for i in range(50):
        export_backbone(folder, versions[i % 2], {"step": i % 2})
        time.sleep(0.002)
    done.set()
    thread.join()
    assert problems == [] and seen == set(pairs)
    assert [path.name for path in folder.parent.iterdir()] == ["backbone"]  # nothing temporary stays


def test_an_opened_export_stays_readable_after_it_is_replaced(tmp_path: Path) -> None:
    old, new = noisy(ViT(sized()), 0), noisy(ViT(sized()), 1)
    folder = tmp_path / "backbone"
    export_backbone(folder, old, {})
    with safe_open(folder / WEIGHTS, "pt") as file:  # maps the file: a truncated one would kill the process
        export_backbone(folder, new, {})
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in old.state_dict().items())
    assert torch.equal(load_backbone(folder)[0].pos_embed, new.pos_embed)


def exported(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """A small backbone directory and what is in it."""
    export_backbone(folder, noisy(ViT(sized())), {})
    return load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_bytes())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["blocks.1.mlp.fc2.weight", "pos_embed"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, key: str, value: float) -> None:
    state, _ = exported(tmp_path / "backbone")
    state[key].view(-1)[-1] = value
    save_file(state, tmp_path / "backbone" / WEIGHTS)
    for img_size in (None, (64, 64)):
        with pytest.raises(NumericError, match=f"{tmp_path / 'backbone'}: {key} ") as caught:
            load_backbone(tmp_path / "backbone", img_size=img_size)
        assert caught.value.exit_code == 5 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"depth": 3}, "12 missing tensors: blocks.2.attn.proj.bias"),
        ({"depth": 1}, "12 unknown tensors: blocks.1.attn.proj.bias"),
        ({"depth": 10**9}, "30 tensors cannot make up 1000000000 blocks"),
        ({"embed_dim": 48}, "cls_token has shape [1, 1, 24], expected [1, 1, 48]"),
        ({"embed_dim": 4 * 10**30, "num_heads": 1}, "its sizes are too large for any model"),
        ({"img_size": [32, 40]}, "pos_embed has shape [1, 17, 24], expected [1, 21, 24]"),
        ({"img_size": [8 * 10**12, 8 * 10**12]}, "its sizes are too large for any model"),
        ({"num_heads": 5}, "embed_dim=24 is not divisible by num_heads=5"),
        ({"depth": "many"}, "depth: Input should be a valid integer"),
        ({"window": 7}, "window: Extra inputs are not permitted"),
    ],
)
@pytest.mark.parametrize("img_size", [None, (48, 48)])
def test_a_description_that_does_not_fit_the_weights_is_refused(
    tmp_path: Path, changes: dict, expected: str, img_size: tuple[int, int] | None
) -> None:
    folder = tmp_path / "backbone"
    _, description = exported(folder)
    description["rcmae"]["vit"].update(changes)
    (folder / CONFIG).write_text(json.dumps(description))
    with pytest.raises(CheckpointError) as caught:
        load_backbone(folder, img_size=img_size)
    message = str(caught.value)
    assert caught.value.exit_code == 4 and "\n" not in message and str(folder) in message and expected in message


@pytest.mark.parametrize("text", ["", "{", "5", '{"rcmae": 3}', '{"rcmae": {}}', "[" * 10**5, "\xff\x00"])
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    exported(tmp_path / "backbone")
    (tmp_path / "backbone" / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'backbone' / CONFIG}: not a backbone description: ."):
        load_backbone(tmp_path / "backbone")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    state, _ = exported(tmp_path / "backbone")
    state["norm.bias"] = state["norm.bias"].to(torch.int8)
    save_file(state, tmp_path / "backbone" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"norm\.bias is torch\.int8"):
        load_backbone(tmp_path / "backbone")
