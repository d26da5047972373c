"""Foreign checkpoints: every layout loads with the features of its source and a clean report; all else is refused.

The files are made here: MAE and RC-MAE as their code saves them, timm by timm, Hugging Face by a renaming of its own.
"""

import argparse
import builtins
import io
import json
import os
import pathlib
import pickle
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from core.backbone_io import load_backbone
from core.errors import CheckpointError, NumericError, RcmaeError
from core.vit import ViT, ViTConfig, resize_pos_embed
from pretrain.mae import DecoderConfig, MaskedAutoencoder

SMALL = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=48, depth=3, num_heads=4)
DECODER = DecoderConfig(embed_dim=32, depth=2, num_heads=4)
NUM_ENCODER, NUM_DECODER = 6 + 3 * 12, 8 + 2 * 12  # tensors of the encoder; of the decoder, its table and mask token
State = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected pickle protocol", "ignore:Defining your `__torch_function__`", "ignore:Validating sparse"
)


def noisy(seed: int = 0, config: ViTConfig = SMALL) -> MaskedAutoencoder:
    """A masked autoencoder of which no two tensors are alike."""
    model = MaskedAutoencoder(config, DECODER)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def encoder_of(model: MaskedAutoencoder) -> State:
    return {key: t for key, t in model.state_dict().items() if not key.startswith(("decoder", "mask_token"))}


def mae_file(model: State) -> dict[str, Any]:
    """What MAE's code saves."""
    return {"model": model, "optimizer": {}, "epoch": 3, "scaler": {}, "args": argparse.Namespace(lr=1)}


