"""The FLUX.1 family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vaepp_plugins.plan_rules import QKV, TEXT_QKV, four_widths, heads, shorter_list, truly_guided, width
from vaepp_plugins.sizes import PACKED
from vaepp_sdk import (
    CallsPlan,
    ChainPlan,
    DiTPlan,
    PipelineEntry,
    PipelinePlan,
    SequencePlan,
    TensorPlan,
    hookimpl,
)

VAEPP_API = 1


def _attention_and_feed_forward(config: Mapping[str, Any]) -> tuple[int, ...]:
    """What the last layer of a single-stream block gets: the outputs of both, side by side."""
    return width(config), four_widths(config)


CALLS = CallsPlan(latents="hidden_states", paired=lambda call: truly_guided(call, 1.0))
"""A scale alone, which is an input of the model, needs no second call."""


_TENSOR = TensorPlan(
    blocks=("transformer_blocks",),
    colwise=(
        *QKV,
        *TEXT_QKV,
        "ff.net.0.proj",
        "ff_context.net.0.proj",
    ),
    rowwise=("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"),
    head_attributes=("attn.heads",),
    widths={"attention heads": heads, "feed-forward width": four_widths},
    further=(
        TensorPlan(
            blocks=("single_transformer_blocks",),
            colwise=(*QKV, "proj_mlp"),
            rowwise=("proj_out",),
            head_attributes=("attn.heads",),
            packed={"proj_out": _attention_and_feed_forward},
        ),
    ),
)


def _chain(blocks: str) -> ChainPlan:
    """The blocks of both lists take and return the same."""
    return ChainPlan(
        blocks=blocks,
        carried=("encoder_hidden_states", "hidden_states"),
        batched=("hidden_states", "encoder_hidden_states", "temb"),
        sequence={"encoder_hidden_states": 1, "hidden_states": 1},
        joins=(("encoder_hidden_states", "hidden_states"),),
        joined={"image_rotary_emb": 0},
    )


_DOUBLE, _SINGLE = _chain("transformer_blocks"), _chain("single_transformer_blocks")


@hookimpl
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Register the FLUX.1 pipeline."""
    register(
        PipelineEntry(
            name="FluxPipeline",
            module="diffusers.pipelines.flux.pipeline_flux",
            vae="AutoencoderKL",
            strategies=("tile", "patch", "shard"),
            stages="vaepp_plugins.flux_stages:FluxStages",
            text_encoders=("text_encoder", "text_encoder_2"),
            dit=DiTPlan(
                component="transformer",
                tensor=_TENSOR,
                calls=CALLS,
                sequence=SequencePlan(chains=(_DOUBLE, _SINGLE), heads=heads),
                pipeline=PipelinePlan(chain=_DOUBLE, layers=shorter_list, further=(_SINGLE,)),
                data=True,
            ),
            sizes=PACKED,
        )
    )
