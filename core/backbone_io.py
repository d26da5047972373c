"""The backbone directory, the only contract between pretraining and everything after it; and loading foreign weights.

    NAME/model.safetensors    encoder only, timm's parameter names
    NAME/config.json          timm's hub layout, plus "rcmae": sizes and where the weights come from

`timm.create_model("local-dir:NAME", pretrained=True)` loads it. Whatever a load does is reported line by line, and what it
cannot explain it refuses.
"""

import argparse
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from core.errors import CheckpointError, shown
from core.files import FileSystem, replace_dir
from core.foreign_keys import State, flat_state, renamed
from core.transforms import IMAGENET_MEAN, IMAGENET_STD
from core.vit import ViT, ViTConfig, resize_pos_embed

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# timm's plain ViTs at 224 px by (patch side, width, depth, heads)
TIMM_NAMES = {
    (16, 192, 12, 3): "vit_tiny_patch16_224",
    (16, 384, 12, 6): "vit_small_patch16_224",
    (16, 768, 12, 12): "vit_base_patch16_224",
    (16, 1024, 24, 16): "vit_large_patch16_224",
    (14, 1280, 32, 16): "vit_huge_patch14_224",
}
HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # the only sizes whose heads need not be told

# What a checkpoint may hold that is no part of a backbone: decoders and heads, by MAE's, timm's and Hugging Face's names.
_NOT_BACKBONE = re.compile(r"(decoder|head|fc_norm|classifier|pooler)[._].*|mask_token|decoder_pos_embed")


@dataclass(frozen=True)
class LoadReport:
    """What loading did with every parameter. Names are this suite's."""

    layout: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    new: tuple[str, ...]
    ignored: tuple[str, ...]

    def lines(self) -> list[str]:
        """One line per kind, for a log."""
        out = [f"layout   {self.layout}", f"loaded   {len(self.loaded)} tensors"]
        for title, names in (("resized", self.resized), ("new", self.new), ("ignored", self.ignored)):
            if names:
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                out.append(f"{title:8} {len(names)}: {', '.join(names[:6])}{more}")
        return out


def timm_architecture(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """timm's model name for a size, and the `model_args` that make it this size (empty for a preset at 224 px)."""
    name = TIMM_NAMES.get((config.patch_size, config.embed_dim, config.depth, config.num_heads))
    arguments: dict[str, Any] = {}
    if name is None:
        name = "vit_base_patch16_224"
        arguments = config.model_dump(include={"patch_size", "embed_dim", "depth", "num_heads"})
    if config.img_size != (224, 224):
        arguments["img_size"] = list(config.img_size)
    if config.in_chans != 3:
        arguments["in_chans"] = config.in_chans
    if config.mlp_ratio != 4.0:
        arguments["mlp_ratio"] = config.mlp_ratio
    return name, arguments


def export_backbone(
    folder: Path,
    vit: ViT,
    provenance: Mapping[str, Any],
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    fs: FileSystem | None = None,
) -> None:
    """Write the encoder of `vit` (a ViT, or a MaskedAutoencoder, whose decoder stays behind) as a backbone directory.

    Args:
        provenance: JSON values that say where the weights come from: branch, step, config hash, git commit.
        mean, std: per channel, the normalisation that the weights were trained with.
    """
    config = vit.config
    encoder = set(ViT(config.model_copy(update={"depth": 1})).state_dict())  # every name outside the blocks
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in vit.state_dict().items()
        if name in encoder or name.startswith("blocks.")
    }
    architecture, arguments = timm_architecture(config)
    description = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.embed_dim,
        "global_pool": "token",
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "input_size": [config.in_chans, *config.img_size],
            "fixed_input_size": True,
            "num_classes": 0,
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
        },
        "rcmae": {"vit": config.model_dump(mode="json"), **provenance},
    }
    files = {WEIGHTS: save(state), CONFIG: json.dumps(description, indent=1).encode()}
    replace_dir(folder, files, fs)


