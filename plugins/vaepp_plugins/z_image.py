"""The Z-Image family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vaepp_plugins.sizes import PACKED
from vaepp_sdk import (
    BatchPlan,
    ChainPlan,
    DiTPlan,
    PipelineEntry,
    PipelinePlan,
    SequencePlan,
    TensorPlan,
    hookimpl,
)

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


def is_guided(call: Mapping[str, Any]) -> bool:
    """Guidance is on for a scale above 0; the pipeline's default is 5."""
    scale = call.get("guidance_scale")
    return scale is None or scale > 0


def _layers(config: Mapping[str, Any]) -> int:
    return int(config["n_layers"])


def _chain(blocks: str) -> ChainPlan:
    """The blocks of every list take the same arguments; those of the text's refiner take fewer."""
    return ChainPlan(
        blocks=blocks,
        carried=("x",),
        batched=("x", "attn_mask", "freqs_cis", "adaln_input"),
        sequence={"x": 1, "freqs_cis": 1},
    )


_LAYERS = _chain("layers")
_SEQUENCE = SequencePlan(chains=(_chain("noise_refiner"), _chain("context_refiner"), _LAYERS), heads=_heads)


@hookimpl
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Register the Z-Image pipeline."""
    register(
        PipelineEntry(
            name="ZImagePipeline",
            module="diffusers.pipelines.z_image.pipeline_z_image",
            vae="AutoencoderKL",
            strategies=("tile", "patch", "shard"),
            stages="vaepp_plugins.z_image_stages:ZImageStages",
            text_encoders=("text_encoder",),
            dit=DiTPlan(
                component="transformer",
                tensor=_TENSOR,
                batch=BatchPlan(arguments=("x", "t", "cap_feats"), guided=is_guided),
                sequence=_SEQUENCE,
                pipeline=PipelinePlan(chain=_LAYERS, layers=_layers),
                data=True,
            ),
            sizes=PACKED,
        )
    )
