"""Texts with fewer tokens than there are ranks, beside a picture."""

from __future__ import annotations

import torch
from diffusers import QwenImageTransformer2DModel

from vaepp_sdk.dit.chain import Chain
from vaepp_sdk.dit.sequence import SequenceSplit
from vaepp_sdk.registry import default_registry


def beside_short_texts(split: SequenceSplit) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a transformer makes of a picture beside texts, whole and split.

    Most texts have fewer tokens than there are ranks. One item of the batch sees nothing of the text, and the
    other only its first token, so that all text tokens of later ranks are masked from both.
    """
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    plan = default_registry().pipelines["QwenImagePipeline"].dit
    assert plan is not None
    assert plan.sequence is not None
    blocks = model.transformer_blocks
    made = []
    for length in (1, 3, 4):
        seen = torch.ones(2, length)
        seen[0], seen[1, 1:] = 0, 0
        call = {
            "hidden_states": torch.randn(2, 15, 8),
            "encoder_hidden_states": torch.randn(2, length, 8),
            "encoder_hidden_states_mask": seen,
            "timestep": torch.tensor([0.3, 0.7]),
            "img_shapes": [[(1, 3, 5)]] * 2,
        }
        with torch.no_grad():
            model.transformer_blocks = blocks
            whole = model(**call).sample
            model.transformer_blocks = Chain(blocks, plan.sequence.chains[0], split, None)
            made.append((whole, model(**call).sample))
    return made
