"""The Z-Image family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vaepp_sdk import DiTPlan, PipelineEntry, TensorPlan, hookimpl

VAEPP_API = 1


def _heads(config: Mapping[str, Any]) -> int:
    return int(config["n_heads"])


def _feed_forward(config: Mapping[str, Any]) -> int:
    """The width of the feed-forward layers, as the transformer itself derives it from `dim`."""
    return int(config["dim"] / 3 * 8)


_TENSOR = TensorPlan(
    blocks=("noise_refiner", "context_refiner", "layers"),
    colwise=("attention.to_q", "attention.to_k", "attention.to_v", "feed_forward.w1", "feed_forward.w3"),
    rowwise=("attention.to_out.0", "feed_forward.w2"),
    # The norms of query and key work on one head at a time, so they need no change.
    head_attributes=("attention.heads",),
    widths={"attention heads": _heads, "feed-forward width": _feed_forward},
)


@hookimpl
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Register the Z-Image pipeline."""
    register(
        PipelineEntry(
            name="ZImagePipeline",
            module="diffusers.pipelines.z_image.pipeline_z_image",
            vae="AutoencoderKL",
            strategies=("tile", "patch"),
            stages="vaepp_plugins.z_image_stages:ZImageStages",
            dit=DiTPlan(component="transformer", tensor=_TENSOR),
        )
    )
