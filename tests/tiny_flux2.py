"""Small random FLUX.2 checkpoints: `python tests/tiny_flux2.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tiny_text import WIDTH, byte_tokenizer, packed_vae
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LAYERS = [0, 1, 2]
"""The text encoder's states that a call takes; the default is for one of 40 layers."""

_CHANNELS = 4
# The system message that FLUX.2 [dev] puts before the prompt would take all of a short sequence.
_TEMPLATE = "{% set text = messages[-1].content %}{{ text if text is string else text[0].text }}"


def build(folder: Path) -> None:
    """FLUX.2 [dev]: guidance is an input of the transformer."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipe = Flux2Pipeline(
        scheduler=_scheduler(),
        vae=packed_vae(_CHANNELS),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=_transformer(guidance_embeds=True),
    )
    pipe.save_pretrained(folder, safe_serialization=True)


def build_klein(folder: Path, distilled: bool = False) -> None:
    """FLUX.2 [klein]: in its base form a step has a second call for guidance."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipe = Flux2KleinPipeline(
        scheduler=_scheduler(),
        vae=packed_vae(_CHANNELS),
        text_encoder=Qwen3ForCausalLM(_klein_config(len(tokenizer))).eval(),
        tokenizer=tokenizer,
        transformer=_transformer(guidance_embeds=False),
        is_distilled=distilled,
    )
    pipe.save_pretrained(folder, safe_serialization=True)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=4 * _CHANNELS,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=len(LAYERS) * WIDTH,
        timestep_guidance_channels=32,
        mlp_ratio=2.5,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


def _tokenizer() -> Qwen2Tokenizer:
    """Only text is given to it, so it can stand for the real one's processor, which needs torchvision."""
    tokenizer = byte_tokenizer("[IMG]")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _text_encoder(vocabulary: int) -> Mistral3ForConditionalGeneration:
    common = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "head_dim": 8}
    config = Mistral3Config(
        text_config={
            **common,
            "model_type": "mistral",
            "vocab_size": vocabulary,
            "num_hidden_layers": max(LAYERS),
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            **common,
            "model_type": "pixtral",
            "num_hidden_layers": 1,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_index=1,
    )
    return Mistral3ForConditionalGeneration(config).eval()


def _klein_config(vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=max(LAYERS),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=None,
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]))
