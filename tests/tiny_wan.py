"""A small random Wan checkpoint: `python tests/tiny_wan.py FOLDER [--newer]`."""

from __future__ import annotations

import string
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tiny_parts import small_video_vae
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

_CHANNELS, _WIDTH = 4, 32


def build(folder: Path, newer: bool = False) -> None:
    """Write it.

    Args:
        folder: where it goes.
        newer: with all that models of Wan 2.2 bring: a second transformer, which takes the last steps, and a
            time for each token.
    """
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipe = WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=small_video_vae(AutoencoderKLWan, _CHANNELS, 2),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=_transformer(),
        transformer_2=_transformer() if newer else None,
        boundary_ratio=0.8 if newer else None,
        expand_timesteps=newer,
    )
    pipe.save_pretrained(folder, safe_serialization=True)


def _tokenizer() -> T5Tokenizer:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*words, *((letter, -3.0) for letter in string.ascii_lowercase)], extra_ids=1)


def _text_encoder(vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=vocabulary, d_model=_WIDTH, d_ff=64, d_kv=8, num_layers=1, num_heads=4)
    encoder = UMT5EncoderModel(config).eval()
    nn.init.normal_(encoder.shared.weight)
    return encoder


def _transformer() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_dim=_WIDTH,
        freq_dim=32,
        ffn_dim=96,
        num_layers=3,
    )
    for name, weight in model.named_parameters():
        if "norm" in name:  # all alike, a norm cut wrongly over ranks could not be seen
            nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


if __name__ == "__main__":
    build(Path(sys.argv[1]), "--newer" in sys.argv[2:])
