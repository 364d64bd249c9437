"""Tokenizers, text encoders and the picture VAE of small random checkpoints."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 16
"""Of the text encoders."""


def clip_tokenizer() -> CLIPTokenizer:
    """Every byte is a token."""
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77
    )


def clip_config(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )


def t5_tokenizer() -> T5Tokenizer:
    """Every letter is a token."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*words, *((letter, -3.0) for letter in string.ascii_lowercase)], extra_ids=1)


def t5_encoder(vocabulary: int, width: int = WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=2)
    ).eval()


def byte_tokenizer(*special: str) -> Qwen2Tokenizer:
    """Every byte is a token, and so are the special ones; the first of all is the padding."""
    words = ["<|endoftext|>", *special, *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token=words[0],
        eos_token=words[0],
        pad_token=words[0],
        extra_special_tokens=list(special),
        padding_side="right",
        model_max_length=2048,
    )


_THIN: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}
"""The configuration of a VAE with few channels, whose tiling fires above 64 px."""


def picture_vae(channels: int, shift: float | None = 0.1159) -> AutoencoderKL:
    """A thin VAE whose pictures use the whole range instead of one grey."""
    vae = AutoencoderKL(
        **_THIN,
        latent_channels=channels,
        scaling_factor=0.3611,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    _spread(vae, torch.randn(1, channels, 16, 16) / 0.3611 + (shift or 0.0))
    return vae


def packed_vae(channels: int) -> AutoencoderKLFlux2:
    """The same for latents packed two by two; statistics of 0 and 1 would hide whether they are used."""
    vae = AutoencoderKLFlux2(**_THIN, latent_channels=channels).eval()
    torch.nn.init.normal_(vae.bn.running_mean, 0.0, 0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 4.0, 10.0)
    _spread(vae, 2.6 * torch.randn(1, channels, 16, 16))
    return vae


@torch.no_grad()
def _spread(vae: Any, latents: torch.Tensor) -> None:
    """Scale the last convolution of a VAE so that what it makes of these latents is not of one grey."""
    sample = vae.decode(latents).sample
    mean, gain = sample.mean((0, 2, 3)), 0.5 / sample.std((0, 2, 3))
    last = vae.decoder.conv_out
    last.weight.mul_(gain[:, None, None, None])
    last.bias.sub_(mean).mul_(gain)
