"""What one call of each family's transformer runs through, from its `config.json` and the tokens it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.step_bytes import Chain, Step

__all__ = ["MODELS", "STEPS"]

Config = Mapping[str, Any]


def _z_image(config: Config, text: int, picture: int) -> Step:
    """Both sequences are refined apart, then run as one."""
    refiners = config["n_refiner_layers"]
    return Step(
        chains=(
            _one_stream(refiners, (picture,), dealt=False),
            _one_stream(refiners, (text,), dealt=False),
            _one_stream(config["n_layers"], (picture + text,)),
        ),
        heads=config["n_heads"],
        width=config["dim"],
        output=picture * 4 * config["in_channels"],
    )


def _one_stream(blocks: int, carried: tuple[int, ...], sums: int = 2, *, dealt: bool = True) -> Chain:
    """Blocks whose layers see all sequences as one."""
    tokens = sum(carried)
    return Chain(
        carried=carried,
        left=carried,
        attentions=(carried,) * blocks,
        sums=(tokens,) * sums * blocks,
        dealt=dealt,
    )


def _two_streams(blocks: int, text: int, picture: int) -> Chain:
    """Blocks with attention and feed-forward layers for each sequence."""
    return _one_stream(blocks, (text, picture))


def _flux(config: Config, text: int, picture: int) -> Step:
    """A block with one stream sums the outputs of attention and feed-forward at once."""
    return Step(
        chains=(
            _two_streams(config["num_layers"], text, picture),
            _one_stream(config["num_single_layers"], (text, picture), sums=1),
        ),
        output=picture * config["in_channels"],
        two_calls=True,
        heads=config["num_attention_heads"],
        width=_width(config),
    )


def _flux2(config: Config, text: int, picture: int) -> Step:
    """Text and picture are one sequence before the blocks with one stream."""
    return Step(
        chains=(
            _two_streams(config["num_layers"], text, picture),
            _one_stream(config["num_single_layers"], (text + picture,), sums=1),
        ),
        output=picture * config["in_channels"],
        two_calls=True,
        heads=config["num_attention_heads"],
        width=_width(config),
    )


def _sd3(config: Config, text: int, picture: int) -> Step:
    """Some blocks attend to the picture twice; the last one makes nothing of the text but keys and values."""
    blocks, second = config["num_layers"], len(config["dual_attention_layers"])
    both, alone = (text, picture), (picture,)
    chain = Chain(
        carried=both,
        left=alone,
        attentions=(both,) * blocks + (alone,) * second,
        sums=(text + picture,) * 2 * (blocks - 1) + (picture,) * (2 + second),
    )
    return Step(
        chains=(chain,),
        heads=config["num_attention_heads"],
        width=_width(config),
        output=picture * 4 * config["out_channels"],
    )


def _qwen_image(config: Config, text: int, picture: int) -> Step:
    return Step(
        chains=(_two_streams(config["num_layers"], text, picture),),
        output=picture * config["in_channels"],
        two_calls=True,
        heads=config["num_attention_heads"],
        width=_width(config),
    )


def _wan(config: Config, text: int, picture: int) -> Step:
    """Each block attends to the clip and to the text; both norms of either are over all heads."""
    blocks = config["num_layers"]
    chain = Chain(
        carried=(picture,),
        left=(picture,),
        attentions=((picture,),) * blocks,
        sums=(picture,) * 3 * blocks,
        squares=(picture, picture, picture, text) * blocks,
    )
    return Step(
        chains=(chain,),
        heads=config["num_attention_heads"],
        width=_width(config),
        output=picture * 4 * config["out_channels"],
        two_calls=True,
    )


def _width(config: Config) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


STEPS: Mapping[str, Callable[[Config, int, int], Step]] = {
    "ZImagePipeline": _z_image,
    "FluxPipeline": _flux,
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _flux2,
    "StableDiffusion3Pipeline": _sd3,
    "QwenImagePipeline": _qwen_image,
    "WanPipeline": _wan,
}
"""By pipeline; called with the configuration, and the tokens of the text and of the picture or clip."""

_PICTURE = 64 * 64
"""Tokens of 1024 x 1024 pixels."""

MODELS: Mapping[str, tuple[str, Config, int, int]] = {
    "Z-Image": (
        "ZImagePipeline",
        {"n_refiner_layers": 2, "n_layers": 30, "n_heads": 30, "dim": 3840, "in_channels": 16},
        128,
        _PICTURE,
    ),
    "FLUX.1": (
        "FluxPipeline",
        {
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "in_channels": 64,
        },
        512,
        _PICTURE,
    ),
    "FLUX.2 [dev]": (
        "Flux2Pipeline",
        {
            "num_layers": 8,
            "num_single_layers": 48,
            "num_attention_heads": 48,
            "attention_head_dim": 128,
            "in_channels": 128,
        },
        512,
        _PICTURE,
    ),
    "SD3.5 Large": (
        "StableDiffusion3Pipeline",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "attention_head_dim": 64,
            "dual_attention_layers": (),
            "out_channels": 16,
        },
        77 + 256,
        _PICTURE,
    ),
    "Qwen-Image": (
        "QwenImagePipeline",
        {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64},
        128,
        _PICTURE,
    ),
    "Wan 2.1 14B": (
        "WanPipeline",
        {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "out_channels": 16},
        512,
        21 * 30 * 52,
    ),
}
"""Published models: pipeline, configuration, and tokens of a text and of 1024 x 1024 pixels; of Wan those of
81 frames of 480 x 832."""
