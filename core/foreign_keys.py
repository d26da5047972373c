"""Other people's checkpoints in this suite's (timm's) parameter names: MAE, RC-MAE, timm, Hugging Face ViT-MAE."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError, shown

State = dict[str, Tensor]

_HF_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
}


def flat_state(content: Any, branch: str) -> tuple[State, str]:
    """The weights of one branch in what a checkpoint file holds, and the name of the layout.

    Args:
        content: what was unpickled or read: a plain state dict, or a dict that holds some (spec section 6).
        branch: "teacher" or "student", for RC-MAE's files; others have one model.
    Raises: CheckpointError if there are no weights in it.
    """
    if isinstance(content, Mapping):
        if isinstance(content.get("teacher"), Mapping) and isinstance(content.get("student"), Mapping):
            return _without_prefix(content[branch]), f"RC-MAE pretraining ({branch})"
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                return _without_prefix(content[key]), f"MAE ('{key}')"
        if content and all(isinstance(k, str) and isinstance(value, Tensor) for k, value in content.items()):
            return renamed(dict(content))
        keys = shown(", ".join(map(str, list(content)[:6])))
        raise CheckpointError(
            f"no weights found among its keys ({keys}); expected 'model', 'teacher' and 'student', or tensors"
        )
    raise CheckpointError(f"holds a {type(content).__name__}, expected a dictionary of weights")


def renamed(state: State) -> tuple[State, str]:
    """A plain state dict in timm's names, and the name of its layout."""
    if any(key.startswith(("vit.embeddings.", "embeddings.cls_token")) for key in state):
        return _from_hugging_face(state), "Hugging Face ViT-MAE"
    return _without_prefix(state), "timm"


def _without_prefix(state: Mapping[str, Any]) -> State:
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{shown(str(key))}: not a named tensor, as everything in a state dict should be")
    if any(key.startswith("module.") for key in state):  # a DDP wrapper's names
        return {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}
    return dict(state)


def _from_hugging_face(state: State) -> State:
    out: State = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name = key.removeprefix("vit.")
        name = re.sub(r"^encoder\.layer\.(\d+)\.", r"blocks.\1.", name)
        query = re.fullmatch(r"(blocks\.\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", name)
        if query:
            attention.setdefault(f"{query[1]}.attn.qkv.{query[3]}", {})[query[2]] = value
            continue
        stem, dot, leaf = name.rpartition(".")
        prefix = re.match(r"blocks\.\d+\.", name)
        start = prefix[0] if prefix else ""
        whole = _HF_NAMES.get(name)
        part = _HF_NAMES.get(stem.removeprefix(start))
        out[whole or (f"{start}{part}{dot}{leaf}" if part else name)] = value
    for name, parts in attention.items():
        if set(parts) == {"query", "key", "value"}:
            try:
                out[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
            except RuntimeError:
                shapes = ", ".join(f"{part} {list(parts[part].shape)}" for part in sorted(parts))
                raise CheckpointError(f"{name}: shapes that do not go together: {shapes}") from None
    return out
