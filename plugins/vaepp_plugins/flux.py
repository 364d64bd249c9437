"""The FLUX.1 family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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

_RATIO = 4
"""How much wider the feed-forward layers are than the model."""


def _heads(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"])


def _width(config: Mapping[str, Any]) -> int:
    return _heads(config) * int(config["attention_head_dim"])


def _feed_forward(config: Mapping[str, Any]) -> int:
    return _RATIO * _width(config)


def _layers(config: Mapping[str, Any]) -> int:
    return min(int(config["num_layers"]), int(config["num_single_layers"]))


def _attention_and_feed_forward(config: Mapping[str, Any]) -> tuple[int, ...]:
    """What the last layer of a single-stream block gets: the outputs of both, side by side."""
    return _width(config), _feed_forward(config)


def _paired(call: Mapping[str, Any]) -> bool:
    """True guidance is on for a scale above 1, the default, and a negative prompt."""
    return call.get("negative_prompt") is not None and call.get("true_cfg_scale", 1.0) > 1


_QKV = tuple(f"attn.to_{kind}" for kind in "qkv")

_TENSOR = TensorPlan(
    blocks=("transformer_blocks",),
    colwise=(
        *_QKV,
        *(f"attn.add_{kind}_proj" for kind in "qkv"),
        "ff.net.0.proj",
        "ff_context.net.0.proj",
    ),
    rowwise=("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"),
    head_attributes=("attn.heads",),
    widths={"attention heads": _heads, "feed-forward width": _feed_forward},
    further=(
        TensorPlan(
            blocks=("single_transformer_blocks",),
            colwise=(*_QKV, "proj_mlp"),
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
                calls=CallsPlan(latents="hidden_states", paired=_paired),
                sequence=SequencePlan(chains=(_DOUBLE, _SINGLE), heads=_heads),
                pipeline=PipelinePlan(chain=_DOUBLE, layers=_layers, further=(_SINGLE,)),
                data=True,
            ),
        )
    )
