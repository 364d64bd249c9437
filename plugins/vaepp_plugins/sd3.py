"""The Stable Diffusion 3 family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    return int(config["num_attention_heads"])


def _feed_forward(config: Mapping[str, Any]) -> int:
    return 4 * _heads(config) * int(config["attention_head_dim"])


def _layers(config: Mapping[str, Any]) -> int:
    return int(config["num_layers"])


_SECOND = tuple(f"attn2.to_{kind}" for kind in "qkv")

_TENSOR = TensorPlan(
    blocks=("transformer_blocks",),
    colwise=(
        *(f"attn.to_{kind}" for kind in "qkv"),
        *(f"attn.add_{kind}_proj" for kind in "qkv"),
        *_SECOND,
        "ff.net.0.proj",
        "ff_context.net.0.proj",
    ),
    rowwise=("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2", "ff_context.net.2"),
    head_attributes=("attn.heads", "attn2.heads"),
    widths={"attention heads": _heads, "feed-forward width": _feed_forward},
    # Some blocks attend to the picture a second time; the last one makes nothing of the text.
    optional=(
        *_SECOND,
        "attn2.to_out.0",
        "attn2.heads",
        "attn.to_add_out",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
)

_BLOCKS = ChainPlan(
    blocks="transformer_blocks",
    carried=("encoder_hidden_states", "hidden_states"),
    batched=("hidden_states", "encoder_hidden_states", "temb"),
    sequence={"hidden_states": 1, "encoder_hidden_states": 1},
    joins=(("hidden_states", "encoder_hidden_states"), ("hidden_states",)),
    dropped=("encoder_hidden_states",),
)


@hookimpl
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Register the Stable Diffusion 3 pipeline."""
    register(
        PipelineEntry(
            name="StableDiffusion3Pipeline",
            module="diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
            vae="AutoencoderKL",
            strategies=("tile", "patch", "shard"),
            stages="vaepp_plugins.sd3_stages:StableDiffusion3Stages",
            text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
            dit=DiTPlan(
                component="transformer",
                tensor=_TENSOR,
                batch=BatchPlan(
                    arguments=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
                ),
                sequence=SequencePlan(chains=(_BLOCKS,), heads=_heads),
                pipeline=PipelinePlan(chain=_BLOCKS, layers=_layers),
                data=True,
                # It counts blocks, and a list that is spread is called as one.
                excludes={"skip_guidance_layers": ("pipeline", "ring", "ulysses")},
            ),
        )
    )
