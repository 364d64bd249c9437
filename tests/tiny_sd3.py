"""A small random Stable Diffusion 3 checkpoint: `python tests/tiny_sd3.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_text import WIDTH, clip_config, clip_tokenizer, picture_vae, t5_encoder, t5_tokenizer
from transformers import CLIPTextModelWithProjection


def build(folder: Path) -> None:
    """Its first block has a second attention, as those of 3.5 Medium, and its last one returns no text."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=picture_vae(4),
        text_encoder=CLIPTextModelWithProjection(clip_config(len(clip))).eval(),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(len(clip))).eval(),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(len(t5), width=2 * WIDTH),
        tokenizer_3=t5,
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ).eval(),
    )
    pipe.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