def hugging_face(state: State, prefix: str = "vit.") -> State:
    """A ViT-MAE state dict in Hugging Face's names, written from its model's definition."""
    whole = {
        "cls_token": f"{prefix}embeddings.cls_token",
        "pos_embed": f"{prefix}embeddings.position_embeddings",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
    }
    stems = {
        "patch_embed.proj": f"{prefix}embeddings.patch_embeddings.projection",
        "norm": f"{prefix}layernorm",
        "decoder_embed": "decoder.decoder_embed",
        "decoder_norm": "decoder.decoder_norm",
        "decoder_pred": "decoder.decoder_pred",
    }
    in_block = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    folders = {"blocks": f"{prefix}encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
    out: State = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if key in whole:
            out[whole[key]] = value
        elif stem in stems:
            out[f"{stems[stem]}.{leaf}"] = value
        else:
            blocks, index, part = stem.split(".", 2)
            start = f"{folders[blocks]}.{index}"
            if part == "attn.qkv":
                for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    out[f"{start}.attention.attention.{name}.{leaf}"] = third.contiguous()
            else:
                out[f"{start}.{in_block[part]}.{leaf}"] = value
    assert len(out) == len(state) + sum("attn.qkv" in key for key in state) * 2
    return out


def assert_features(vit: ViT, expected: Callable[[Tensor], Tensor]) -> None:
    images = torch.randn(2, 3, *vit.config.img_size, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.testing.assert_close(vit.tokens(images), expected(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_mae_pretraining_file(tmp_path: Path, suffix: str, zipped: bool) -> None:
    model, path = noisy(), tmp_path / f"checkpoint-1599{suffix}"
    torch.save(mae_file(model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    vit, report = load_backbone(path, num_heads=4)
    assert vit.config == SMALL
    assert_features(vit, model.tokens)
    assert set(report.loaded) == encoder_of(model).keys() and len(report.loaded) == NUM_ENCODER
    assert (report.resized, report.new) == ((), ())
    assert set(report.ignored) == model.state_dict().keys() - encoder_of(model).keys()
    assert len(report.ignored) == NUM_DECODER
    assert report.lines()[:2] == ["layout   MAE ('model')", f"loaded   {NUM_ENCODER} tensors"]
    assert report.lines()[2].startswith(f"ignored  {NUM_DECODER}: mask_token, decoder_pos_embed, ")
    assert report.lines()[2].endswith(f" and {NUM_DECODER - 6} more") and len(report.lines()) == 3


def test_mae_encoder_alone(tmp_path: Path) -> None:
    model, path = noisy(), tmp_path / "mae_pretrain_vit.pth"
    torch.save({"model": encoder_of(model)}, path)
    vit, report = load_backbone(path, num_heads=4)
    assert_features(vit, model.tokens)
    assert len(report.loaded) == NUM_ENCODER and (report.resized, report.new, report.ignored) == ((), (), ())


def test_mae_file_for_another_size(tmp_path: Path) -> None:
    model, path = noisy(), tmp_path / "mae.pth"
    torch.save(mae_file(model.state_dict()), path)
    vit, report = load_backbone(path, num_heads=4, img_size=(48, 64))
    assert report.resized == ("pos_embed 4x4 -> 6x8",) and vit.config.img_size == (48, 64)
    torch.testing.assert_close(vit.pos_embed.data, resize_pos_embed(model.pos_embed, (4, 4), (6, 8)))
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


def test_mae_fine_tuned_file_has_a_new_norm(tmp_path: Path) -> None:
    model, path = noisy(), tmp_path / "mae_finetuned.pth"
    state = {key: tensor for key, tensor in encoder_of(model).items() if not key.startswith("norm.")}
    head = {"fc_norm.weight": 48, "fc_norm.bias": 48, "head.weight": (10, 48), "head.bias": 10}
    torch.save(mae_file({**state, **{key: torch.rand(shape) for key, shape in head.items()}}), path)
    vit, report = load_backbone(path, num_heads=4)
    assert (report.new, report.ignored) == (("norm.weight", "norm.bias"), tuple(head))
    assert len(report.loaded) == NUM_ENCODER - 2 and "norm.weight" not in report.loaded
    assert report.lines()[2] == "new      2: norm.weight, norm.bias"
    model.norm.reset_parameters()  # one and zero
    assert_features(vit, model.tokens)


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_rc_mae_pretraining_file_has_two_branches(tmp_path: Path, branch: str) -> None:
    models, path = {"student": noisy(1), "teacher": noisy(2)}, tmp_path / "checkpoint-1599.pth"
    student, teacher = (models[name].state_dict() for name in ("student", "teacher"))
    content = {
        "student": {f"module.{key}": tensor for key, tensor in student.items()},
        "teacher": teacher, "student_without_ddp": student, "teacher_without_ddp": teacher,
        "optimizer": {}, "epoch": 1599, "scaler": {}, "args": argparse.Namespace(lr=1.5e-4, output_dir="out"),
    }  # fmt: skip
    torch.save(content, path)
    vit, report = load_backbone(path, num_heads=4, branch=branch)
    assert_features(vit, models[branch].tokens)
    assert report.layout == f"RC-MAE pretraining ({branch})"
    assert (len(report.loaded), report.resized, report.new, len(report.ignored)) == (NUM_ENCODER, (), (), NUM_DECODER)


def timm_model(**changes: Any) -> torch.nn.Module:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
    model = timm.create_model("vit_base_patch16_224", **{**arguments, **changes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_state_dict(tmp_path: Path, suffix: str) -> None:
    model, path = timm_model(), tmp_path / f"vit{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    vit, report = load_backbone(path, num_heads=4)
    assert_features(vit, model.forward_features)
    assert (len(report.loaded), report.resized, report.new) == (NUM_ENCODER, (), ())
    assert (set(report.ignored), report.layout) == ({"head.weight", "head.bias"}, "timm")


def test_timm_state_dict_with_pooled_features(tmp_path: Path) -> None:
    model, path = timm_model(global_pool="avg"), tmp_path / "vit.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    vit, report = load_backbone(path, num_heads=4)
    assert report.new == ("norm.weight", "norm.bias") and len(report.ignored) == 4
    assert_features(vit, lambda images: torch.nn.functional.layer_norm(model.forward_features(images), (48,), eps=1e-6))


@pytest.mark.parametrize("kind", ["file.safetensors", "file.bin", "folder"])
@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_hugging_face_vit_mae(tmp_path: Path, kind: str, prefix: str) -> None:
    model, path = noisy(), tmp_path / kind
    state = hugging_face(model.state_dict(), prefix)
    if kind == "folder":
        path.mkdir()
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "vit_mae", "num_attention_heads": 4}))
    elif kind == "file.bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    vit, report = load_backbone(path, num_heads=4)
    assert_features(vit, model.tokens)
    ours, theirs = encoder_of(model), vit.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (report.layout, report.resized, report.new) == ("Hugging Face ViT-MAE", (), ())
    assert len(report.loaded) == NUM_ENCODER
    assert len(report.ignored) == NUM_DECODER + 2 * 2 * 2  # query, key and value apart in two decoder blocks
    assert all(key.startswith("decoder.") for key in report.ignored)


def test_published_width_tells_the_heads(tmp_path: Path) -> None:
    config = ViTConfig(img_size=(32, 32), patch_size=16, embed_dim=192, depth=12, num_heads=3)
    model, path = noisy(config=config), tmp_path / "tiny.pth"
    torch.save(mae_file(model.state_dict()), path)
    vit, _ = load_backbone(path)
    assert vit.config == config
    assert_features(vit, model.tokens)
    assert load_backbone(path, num_heads=12)[0].config.num_heads == 12  # what is given counts


def test_a_published_size_without_its_last_block_is_refused(tmp_path: Path) -> None:
    config = ViTConfig(img_size=(32, 32), patch_size=16, embed_dim=192, depth=11, num_heads=3)
    path = tmp_path / "tiny.pth"
    torch.save(mae_file(noisy(config=config).state_dict()), path)
    assert_refused(path, "11 blocks, but ViTs of width 192 have 12", num_heads=None)
    assert load_backbone(path, num_heads=3)[0].config == config  # a size of one's own, said to be so


def test_an_unknown_branch_is_named(tmp_path: Path) -> None:
    torch.save(mae_file(noisy().state_dict()), tmp_path / "mae.pth")
    assert_refused(tmp_path / "mae.pth", "expected teacher or student", branch="professor", num_heads=4)


@pytest.mark.parametrize("changes", [{"in_chans": 1}, {"mlp_ratio": 2.0}, {"embed_dim": 44, "mlp_ratio": 60.001 / 44}])
def test_sizes_are_told_by_the_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, path = noisy(config=SMALL.model_copy(update=changes)), tmp_path / "mae.safetensors"
    save_file(model.state_dict(), path)
    vit, report = load_backbone(path, num_heads=4)
    images = torch.randn(1, vit.config.in_chans, 32, 32)
    assert torch.equal(vit.tokens(images), model.tokens(images)) and len(report.loaded) == NUM_ENCODER
    hidden = vit.blocks[0].mlp.fc1.out_features  # 60 / 44 * 44 is 59.99... in floating point
    assert hidden == model.blocks[0].mlp.fc1.out_features == int(vit.config.embed_dim * vit.config.mlp_ratio)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model, path = noisy(), tmp_path / "mae.pth"
    torch.save(mae_file({key: tensor.to(dtype) for key, tensor in model.state_dict().items()}), path)
    vit, _ = load_backbone(path, num_heads=4)
    assert {tensor.dtype for tensor in vit.state_dict().values()} == {torch.float32}
    assert torch.equal(vit.norm.weight, model.norm.weight.to(dtype).float())


# Refusals


def assert_refused(path: Path, *parts: str, error: type[RcmaeError] = CheckpointError, **arguments: Any) -> str:
    """The one line that refuses `path`; it names the file and holds all `parts`."""
    with pytest.raises(error) as caught:
        load_backbone(path, **{"num_heads": 4, **arguments})
    message = str(caught.value)
    assert type(caught.value) is error and caught.value.exit_code == (4 if error is CheckpointError else 5)
    assert message.isprintable(), ascii(message)  # one line, and nothing that a terminal would obey
    assert message.startswith(f"{path}")
    for part in parts:
        assert part in message, message
    return message


def without(*names: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in [key for key in state if key.startswith(names)]:
            del state[key]

    return change


def with_value(key: str, value: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({key: value})


BROKEN = {
    "block missing in the middle": (without("blocks.1."), "12 missing tensors: blocks.1.attn.proj.bias"),
    "tensor of the last block missing": (without("blocks.2.mlp.fc2.bias"), "1 missing tensors: blocks.2.mlp.fc2.bias"),
    "first block missing": (without("blocks.0."), "blocks.0.mlp.fc1.weight is missing"),
    "no class token": (without("cls_token"), "1 missing tensors: cls_token"),
    "no final norm, no fc_norm": (without("norm."), "2 missing tensors: norm.bias, norm.weight"),
    "no positions": (without("pos_embed"), "pos_embed is missing"),
    "no patch embedding": (without("patch_embed"), "patch_embed.proj.weight is missing"),
    "layer scale": (with_value("blocks.0.ls1.gamma", torch.ones(48)), "1 unknown tensors: blocks.0.ls1.gamma"),
    "registers": (with_value("reg_token", torch.ones(1, 4, 48)), "1 unknown tensors: reg_token"),
    "relative positions": (with_value("blocks.2.attn.rel_pos_h", torch.ones(7, 12)), "blocks.2.attn.rel_pos_h"),
    "distillation token": (with_value("dist_token", torch.ones(1, 1, 48)), "1 unknown tensors: dist_token"),
    "nothing like a name": (with_value("a\x1b[31m\nb", torch.ones(1)), r"1 unknown tensors: a\x1b[31m\nb"),
    "a block far away": (with_value("blocks.99999999.x", torch.ones(1)), "tensors cannot make up 100000000 blocks"),
    "a block beyond counting": (with_value(f"blocks.{'9' * 5000}.x", torch.ones(1)), "unknown tensors: blocks.999"),
    "wrong shape": (
        with_value("blocks.1.attn.qkv.weight", torch.ones(144, 47)),
        "blocks.1.attn.qkv.weight has shape [144, 47], expected [144, 48]",
    ),
    "wrong rank": (with_value("pos_embed", torch.ones(17)), "pos_embed is missing or of another shape"),
    "positions of another width": (with_value("pos_embed", torch.ones(1, 17, 44)), "pos_embed has shape [1, 17, 44]"),
    "positions of a non-square grid": (with_value("pos_embed", torch.ones(1, 1 + 12, 48)), "pos_embed of 12 patches"),
    "no patches": (with_value("pos_embed", torch.ones(1, 1, 48)), "no plain ViT: img_size.0"),
    "no positions at all": (with_value("pos_embed", torch.ones(1, 0, 48)), "pos_embed of -1 patches"),
    "no width": (with_value("patch_embed.proj.weight", torch.ones(0, 3, 8, 8)), "no plain ViT: "),
    "oblong patches": (
        with_value("patch_embed.proj.weight", torch.ones(48, 3, 8, 4)),
        "patch_embed.proj.weight has shape [48, 3, 8, 4], expected [48, 3, 8, 8]",
    ),
    "a hidden width without weights": (
        with_value("blocks.0.mlp.fc1.weight", torch.ones(10**15, 0)),
        "blocks.0.mlp.fc1.weight has shape [1000000000000000, 0]",
    ),
    "integers": (with_value("norm.weight", torch.ones(48, dtype=torch.int64)), "norm.weight is torch.int64"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_explained_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    change, expected = BROKEN[name]
    state, path = dict(noisy().state_dict()), tmp_path / f"weights{suffix}"
    change(state)
    if suffix == ".pth":
        torch.save(mae_file(state), path)
    else:
        save_file(state, path)
    assert_refused(path, expected)
    assert_refused(path, img_size=(64, 48))


@pytest.mark.parametrize("num_heads", [None, 0])
def test_unknown_heads_are_asked_for(tmp_path: Path, num_heads: int | None) -> None:
    torch.save(mae_file(noisy().state_dict()), tmp_path / "mae.pth")
    assert_refused(tmp_path / "mae.pth", "width 48", "num_heads", num_heads=num_heads)


@pytest.mark.parametrize(("num_heads", "reason"), [(5, "not divisible by num_heads=5"), (-4, "num_heads")])
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, num_heads: int, reason: str) -> None:
    torch.save(mae_file(noisy().state_dict()), tmp_path / "mae.pth")
    assert_refused(tmp_path / "mae.pth", reason, num_heads=num_heads)


def test_tensors_larger_than_what_is_stored_of_them_are_refused(tmp_path: Path) -> None:
    state = noisy().state_dict()
    state["pos_embed"] = torch.ones(1).expand(1, 1 + 10**12, 48)  # 4 bytes in the file
    torch.save(mae_file(state), tmp_path / "mae.pth")
    assert_refused(tmp_path / "mae.pth", "pos_embed is torch.float32, expected dense floating-point values")
    state["pos_embed"] = torch.ones(1, 17, 48, device="meta")
    torch.save(mae_file(state), tmp_path / "mae.pth")
    assert_refused(tmp_path / "mae.pth")
    state["pos_embed"] = torch.ones(1, 17, 48).to_sparse()
    torch.save(mae_file(state), tmp_path / "mae.pth")
    assert_refused(tmp_path / "mae.pth", "expected dense")


def test_strided_weights_load(tmp_path: Path) -> None:
    model, path = noisy(), tmp_path / "mae.pth"
    weight = model.state_dict()["blocks.0.mlp.fc1.weight"].T.contiguous().T
    assert not weight.is_contiguous()
    torch.save(mae_file({**model.state_dict(), "blocks.0.mlp.fc1.weight": weight}), path)
    assert_features(load_backbone(path, num_heads=4)[0], model.tokens)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    state = noisy().state_dict()
    state["blocks.2.norm1.bias"][5] = value
    torch.save(mae_file(state), tmp_path / "mae.pth")
    assert_refused(tmp_path / "mae.pth", "blocks.2.norm1.bias", error=NumericError)


def test_weights_too_large_for_float32_are_refused(tmp_path: Path) -> None:
    state = noisy().state_dict()
    state["cls_token"] = state["cls_token"].double() + 1e300
    torch.save(mae_file(state), tmp_path / "mae.pth")
    assert_refused(tmp_path / "mae.pth", "cls_token", error=NumericError)


def test_what_is_ignored_may_be_anything(tmp_path: Path) -> None:
    model = noisy()
    state = {**model.state_dict(), "head.\x1b[2J": torch.ones(1, dtype=torch.int8)}
    state["decoder_pred.bias"] = torch.full((192,), float("nan"))
    torch.save(mae_file(state), tmp_path / "mae.pth")
    vit, report = load_backbone(tmp_path / "mae.pth", num_heads=4)
    assert_features(vit, model.tokens)
    assert len(report.ignored) == NUM_DECODER + 1
    assert all(line.isprintable() for line in report.lines())
    short = {**encoder_of(model), "head.\x1b[2J": torch.ones(1)}
    torch.save(short, tmp_path / "short.pth")
    assert load_backbone(tmp_path / "short.pth", num_heads=4)[1].lines()[-1] == r"ignored  1: head.\x1b[2J"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "no weights found"),
        ([torch.ones(3)], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        (None, "holds a NoneType"),
        ({"epoch": 3, "a\nb": {}}, r"among its keys (epoch, a\nb)"),
        ({1: torch.ones(3)}, "no weights found among its keys (1)"),
        ({"model": {}}, "patch_embed.proj.weight is missing"),
        ({"model": {2: torch.ones(3)}}, "2: not a named tensor"),
        ({"model": {"cls_token": torch.ones(1), "extra": "text"}}, "extra: not a named tensor"),
        ({"model": {"norm": {"weight": torch.ones(1)}}}, "norm: not a named tensor"),
        ({"student": {}, "teacher": {}}, "patch_embed.proj.weight is missing"),
        ({"student": {"module.x": torch.ones(1)}}, "no weights found among its keys (student)"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", reason)


def test_hugging_face_faults_are_refused(tmp_path: Path) -> None:
    whole, path = hugging_face(noisy().state_dict()), tmp_path / "vit_mae.safetensors"
    key = "vit.encoder.layer.1.attention.attention.key.weight"
    changes: list[tuple[State, str]] = [
        ({**whole, key: torch.ones(48, 40)}, "blocks.1.attn.qkv.weight: shapes that do not go together: key [48, 40]"),
        ({k: t for k, t in whole.items() if k != key}, "1 missing tensors: blocks.1.attn.qkv.weight"),
        ({k: t for k, t in whole.items() if ".layer.1." not in k}, "12 missing tensors: blocks.1."),
        ({**whole, "vit.embeddings.mask_token": torch.ones(1, 1, 48)}, "unknown tensors: embeddings.mask_token"),
        ({**whole, "vit.encoder.layer.0.lambda_1": torch.ones(48)}, "unknown tensors: blocks.0.lambda_1"),
    ]
    for state, expected in changes:
        save_file(state, path)
        assert_refused(path, expected)


def zipped_state() -> bytes:
    buffer = io.BytesIO()
    torch.save(mae_file(noisy().state_dict()), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors", ""])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"hello, these are no weights\n" * 20,
        b"PK\x03\x04" + bytes(200),
        b"\x80\x02}q\x00.",
        b"version https://git-lfs.github.com/spec/v1\n",
        zipped_state()[:4000],
        save({"cls_token": torch.ones(1, 1, 48)})[:-7],
        bytes(1000),
    ],
    ids=["empty", "byte", "text", "zip", "pickle", "lfs", "cut zip", "cut safetensors", "zeros"],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    assert_refused(path)


def test_paths_without_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "no model.safetensors in it")
    assert_refused(tmp_path / "absent.pth", "No such file or directory")
    assert_refused(tmp_path / "absent.safetensors", "No such file or directory")
    (tmp_path / "folder.pth").mkdir()
    assert_refused(tmp_path / "folder.pth", "no model.safetensors in it")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "pytorch_model.bin").write_bytes(zipped_state())
    assert_refused(tmp_path / "sharded", "no model.safetensors in it")


# Pickles that run code, and safetensors that lie


class Call:
    """Pickles as a call of `function`, which happens when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


PAYLOADS = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "exec": lambda canary: Call(builtins.exec, f"open({str(canary)!r}, 'w')"),
    "eval": lambda canary: Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
    "open": lambda canary: Call(builtins.open, str(canary), "w"),
    "subprocess": lambda canary: Call(subprocess.call, ["touch", str(canary)]),
    "getattr": lambda canary: Call(getattr(pathlib.Path(canary), "touch")),  # noqa: B009
    "os.mkdir": lambda canary: Call(os.mkdir, str(canary)),
}
WRAPPINGS = {
    "in args": lambda state, payload: {**mae_file(state), "args": argparse.Namespace(lr=payload)},
    "in the state": lambda state, payload: {"model": {**state, "head.weight": payload}},
    "alone": lambda state, payload: payload,
}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrapping: str, forced: bool
) -> None:
    canary = tmp_path / "canary"
    content = WRAPPINGS[wrapping](noisy().state_dict(), PAYLOADS[name](canary))
    pickle.loads(pickle.dumps(PAYLOADS[name](canary)))
    assert canary.exists()  # the payload works
    canary.rmdir() if canary.is_dir() else canary.unlink()
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for zipped in (True, False):
        path = tmp_path / f"evil_{zipped}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert_refused(path, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set" if forced else "any code")
        assert not canary.exists()
    for plain in (tmp_path / "evil.bin", tmp_path / "evil.safetensors"):
        plain.write_bytes(pickle.dumps(content))
        assert_refused(plain)
        assert not canary.exists()


class Settings:
    """Some class of the program that saved the file."""


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(pathlib.PosixPath("/data"), "pathlib.PosixPath"), (Settings(), "Settings"), (random.Random, "random.Random")],
)
def test_a_pickle_that_needs_another_class_is_refused_with_the_reason(
    tmp_path: Path, value: object, wanted: str
) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({**mae_file(noisy().state_dict()), "args": argparse.Namespace(output_dir=value)}, path)
    message = assert_refused(path, "refused, it wants to load ", wanted, "safetensors")
    assert "weights_only" not in message  # torch's advice to switch the check off is not passed on


def test_forced_unsafe_loading_does_not_stop_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    save_file(noisy().state_dict(), tmp_path / "mae.safetensors")
    assert len(load_backbone(tmp_path / "mae.safetensors", num_heads=4)[1].loaded) == NUM_ENCODER


def tensors(**entries: Any) -> bytes:
    return json.dumps({name.replace("__", "."): entry for name, entry in entries.items()}).encode()


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "length beyond the file": (1 << 40, b"{}", 0),
    "length beyond 64 bits of sense": ((1 << 64) - 1, b"{}", 0),
    "length zero": (0, b"", 16),
    "no JSON": (None, b"{{{{{{{{", 16),
    "no UTF-8": (None, b'{"\xff\xfe": 3}', 16),
    "no object": (None, b"[1, 2, 3]", 16),
    "deep": (None, b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 16),
    "offsets beyond the file": (None, tensors(cls_token=entry([1, 1, 48], [0, 192])), 100),
    "offsets reversed": (None, tensors(cls_token=entry([4], [16, 0])), 16),
    "offsets negative": (None, tensors(cls_token=entry([4], [-16, 0])), 16),
    "overlap": (None, tensors(a=entry([4], [0, 16]), b=entry([4], [8, 24])), 24),
    "hole": (None, tensors(a=entry([4], [0, 16]), b=entry([4], [32, 48])), 48),
    "tail": (None, tensors(a=entry([4], [0, 16])), 400),
    "shape larger than the data": (None, tensors(a=entry([400], [0, 16])), 16),
    "shape overflows": (None, tensors(a=entry([2**40, 2**40], [0, 16])), 16),
    "shape negative": (None, tensors(a=entry([-4], [0, 16])), 16),
    "unknown type": (None, tensors(a=entry([4], [0, 16], "F\n33")), 16),
    "huge and empty": (
        None,
        tensors(
            patch_embed__proj__weight=entry([2**40, 2**40, 0, 0], [0, 0]),
            pos_embed=entry([1, 2**60, 0], [0, 0]),
            blocks__0__mlp__fc1__weight=entry([2**60, 0], [0, 0]),
        ),
        0,
    ),
}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_header_is_refused(tmp_path: Path, name: str, folder: bool) -> None:
    length, header, num_bytes = HEADERS[name]
    path = tmp_path / ("backbone" if folder else "weights.safetensors")
    if folder:
        path.mkdir()
    data = struct.pack("<Q", len(header) if length is None else length) + header + bytes(num_bytes)
    (path / "model.safetensors" if folder else path).write_bytes(data)
    assert_refused(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_loaded_or_refused_but_never_a_fault(tmp_path: Path, kind: str) -> None:
    state = noisy(config=SMALL.model_copy(update={"embed_dim": 8, "depth": 1, "img_size": (16, 16)})).state_dict()
    buffer = io.BytesIO()
    torch.save(mae_file(state), buffer, _use_new_zipfile_serialization=kind == "zip")
    whole = save(state) if kind == "safetensors" else buffer.getvalue()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    rng, outcomes = random.Random(0), {"loaded": 0, "refused": 0}
    structure = min(len(whole), 4000)  # most of what is not numbers stands at the start
    for _ in range(100):
        data = bytearray(whole)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice([0, 1, 1, 4])):
            data[rng.randrange(min(structure, len(data)) or 1)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            load_backbone(path, num_heads=4)
            outcomes["loaded"] += 1
        except RcmaeError as error:
            assert str(error).isprintable() and str(error).startswith(f"{path}: ")
            outcomes["refused"] += 1
    assert outcomes["loaded"] > 5 and outcomes["refused"] > 30, outcomes


def test_a_loaded_file_is_not_held_open(tmp_path: Path) -> None:
    model, path = noisy(), tmp_path / "mae.safetensors"
    save_file(model.state_dict(), path)
    vit, _ = load_backbone(path, num_heads=4)
    path.write_bytes(bytes(path.stat().st_size))  # in place: mapped weights would change
    assert_features(vit, model.tokens)
