"""Builds a small random Z-Image checkpoint in diffusers format.

    python -m vaepp_plugins.tiny_z_image FOLDER

It has every part of the real one (byte-level tokenizer, text encoder, transformer, VAE, scheduler) and next
to no weights, so that demos and tests need no download. The pictures are abstract: nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

__all__ = ["Sizes", "build"]

_SIZES_FILE = "sizes.json"
"""Records what a folder was built from, so that one of other sizes is never taken for it."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@attrs.frozen(kw_only=True)
class Sizes:
    """The sizes of a checkpoint; the defaults make a few hundred thousand weights.

    Attributes:
        dim: the transformer's width; a multiple of `3 * heads`, with an even width per head.
        layers: its main layers; two refiner layers of each kind come besides.
        heads: its attention heads.
        text_width: the text encoder's width.
        vae_width: channels of each VAE level.
        sample_size: the VAE's tile, in pixels: larger pictures are tiled where tiling is on.
        max_shard_size: the largest safetensors file of the transformer; larger ones are split.
        seed: of all random weights.
    """

    dim: int = 48
    layers: int = 2
    heads: int = 4
    text_width: int = 32
    vae_width: int = 16
    sample_size: int = 128
    max_shard_size: str = "5GB"
    seed: int = 0


def build(folder: str | Path, **sizes: Any) -> Path:
    """Write a checkpoint, or leave the one that is there.

    Args:
        folder: where it goes. It appears complete or not at all.
        sizes: fields of `Sizes`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something else, or a checkpoint of other sizes.
    """
    wanted, folder = Sizes(**sizes), Path(folder).absolute()
    if _is_built(folder, wanted):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(scratch, wanted)
        scratch.chmod(0o755)  # mkdtemp lets nobody else read it
        try:
            scratch.rename(folder)
        except OSError:
            if not _is_built(folder, wanted):  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _is_built(folder: Path, wanted: Sizes) -> bool:
    """Whether the folder holds just this checkpoint."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / _SIZES_FILE).read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{folder} exists and is not a tiny checkpoint; name another folder") from None
    if found != attrs.asdict(wanted):
        raise FileExistsError(f"{folder} holds a checkpoint of other sizes ({found}); name another folder")
    return True


def _save(folder: Path, sizes: Sizes) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        tokenizer = _tokenizer()
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False
            ),
            vae=_vae(sizes),
            text_encoder=_text_encoder(sizes, len(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(sizes),
        )
    pipe.save_pretrained(folder, safe_serialization=True)
    if sizes.max_shard_size != Sizes().max_shard_size:
        shutil.rmtree(folder / "transformer")
        pipe.transformer.save_pretrained(folder / "transformer", max_shard_size=sizes.max_shard_size)
    (folder / _SIZES_FILE).write_text(json.dumps(attrs.asdict(sizes), indent=2) + os.linesep)


def _tokenizer() -> Any:
    """A tokenizer whose every byte is a token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=special[0],
        eos_token=special[2],
        pad_token=special[0],
        extra_special_tokens=special[1:],
        padding_side="right",
        model_max_length=1024,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _text_encoder(sizes: Sizes, vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=sizes.text_width,
        intermediate_size=2 * sizes.text_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=sizes.text_width // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen3Model(config).eval()


def _transformer(sizes: Sizes) -> Any:
    from diffusers import ZImageTransformer2DModel

    head = sizes.dim // sizes.heads
    side = head // 6 * 2  # rows and columns each take about a third of a head's rotation, an even number
    model = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=sizes.dim,
        n_layers=sizes.layers,
        n_refiner_layers=2,
        n_heads=sizes.heads,
        n_kv_heads=sizes.heads,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=sizes.text_width,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[head - 2 * side, side, side],
        axes_lens=[1024, 512, 512],
    )
    # These are born as zeros, and with zeros a mistake in padding could not be seen.
    nn.init.normal_(model.x_pad_token)
    nn.init.normal_(model.cap_pad_token)
    return model.eval()


def _vae(sizes: Sizes) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(sizes.vae_width,) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=sizes.sample_size,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    ).eval()
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):  # with plain affines, errors in shared statistics would hide
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    _spread_colours(vae)
    return vae


@torch.no_grad()
def _spread_colours(vae: Any) -> None:
    """Scale the last convolution so that pictures use the whole range instead of one grey."""
    latents = torch.randn(1, 16, 16, 16) / vae.config.scaling_factor + vae.config.shift_factor
    sample = vae.decode(latents).sample
    mean, spread = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
    last = vae.decoder.conv_out
    gain = 0.5 / spread
    last.weight.mul_(gain[:, None, None, None])
    last.bias.sub_(mean).mul_(gain)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vaepp_plugins.tiny_z_image", description=__doc__)
    parser.add_argument("folder", help="where the checkpoint goes; one that is there is left alone")
    for field in attrs.fields(Sizes):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help="(%(default)s)")
    return parser.parse_args()


def _main() -> None:
    arguments = vars(_arguments())
    folder = arguments.pop("folder")
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        print(build(folder, **arguments))
    except FileExistsError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    _main()
