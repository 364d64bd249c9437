"""Two trained autoencoders and three photos, read from a folder outside the project.

The folder is `VAEPP_TEST_DATA`, or `shared/data` beside the project; its README says what is in it and how it
was made. Tests that need it skip, with the reason, where it is absent.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from torch import nn

PHOTOS = ("astronaut", "chelsea", "coffee")
VAES = ("taef2", "thin_kl")

ROOT = Path(os.environ.get("VAEPP_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not (ROOT / "taef2").is_dir(),
    reason="trained autoencoders and photos not found; VAEPP_TEST_DATA names their folder",
)

_POOL_PLACES = {"encoder": (11, 12, 13), "decoder": (2, 3, 4)}
"""The middle blocks of TAEF2 that diffusers' AutoencoderTiny lacks the pooling of."""


class PooledBlock(nn.Module):
    """A block of TAEF2: a normalised branch added to the input of a plain block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        self.pool = nn.Sequential(
            nn.Conv2d(64, 256, 1, bias=False),
            nn.GroupNorm(4, 256),
            nn.ReLU(),
            nn.Conv2d(256, 64, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pool(x)
        fused: torch.Tensor = self.fuse(self.conv(x) + self.skip(x))
        return fused


def taef2() -> Any:
    """TAEF2 in float32."""
    vae = AutoencoderTiny(latent_channels=32)
    for half, places in _POOL_PLACES.items():
        layers = getattr(vae, half).layers
        for place in places:
            layers[place] = PooledBlock(layers[place])
    vae.load_state_dict(load_file(ROOT / "taef2" / "diffusion_pytorch_model.safetensors"), strict=True)
    return vae.float().eval()


def thin_kl() -> Any:
    """A thin AutoencoderKL in the Flux / Z-Image configuration, in float32."""
    return AutoencoderKL.from_pretrained(ROOT / "thin_kl", use_safetensors=True).float().eval()


def load(name: str) -> Any:
    """One of `VAES`."""
    return taef2() if name == "taef2" else thin_kl()


def photo(name: str, factor: int = 8) -> torch.Tensor:
    """One of `PHOTOS` as `(1, 3, rows, columns)` in [-1, 1], sides cut to a multiple of `factor`."""
    with Image.open(ROOT / "photos" / f"{name}.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    rows, columns = (side // factor * factor for side in pixels.shape[-2:])
    return pixels[None, :, :rows, :columns].contiguous()


def moments(encoded: Any) -> torch.Tensor:
    """What an `encode` returned: the latent, or the posterior's parameters where the VAE has one."""
    found: torch.Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
    return found


def mean(encoded: Any) -> torch.Tensor:
    """What an `encode` returned as one latent: the mean where the VAE has a distribution."""
    found: torch.Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return found


@torch.no_grad()
def latent(vae: Any, name: str) -> torch.Tensor:
    """A photo's latent."""
    return mean(vae.encode(photo(name)))


@attrs.frozen(eq=False)
class Untiled:
    """A photo's round trip on one rank: its moments, its latent (their mean), and that decoded."""

    moments: torch.Tensor
    latent: torch.Tensor
    decoded: torch.Tensor


@cache
@torch.no_grad()
def untiled(name: str) -> dict[str, Untiled]:
    """Every photo's round trip through one of `VAES`."""
    vae, found = load(name), {}
    for which in PHOTOS:
        encoded = vae.encode(photo(which))
        found[which] = Untiled(moments(encoded), mean(encoded), vae.decode(mean(encoded)).sample)
    return found


RANGE = 2.0
"""The width of the output range of both autoencoders, [-1, 1]."""


def differences(
    found: torch.Tensor, expected: torch.Tensor, cuts: list[int], axis: int
) -> tuple[float, float, float]:
    """How far two pictures are apart: mean, maximum, and maximum in a band of 16 rows around each cut.

    Args:
        found: a picture.
        expected: what it should be.
        cuts: the first row or column below each seam.
        axis: the axis that was cut.

    Returns:
        Shares of the output range.
    """
    apart = (found.float() - expected.float()).abs() / RANGE
    seam = max((apart.narrow(axis, cut - 8, 16).max().item() for cut in cuts), default=0.0)
    return apart.mean().item(), apart.max().item(), seam
