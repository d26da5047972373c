"""The backbone directory, the only contract between pretraining and everything after it; and loading foreign weights.

    NAME/model.safetensors    encoder only, timm's parameter names
    NAME/config.json          timm's hub layout, plus "rcmae": sizes and where the weights come from

`timm.create_model("local-dir:NAME", pretrained=True)` loads it. Whatever a load does is reported line by line, and what
it cannot explain it refuses.
"""

import argparse
import hashlib
import json
import math
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
from torch import Tensor, nn

from core.errors import CheckpointError, NumericError, RcmaeError, shown
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
# (depth, heads) by width: the only sizes whose heads need not be told, and in which a missing last block can be seen
PUBLISHED = {dim: (depth, heads) for _, dim, depth, heads in TIMM_NAMES}

# What a checkpoint may hold that is no part of a backbone: decoders and heads, as MAE, timm and Hugging Face name them.
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
                out.append(f"{title:8} {len(names)}: {', '.join(map(shown, names[:6]))}{more}")
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
        num_heads: for foreign sizes that are not published ones; with it any depth is taken as meant.
    Raises: CheckpointError for anything that cannot be explained: a missing block, an unknown key, a wrong shape;
        NumericError for weights that are not finite.
    """
    if branch not in {"teacher", "student"}:
        raise CheckpointError(f"{shown(path)}: branch {shown(branch)}: expected teacher or student")
    state, layout, stored = _read(path, branch)
    name = shown(path)
    config = stored or _infer_config(state, num_heads, name)
    target = config if img_size is None else ViTConfig(**{**config.model_dump(), "img_size": img_size})
    expected = _shapes(config, len(state), name)
    ignored = tuple(key for key in state if key not in expected and _NOT_BACKBONE.fullmatch(key))
    new = tuple(key for key in ("norm.weight", "norm.bias") if key not in state and "fc_norm.weight" in state)
    missing = sorted(set(expected) - set(state) - set(new))
    unknown = sorted(set(state) - set(expected) - set(ignored))
    for kind, names in (("missing", missing), ("unknown", unknown)):
        if names:
            first = ", ".join(map(shown, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise CheckpointError(f"{name}: {len(names)} {kind} tensors: {first}; this is no plain ViT")
    _require_sound(state, expected, name)
    resized: tuple[str, ...] = ()
    if target.grid != config.grid:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"].float(), config.grid, target.grid)
        resized = (f"pos_embed {config.grid[0]}x{config.grid[1]} -> {target.grid[0]}x{target.grid[1]}",)
    loaded = tuple(key for key in expected if key in state)
    vit = ViT(target)
    vit.load_state_dict({**vit.state_dict(), **{key: state[key].float() for key in loaded}})
    return vit, LoadReport(layout, loaded, resized, new, ignored)


def stored_normalization(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that a backbone directory names; ImageNet's for anything else."""
    try:
        stored = json.loads((path / CONFIG).read_bytes())["pretrained_cfg"]
        mean, std = (tuple(float(value) for value in stored[key]) for key in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError):
        return IMAGENET_MEAN, IMAGENET_STD
    return mean, std


