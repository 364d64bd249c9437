"""The Qwen-Image family."""

from __future__ import annotations

from collections.abc import Callable

from vaepp_plugins.plan_rules import QKV, TEXT_QKV, four_widths, heads, layers, truly_guided
from vaepp_plugins.sizes import Configs, sides
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


CALLS = CallsPlan(latents="hidden_states", paired=lambda call: truly_guided(call, 4.0))

_TENSOR = TensorPlan(
    blocks=("transformer_blocks",),
    colwise=(
        *QKV,
        *TEXT_QKV,
        "img_mlp.net.0.proj",
        "txt_mlp.net.0.proj",
    ),
    rowwise=("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2"),
    # The width of a head is read as the width of all heads by their number.
    head_attributes=("attn.heads", "attn.inner_dim"),
    widths={"attention heads": heads, "feed-forward width": four_widths},
)

_BLOCKS = ChainPlan(
    blocks="transformer_blocks",
    carried=("encoder_hidden_states", "hidden_states"),
    batched=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb"),
    # The positions are a pair, of the picture and of the text.
    sequence={"hidden_states": 1, "encoder_hidden_states": 1, "image_rotary_emb": 0},
    masks={"encoder_hidden_states": "encoder_hidden_states_mask"},
)


def _side(config: Configs) -> int:
    """The pipeline packs latents into 2 x 2 patches, and makes the next smaller size of any other."""
    side: int = 2 * 2 ** len(config("vae")["temperal_downsample"])
    return side


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
                calls=CALLS,
                sequence=SequencePlan(chains=(_BLOCKS,), heads=heads),
                pipeline=PipelinePlan(chain=_BLOCKS, layers=layers),
                data=True,
            ),
            text_encoders=("text_encoder",),
            sizes=sides(_side),
        )
    )
