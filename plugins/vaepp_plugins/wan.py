"""The Wan family, text to video: Wan 2.1, and Wan 2.2 with its two transformers or its time per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from vaepp_plugins.plan_rules import guided, heads, layers
from vaepp_plugins.sizes import Configs, sides
from vaepp_sdk import (
    CallsPlan,
    ChainPlan,
    DiTPlan,
    PipelineEntry,
    PipelinePlan,
    SequencePlan,
    SizeRule,
    TensorPlan,
    hookimpl,
)

VAEPP_API = 1


def _feed_forward(config: Mapping[str, Any]) -> int:
    return int(config["ffn_dim"])


CALLS = CallsPlan(latents="hidden_states", paired=lambda call: guided(call, 5.0))

_TENSOR = TensorPlan(
    blocks=("blocks",),
    colwise=(
        *(f"attn{one}.to_{kind}" for one in (1, 2) for kind in "qkv"),
        "ffn.net.0.proj",
    ),
    rowwise=("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"),
    # Queries and keys are normalised over all heads at once.
    norms=tuple(f"attn{one}.norm_{kind}" for one in (1, 2) for kind in "qk"),
    head_attributes=("attn1.heads", "attn2.heads"),
    widths={"attention heads": heads, "feed-forward width": _feed_forward},
)

_BLOCKS = ChainPlan(
    blocks="blocks",
    carried=("hidden_states",),
    batched=("hidden_states", "encoder_hidden_states", "temb"),
    # Time is given for every token where the pipeline expands its timesteps, and for every clip elsewhere.
    sequence={"hidden_states": 1, "rotary_emb": 1, "temb": (1, 4)},
    local=("attn2",),
)


def _side(config: Configs, axis: int) -> int:
    """The pipeline refuses sides that are no multiples of 16, and cuts those that its patches do not fill."""
    patch = config("transformer")["patch_size"][axis]
    return math.lcm(16, int(config("vae").get("scale_factor_spatial", 8)) * int(patch))


def _height(config: Configs) -> int:
    return _side(config, 1)


def _width(config: Configs) -> int:
    return _side(config, 2)


def _frames(config: Configs) -> int:
    """The first frame is one by itself, the others are compressed in groups."""
    return int(config("vae").get("scale_factor_temporal", 4))


@hookimpl
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Register the Wan pipeline."""
    register(
        PipelineEntry(
            name="WanPipeline",
            module="diffusers.pipelines.wan.pipeline_wan",
            vae="AutoencoderKLWan",
            strategies=("tile", "shard"),
            stages="vaepp_plugins.wan_stages:WanStages",
            dit=DiTPlan(
                component="transformer",
                others=("transformer_2",),
                tensor=_TENSOR,
                calls=CALLS,
                sequence=SequencePlan(chains=(_BLOCKS,), heads=heads),
                pipeline=PipelinePlan(chain=_BLOCKS, layers=layers),
                data=True,
            ),
            text_encoders=("text_encoder",),
            fps=16,
            sizes=(*sides(_height, _width), SizeRule(argument="num_frames", step=_frames, first=1)),
        )
    )
