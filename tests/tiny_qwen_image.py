"""A small random Qwen-Image checkpoint: `python tests/tiny_qwen_image.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny_parts import small_video_vae
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

_CHANNELS, _WIDTH = 4, 32


def build(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0, shift_terminal=0.02),
        vae=small_video_vae(AutoencoderKLQwenImage, _CHANNELS, 1),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * _CHANNELS,
            out_channels=_CHANNELS,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=_WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipe.save_pretrained(folder, safe_serialization=True)


def _tokenizer() -> Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*sorted(ByteLevel.alphabet()), *special]
    return Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token=special[0],
        eos_token=special[2],
        pad_token=special[0],
        extra_special_tokens=special[1:],
        padding_side="right",
        model_max_length=2048,
    )


def _text_encoder(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_heads": 2,
        "out_hidden_size": _WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


if __name__ == "__main__":
    build(Path(sys.argv[1]))
