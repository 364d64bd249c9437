"""The Stable Diffusion 3 family."""

from __future__ import annotations

from collections.abc import Callable

from vaepp_plugins.plan_rules import QKV, TEXT_QKV, four_widths, guided, heads, layers
from vaepp_plugins.sizes import Configs, kl_scale, sides
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


GUIDANCE_SCALE = 7.0
"""The default of the pipeline's `__call__`."""

_SECOND = tuple(f"attn2.to_{kind}" for kind in "qkv")

_TENSOR = TensorPlan(
    blocks=("transformer_blocks",),
    colwise=(
        *QKV,
        *TEXT_QKV,
        *_SECOND,
        "ff.net.0.proj",
        "ff_context.net.0.proj",
    ),
    rowwise=("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2", "ff_context.net.2"),
    head_attributes=("attn.heads", "attn2.heads"),
    widths={"attention heads": heads, "feed-forward width": four_widths},
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


def _side(config: Configs) -> int:
    return int(config("transformer").get("patch_size", 2)) * kl_scale(config)


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
                    arguments=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
                    guided=lambda call: guided(call, GUIDANCE_SCALE),
                ),
                sequence=SequencePlan(chains=(_BLOCKS,), heads=heads),
                pipeline=PipelinePlan(chain=_BLOCKS, layers=layers),
                data=True,
                # It counts blocks, and a list that is spread is called as one.
                excludes={"skip_guidance_layers": ("pipeline", "ring", "ulysses")},
            ),
            sizes=sides(_side),
        )
    )
