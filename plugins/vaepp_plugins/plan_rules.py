"""What plans of several families share: rules that read `config.json` or a call, and names of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "QKV",
    "TEXT_QKV",
    "four_widths",
    "guided",
    "heads",
    "layers",
    "shorter_list",
    "truly_guided",
    "width",
]

QKV = tuple(f"attn.to_{kind}" for kind in "qkv")
"""What makes queries, keys and values."""

TEXT_QKV = tuple(f"attn.add_{kind}_proj" for kind in "qkv")
"""The same for the text, where it is a sequence of its own."""


def heads(config: Mapping[str, Any]) -> int:
    """The number of attention heads."""
    return int(config["num_attention_heads"])


def width(config: Mapping[str, Any]) -> int:
    """The width of all heads."""
    return heads(config) * int(config["attention_head_dim"])


def four_widths(config: Mapping[str, Any]) -> int:
    """The usual width of feed-forward layers."""
    return 4 * width(config)


def layers(config: Mapping[str, Any]) -> int:
    """The number of blocks, of models with one list of them."""
    return int(config["num_layers"])


def shorter_list(config: Mapping[str, Any]) -> int:
    """The number of blocks in the shorter list, of models with one list of two streams and one of one."""
    return min(layers(config), int(config["num_single_layers"]))


def guided(call: Mapping[str, Any], default: float, key: str = "guidance_scale") -> bool:
    """Whether a call's scale is above 1.

    Args:
        call: the pipeline's keyword arguments.
        default: the pipeline's own scale.
        key: the argument.
    """
    scale = call.get(key)
    return bool((default if scale is None else scale) > 1)


def truly_guided(call: Mapping[str, Any], default: float) -> bool:
    """Whether a call has a negative prompt, and a true scale above 1 to lead away from it."""
    return call.get("negative_prompt") is not None and guided(call, default, "true_cfg_scale")
