"""The FLUX.2 family: FLUX.2 [dev], and FLUX.2 [klein] in its base and step-distilled forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vaepp_plugins.plan_rules import QKV, TEXT_QKV, guided, heads, shorter_list, width
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


def _feed_forward(config: Mapping[str, Any]) -> int:
    return int(width(config) * config["mlp_ratio"])


def _gated(config: Mapping[str, Any]) -> tuple[int, ...]:
    """What a feed-forward layer makes: gates and values, side by side."""
    return (_feed_forward(config),) * 2


def _fused(config: Mapping[str, Any]) -> tuple[int, ...]:
    """What the first layer of a single-stream block makes: queries, keys, values, gates and values."""
    return (width(config),) * 3 + _gated(config)


def _attention_and_feed_forward(config: Mapping[str, Any]) -> tuple[int, ...]:
    """What the last layer of a single-stream block gets: the outputs of both, side by side."""
    return width(config), _feed_forward(config)


KLEIN_CALLS = CallsPlan(
    latents="hidden_states", paired=lambda call: guided(call, 4.0), unguided="is_distilled"
)
"""FLUX.2 [klein] has guidance in its base form only."""

_TENSOR = TensorPlan(
    blocks=("transformer_blocks",),
    colwise=(
        *QKV,
        *TEXT_QKV,
        "ff.linear_in",
        "ff_context.linear_in",
    ),
    rowwise=("attn.to_out.0", "attn.to_add_out", "ff.linear_out", "ff_context.linear_out"),
    head_attributes=("attn.heads",),
    widths={"attention heads": heads, "feed-forward width": _feed_forward},
    packed={"ff.linear_in": _gated, "ff_context.linear_in": _gated},
    further=(
        TensorPlan(
            blocks=("single_transformer_blocks",),
            colwise=("attn.to_qkv_mlp_proj",),
            rowwise=("attn.to_out",),
            # The fused outputs are taken apart by these widths.
            head_attributes=("attn.heads", "attn.inner_dim", "attn.mlp_hidden_dim"),
            packed={"attn.to_qkv_mlp_proj": _fused, "attn.to_out": _attention_and_feed_forward},
        ),
    ),
)

_DOUBLE = ChainPlan(
    blocks="transformer_blocks",
    carried=("encoder_hidden_states", "hidden_states"),
    batched=("hidden_states", "encoder_hidden_states", "temb_mod_img", "temb_mod_txt"),
    sequence={"encoder_hidden_states": 1, "hidden_states": 1},
    joined={"image_rotary_emb": 0},
)

_SINGLE = ChainPlan(
    blocks="single_transformer_blocks",
    carried=("hidden_states",),  # text and picture, one after the other
    batched=("hidden_states", "temb_mod"),
    sequence={"hidden_states": 1, "image_rotary_emb": 0},
)


def _dit(calls: CallsPlan | None) -> DiTPlan:
    """All pipelines of the family have the same transformer; they differ in guidance."""
    return DiTPlan(
        component="transformer",
        tensor=_TENSOR,
        calls=calls,
        sequence=SequencePlan(chains=(_DOUBLE, _SINGLE), heads=heads),
        pipeline=PipelinePlan(chain=_DOUBLE, layers=shorter_list, further=(_SINGLE,)),
        data=True,
    )


def _entry(name: str, module: str, stages: str, dit: DiTPlan) -> PipelineEntry:
    return PipelineEntry(
        name=name,
        module=f"diffusers.pipelines.flux2.{module}",
        vae="AutoencoderKLFlux2",
        strategies=("tile", "patch", "shard"),
        stages=f"vaepp_plugins.flux2_stages:{stages}",
        text_encoders=("text_encoder",),
        dit=dit,
        sizes=PACKED,
    )


@hookimpl
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Register the FLUX.2 pipelines."""
    register(_entry("Flux2Pipeline", "pipeline_flux2", "Flux2Stages", _dit(calls=None)))
    register(_entry("Flux2KleinPipeline", "pipeline_flux2_klein", "Flux2KleinStages", _dit(KLEIN_CALLS)))
