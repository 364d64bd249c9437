"""A small random Flux checkpoint: `python tests/tiny_flux.py FOLDER`."""

from __future__ import annotations

import string
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def build(folder: Path) -> None:
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=16,
            )
        ),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer), d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
        ),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipe.save_pretrained(folder, safe_serialization=True)


def _clip_tokenizer() -> CLIPTokenizer:
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77
    )


def _t5_tokenizer() -> T5Tokenizer:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*words, *((letter, -3.0) for letter in string.ascii_lowercase)], extra_ids=1)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
