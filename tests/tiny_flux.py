"""A small random FLUX.1 checkpoint: `python tests/tiny_flux.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_text import WIDTH, clip_config, clip_tokenizer, picture_vae, t5_encoder, t5_tokenizer
from transformers import CLIPTextModel


def build(folder: Path) -> None:
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=picture_vae(4),
        text_encoder=CLIPTextModel(clip_config(len(clip))).eval(),
        tokenizer=clip,
        text_encoder_2=t5_encoder(len(t5)),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=5,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )
    pipe.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
