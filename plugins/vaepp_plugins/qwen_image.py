"""The Qwen-Image family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vaepp_sdk import CallsPlan, ChainPlan, DiTPlan, PipelineEntry, PipelinePlan, TensorPlan, hookimpl

VAEPP_API = 1


def _heads(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"])


def _feed_forward(config: Mapping[str, Any]) -> int:
    """The width of the feed-forward layers: four times that of all heads."""
    return 4 * _heads(config) * int(config["attention_head_dim"])


def _layers(config: Mapping[str, Any]) -> int:
    return int(config["num_layers"])


def _paired(call: Mapping[str, Any]) -> bool:
    """Guidance is on for a scale above 1, 4 by default, and a negative prompt."""
    scale = call.get("true_cfg_scale")
    return call.get("negative_prompt") is not None and (scale is None or scale > 1)


_TENSOR = TensorPlan(
    blocks=("transformer_blocks",),
    colwise=(
        *(f"attn.to_{kind}" for kind in "qkv"),
        *(f"attn.add_{kind}_proj" for kind in "qkv"),
        "img_mlp.net.0.proj",
        "txt_mlp.net.0.proj",
    ),
    rowwise=("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2"),
    # The width of a head is read as the width of all heads by their number.
    head_attributes=("attn.heads", "attn.inner_dim"),
    widths={"attention heads": _heads, "feed-forward width": _feed_forward},
)

_BLOCKS = ChainPlan(
    blocks="transformer_blocks",
    carried=("encoder_hidden_states", "hidden_states"),
    batched=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb"),
    sequence={},
)


@hookimpl
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Register the Qwen-Image pipeline."""
    register(
        PipelineEntry(
            name="QwenImagePipeline",
            module="diffusers.pipelines.qwenimage.pipeline_qwenimage",
            vae="AutoencoderKLQwenImage",
            strategies=("tile", "shard"),
            stages="vaepp_plugins.qwen_image_stages:QwenImageStages",
            dit=DiTPlan(
                component="transformer",
                tensor=_TENSOR,
                calls=CallsPlan(latents="hidden_states", paired=_paired),
                pipeline=PipelinePlan(chain=_BLOCKS, layers=_layers),
                data=True,
            ),
            text_encoders=("text_encoder",),
        )
    )
