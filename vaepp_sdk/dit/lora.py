"""Fuses LoRA adapters into a transformer's weights; of a cut weight only the rank's own slice changes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open

from vaepp_sdk.dit.tensor import Shard
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.spec.adapters import Adapter
from vaepp_sdk.text import shown

__all__ = ["fuse_adapters"]

_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight")
_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight")
_PREFIXES = ("diffusion_model.",)
"""What other programs write before the names of a transformer's layers; diffusers writes the component."""


@attrs.frozen(eq=False)
class _Pair:
    """The two factors of one layer's change, and their strength."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def fuse_adapters(
    weights: Mapping[str, torch.Tensor],
    component: str,
    adapters: Sequence[Adapter],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    shards: Mapping[str, Shard],
) -> None:
    """Add adapters to weights, in place and in order.

    Args:
        weights: the weights that this rank holds, by name.
        component: the transformer's name in the pipeline, with which an adapter's names begin.
        adapters: what is added.
        shapes: of all weights of the transformer, whole.
        shards: the parts that this rank holds of weights that are cut.

    Raises:
        UnsupportedError: an adapter has names or shapes that do not fit; names them, alike on all ranks.
    """
    for adapter in adapters:
        for layer, pair in _pairs(adapter, component).items():
            name = f"{layer}.weight"
            if name not in shapes:
                raise _refused(adapter, f"the {component} has no layer {layer}")
            made = (pair.up.shape[0], pair.down.shape[1])
            if made != shapes[name]:
                raise _refused(adapter, f"{name} has the shape {shapes[name]}, and its change {made}")
            if name in weights:
                _add(weights[name], pair, adapter.weight, shards.get(name))


def _add(weight: torch.Tensor, pair: _Pair, strength: float, shard: Shard | None) -> None:
    """Add a change, or this rank's part of it, in float32."""
    up = pair.up if shard is None or shard.dim == 1 else shard.read(pair.up)
    down = pair.down if shard is None or shard.dim == 0 else shard.read(pair.down)
    up, down = (part.to(weight.device, torch.float32) for part in (up, down))
    weight.copy_(weight.float() + (pair.scale * strength) * (up @ down))


def _pairs(adapter: Adapter, component: str) -> Mapping[str, _Pair]:
    """The changes in a file, by the name of the layer."""
    try:
        tensors, metadata = _read(adapter.path)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise _refused(adapter, f"it cannot be read ({type(error).__name__})") from error
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        part, suffix = _part(key)
        if not part:
            raise _refused(adapter, f"{key} is no factor of a LoRA adapter")
        layer = key.removesuffix(suffix)
        for prefix in (f"{component}.", *_PREFIXES):
            layer = layer.removeprefix(prefix)
        factors.setdefault(layer, {})[part] = tensor
    alpha = _alpha(adapter, metadata, component)
    return {layer: _pair(adapter, layer, found, alpha) for layer, found in factors.items()}


def _read(path: str) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """A file's tensors, and what peft says of them."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if not isinstance(metadata, dict):
            raise TypeError("its metadata is no table")
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 - no mapping


def _alpha(adapter: Adapter, metadata: Mapping[str, Any], component: str) -> float | None:
    """The strength of all layers, where the file's metadata gives one."""
    for key in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora"):
        if metadata.get(f"{component}.{key}"):
            raise _refused(adapter, f"its metadata asks for {key}, which is not supported")
    alpha = metadata.get(f"{component}.lora_alpha")
    if alpha is not None and not isinstance(alpha, int | float):
        raise _refused(adapter, f"its metadata gives the strength {shown(alpha)}, which is no number")
    return alpha


def _part(key: str) -> tuple[str, str]:
    """Which part of a change a key holds, and how it ends."""
    ends = {"down": _DOWN, "up": _UP, "alpha": (".alpha",)}
    found = ((part, suffix) for part, suffixes in ends.items() for suffix in suffixes if key.endswith(suffix))
    return next(found, ("", ""))


def _pair(adapter: Adapter, layer: str, found: Mapping[str, torch.Tensor], alpha: float | None) -> _Pair:
    lacking = [part for part in ("down", "up") if part not in found]
    if lacking:
        raise _refused(adapter, f"{layer} has no {lacking[0]} projection")
    down, up = found["down"], found["up"]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or not down.numel():
        raise _refused(adapter, f"{layer} has factors of shapes {tuple(down.shape)} and {tuple(up.shape)}")
    if "alpha" in found and found["alpha"].numel() != 1:
        raise _refused(adapter, f"{layer} has an alpha of shape {tuple(found['alpha'].shape)}")
    rank = down.shape[0]
    # The strength stands beside the factors, or in the file's metadata as peft writes it; else it is 1.
    strength = found["alpha"].item() if "alpha" in found else rank if alpha is None else alpha
    return _Pair(down, up, strength / rank)


def _refused(adapter: Adapter, problem: str) -> UnsupportedError:
    return UnsupportedError(f"the LoRA adapter {adapter.path} cannot be used: {problem}")
