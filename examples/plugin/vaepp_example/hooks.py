"""What the plugin adds. This module is imported before any rank starts, so it imports nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk import DiTPlan, Option, PipelineEntry, SizeRule, StrategyEntry, TensorPlan, hookimpl
from vaepp_sdk.events import StageEnd

VAEPP_API = 1


@hookimpl
def vaepp_register_strategies(register: Callable[[StrategyEntry], None]) -> None:
    """Add the strategy `whole`."""
    register(
        StrategyEntry(
            name="whole",
            factory="vaepp_example.whole:WholeStrategy",
            promise="bit-identical to the untiled decode or encode on one rank",
            options=(Option(name="owner", kind="integer", default=0, minimum=0, help="the rank that works"),),
            validated_for=("AutoencoderKL", "ZImagePipeline"),
        )
    )


def _heads(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"])


def _side(config: Callable[[str], Mapping[str, Any]]) -> int:
    """Each level of the VAE but the last halves the sides, and the pipeline wants an even number then."""
    side: int = 2 * 2 ** (len(config("vae")["block_out_channels"]) - 1)
    return side


@hookimpl
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Add AuraFlow, whose two-stream blocks are split over the ranks; its single-stream blocks stay whole."""
    tensor = TensorPlan(
        blocks=("joint_transformer_blocks",),
        colwise=(
            *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
            *(f"{name}.linear_{index}" for name in ("ff", "ff_context") for index in (1, 2)),
        ),
        rowwise=("attn.to_out.0", "attn.to_add_out", "ff.out_projection", "ff_context.out_projection"),
        head_attributes=("attn.heads",),
        widths={"attention heads": _heads},
    )
    register(
        PipelineEntry(
            name="AuraFlowPipeline",
            module="diffusers.pipelines.aura_flow.pipeline_aura_flow",
            vae="AutoencoderKL",
            strategies=("tile", "whole"),
            stages="vaepp_example.aura_flow:AuraFlowStages",
            pick=lambda facts, work: "tile" if facts.tiling_fires(work.direction, work.shape) else "whole",
            dit=DiTPlan(component="transformer", tensor=tensor),
            sizes=tuple(SizeRule(argument=name, step=_side) for name in ("height", "width")),
        )
    )


@hookimpl
def vaepp_on_stage_end(event: StageEnd) -> None:
    """Append each stage of each rank, as a line of JSON, to the file that VAEPP_EXAMPLE_LOG names."""
    place = os.environ.get("VAEPP_EXAMPLE_LOG")
    if place:
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(json.dumps(attrs.asdict(event)) + "\n")