def weights_digest(network: nn.Module) -> str:
    """Twelve hexadecimal digits of all weights: the same network, wherever its file lies."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + b"\0" + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def fill(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load weights strictly.

    Args:
        name: of where they come from, for messages.
    Raises: CheckpointError where one is missing, unknown or of another shape; NumericError where one is not finite.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{name}: {shown(' '.join(str(error).split())[:200])}") from None
    broken = next((key for key, tensor in state.items() if not torch.isfinite(tensor.float()).all()), None)
    if broken:
        raise NumericError(f"{name}: {shown(broken)} holds non-finite values; such weights are not loaded")


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
        raise CheckpointError(f"{name}: not a safetensors file: {shown(str(error))}") from None
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to load {shown(wanted[1])}" if wanted else "it holds more than tensors and plain values"
        raise CheckpointError(
            f"{name}: refused, {reason}, and a pickle can run any code; "
            "save its state dict with safetensors where you trust it"
        ) from None
    except RcmaeError:
        raise
    except Exception as error:  # a damaged file makes the readers raise anything: EOFError, IndexError, struct.error
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name}: cannot be read as weights: {shown(reason)}") from None


def _read(path: Path, branch: str) -> tuple[State, str, ViTConfig | None]:
    folder = path.is_dir()
    if folder and not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{shown(path)}: no {WEIGHTS} in it; expected a backbone directory of `rcmae export`")
    content = read_weights(path / WEIGHTS if folder else path)
    try:
        state, layout = flat_state(content, branch)
        state = renamed(state)[0]
    except CheckpointError as error:
        raise CheckpointError(f"{shown(path)}: {error}") from None
    if not folder:
        return state, layout, None
    try:
        description = json.loads((path / CONFIG).read_bytes())
        if "rcmae" not in description:
            return state, layout, None
        return state, "rcmae backbone", ViTConfig.model_validate_json(json.dumps(description["rcmae"]["vit"]))
    except FileNotFoundError:
        return state, layout, None
    except ValidationError as error:
        raise CheckpointError(f"{shown(path / CONFIG)}: not a backbone description: {_first_fault(error)}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{shown(path / CONFIG)}: not a backbone description: {shown(str(error))}") from None


def _infer_config(state: Mapping[str, Tensor], num_heads: int | None, name: str) -> ViTConfig:
    for key, num_axes in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2)):
        if key not in state or state[key].ndim != num_axes:
            raise CheckpointError(f"{name}: no plain ViT: {key} is missing or of another shape")
    dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    num_patches = state["pos_embed"].shape[1] - 1
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    depth = 1 + max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.[0-9]{1,9}\.", key))
    side = math.isqrt(max(num_patches, 0))
    published_depth, heads = PUBLISHED.get(dim, (depth, None)) if not num_heads else (depth, num_heads)
    if heads is None:
        raise CheckpointError(f"{name}: weights of width {dim} do not tell the number of heads; give it as num_heads")
    if depth != published_depth:
        raise CheckpointError(
            f"{name}: {depth} blocks, but ViTs of width {dim} have {published_depth}: the file is not whole; "
            "for a size of your own give num_heads"
        )
    if side * side != num_patches:
        raise CheckpointError(f"{name}: pos_embed of {num_patches} patches is not square; its grid cannot be told")
    mlp_ratio = hidden / max(dim, 1)
    if int(dim * mlp_ratio) < hidden:  # the quotient was rounded down, and a block rounds down once more
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    try:
        return ViTConfig(
            img_size=(side * patch_size, side * patch_size), patch_size=patch_size, in_chans=channels, embed_dim=dim,
            depth=depth, num_heads=heads, mlp_ratio=mlp_ratio,
        )  # fmt: skip
    except ValidationError as error:
        raise CheckpointError(f"{name}: no plain ViT: {_first_fault(error)}") from None


def _shapes(config: ViTConfig, num_tensors: int, name: str) -> dict[str, torch.Size]:
    """Shape of every parameter, without memory for one: what a file says of its sizes may be anything."""
    if config.depth > num_tensors:
        raise CheckpointError(f"{name}: {num_tensors} tensors cannot make up {config.depth} blocks")
    try:
        with torch.device("meta"):
            return {key: tensor.shape for key, tensor in ViT(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError):
        raise CheckpointError(f"{name}: its sizes are too large for any model") from None


def _require_sound(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], name: str) -> None:
    for key, shape in expected.items():
        if key not in state:
            continue
        tensor = state[key]
        if tensor.shape != shape:
            raise CheckpointError(f"{name}: {key} has shape {list(tensor.shape)}, expected {list(shape)}")
        if not (tensor.is_floating_point() and _is_stored_whole(tensor)):
            raise CheckpointError(f"{name}: {key} is {tensor.dtype}, expected dense floating-point values")
        if not torch.isfinite(tensor.float()).all():
            raise NumericError(f"{name}: {key} holds non-finite values; such weights are not loaded")


def _is_stored_whole(tensor: Tensor) -> bool:
    """Not sparse, without data, or a small storage spread over a large shape: what it takes is what the file holds."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    key = ".".join(map(str, fault["loc"]))
    text = fault["msg"].removeprefix("Value error, ").splitlines()[0]
    return shown(f"{key}: {text}" if key else text)
