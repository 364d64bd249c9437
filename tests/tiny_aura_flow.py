"""A small random AuraFlow checkpoint: `python tests/tiny_aura_flow.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tiny_text import WIDTH, picture_vae, t5_encoder, t5_tokenizer


def build(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    pipe = AuraFlowPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=picture_vae(4, shift=None),
        text_encoder=t5_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=AuraFlowTransformer2DModel(
            num_mmdit_layers=2,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
        ).eval(),
    )
    pipe.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