def load_backbone(
    path: Path, *, branch: str = "teacher", img_size: tuple[int, int] | None = None, num_heads: int | None = None
) -> tuple[ViT, LoadReport]:
    """Build a ViT with the weights of a backbone directory or a foreign checkpoint.

    Args:
        path: a backbone directory, a .safetensors file, or a .pth / .pt / .bin that unpickles with weights only.
        branch: which model of an RC-MAE pretraining file.
        img_size: (height, width) that the ViT is for; its position table is resized to it. None: as stored.
        num_heads: for foreign widths that do not tell it.
    Raises: CheckpointError for anything that cannot be explained: a missing block, an unknown key, a wrong shape.
    """
    state, layout, stored = _read(path, branch)
    name = shown(path)
    config = stored or _infer_config(state, num_heads, name)
    target = config if img_size is None else ViTConfig(**{**config.model_dump(), "img_size": img_size})
    vit = ViT(target)
    expected = vit.state_dict()
    ignored = tuple(key for key in state if key not in expected and _NOT_BACKBONE.fullmatch(key))
    new = tuple(key for key in ("norm.weight", "norm.bias") if key not in state and "fc_norm.weight" in state)
    missing = sorted(set(expected) - set(state) - set(new))
    unknown = sorted(set(state) - set(expected) - set(ignored))
    for kind, names in (("missing", missing), ("unknown", unknown)):
        if names:
            first = ", ".join(map(shown, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise CheckpointError(f"{name}: {len(names)} {kind} tensors: {first}; this is no plain ViT that can be loaded")
    resized = ()
    if target.grid != config.grid:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], config.grid, target.grid)
        resized = (f"pos_embed {config.grid[0]}x{config.grid[1]} -> {target.grid[0]}x{target.grid[1]}",)
    for key, tensor in expected.items():
        if key in state and state[key].shape != tensor.shape:
            raise CheckpointError(f"{name}: {key} has shape {list(state[key].shape)}, expected {list(tensor.shape)}")
    vit.load_state_dict({**expected, **{key: state[key].float() for key in expected if key in state}})
    loaded = tuple(key for key in expected if key in state)
    return vit, LoadReport(layout, loaded, resized, new, ignored)


def read_weights(path: Path) -> Any:
    """The content of a weight file, safetensors or unpickled with weights only. Raises: CheckpointError."""
    name = shown(path)
    try:
        if path.suffix == ".safetensors":
            return load(path.read_bytes())
        if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
            raise CheckpointError(f"{name}: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set and would run code; unset it")
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's files keep their arguments in one
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{name}: not a safetensors file: {error}") from None
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to load {wanted[1]}" if wanted else "it holds more than tensors and plain values"
        raise CheckpointError(
            f"{name}: refused, {reason}, and a pickle can run any code; save its state dict with safetensors where you trust it"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{name}: cannot be read as weights: {shown(reason)}") from None


def _read(path: Path, branch: str) -> tuple[State, str, ViTConfig | None]:
    if not path.is_dir():
        state, layout = flat_state(read_weights(path), branch)
        return renamed(state)[0], layout, None
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{shown(path)}: no {WEIGHTS} in it; expected a backbone directory, as `rcmae export` writes")
    state, layout = renamed(read_weights(path / WEIGHTS))
    try:
        description = json.loads((path / CONFIG).read_bytes())
        if "rcmae" not in description:
            return state, layout, None
        return state, "rcmae backbone", ViTConfig.model_validate_json(json.dumps(description["rcmae"]["vit"]))
    except FileNotFoundError:
        return state, layout, None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{shown(path / CONFIG)}: not a backbone description: {str(error).splitlines()[0]}") from None


def _infer_config(state: Mapping[str, Tensor], num_heads: int | None, name: str) -> ViTConfig:
    try:
        dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        num_patches = state["pos_embed"].shape[1] - 1
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{name}: no plain ViT: {error} is missing or of another shape") from None
    depth = 1 + max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key))
    side = round(num_patches**0.5)
    heads = num_heads or HEADS_OF_WIDTH.get(dim)
    if heads is None:
        raise CheckpointError(f"{name}: weights of width {dim} do not tell the number of heads; give it as num_heads")
    if side * side != num_patches:
        raise CheckpointError(f"{name}: pos_embed of {num_patches} patches is not square; its grid cannot be told")
    return ViTConfig(
        img_size=(side * patch_size, side * patch_size), patch_size=patch_size, in_chans=channels, embed_dim=dim,
        depth=depth, num_heads=heads, mlp_ratio=hidden / dim,
    )  # fmt: skip
