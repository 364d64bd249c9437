"""Any geometry on any number of ranks, against diffusers' own tiling code.

Ranks are threads and the VAE is a cheap function whose result depends on where a tile begins and ends,
so that hundreds of geometries can be tried; `test_tile_run` has the real ones.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal

import attrs
import torch
from diffusers import AutoencoderKL
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vaepp_strategies.tile_run import TileStrategy

from vaepp_sdk.parallel.view import Recv, Send, VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import TileGrid, VaeFacts
from vaepp_sdk.vae.plan import Work

RATIO = 4


class FakeVae(SimpleNamespace):
    """diffusers' tiling methods over a cheap decoder and encoder."""

    config = SimpleNamespace(use_quant_conv=False, use_post_quant_conv=False)
    blend_v = AutoencoderKL.blend_v
    blend_h = AutoencoderKL.blend_h
    tiled_decode = AutoencoderKL.tiled_decode
    _tiled_encode = AutoencoderKL._tiled_encode

    @staticmethod
    def decoder(latent: torch.Tensor) -> torch.Tensor:
        return _marked(latent.repeat_interleave(RATIO, -2).repeat_interleave(RATIO, -1))

    @staticmethod
    def encoder(picture: torch.Tensor) -> torch.Tensor:
        rows, columns = picture.shape[-2] // RATIO, picture.shape[-1] // RATIO
        return _marked(picture[..., : rows * RATIO : RATIO, : columns * RATIO : RATIO].clone())


def _marked(tile: torch.Tensor) -> torch.Tensor:
    """Values that tell where in its tile a pixel stands."""
    rows, columns = tile.shape[-2:]
    return (tile * 1.7 + torch.arange(rows).view(-1, 1) / (rows + 1) + torch.arange(columns) / 3).to(
        tile.dtype
    )


class FakeAdapter(VaeAdapter):
    """Gives the strategy the same decoder and encoder."""

    def __init__(self, vae: Any, facts: VaeFacts) -> None:
        self.vae = vae
        self._facts = facts

    def facts(self) -> VaeFacts:
        return self._facts

    def wrap_decode(self, sample: Any, return_dict: bool) -> Any:
        return (sample, return_dict)

    def wrap_encode(self, moments: Any, return_dict: bool) -> Any:
        return (moments, return_dict)

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        return FakeVae.decoder(latent)

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        return FakeVae.encoder(picture)


class ThreadGroup(VaeGroup):
    """Ranks that are threads of this process."""

    lines: dict[tuple[int, int], queue.Queue[torch.Tensor]]

    def exchange(self, sends: Sequence[Send], recvs: Sequence[Recv], what: str) -> None:
        for send in sends:
            self.traffic.add(send.tensor)
            self.lines[self.rank, send.to].put(send.tensor.clone())
        for recv in recvs:
            arrived = self.lines[recv.source, self.rank].get(timeout=20)
            assert arrived.shape == recv.tensor.shape, what
            recv.tensor.copy_(arrived)


@attrs.frozen
class Setting:
    direction: Literal["decode", "encode"]
    sides: tuple[int, int]
    sample: int
    latent: int
    overlap: float
    ranks: int
    dtype: torch.dtype

    @property
    def facts(self) -> VaeFacts:
        latent, sample = (self.latent,) * 2, (self.sample,) * 2
        return VaeFacts(
            vae_class="FakeVae",
            spatial_ratio=RATIO,
            latent_channels=2,
            picture_channels=2,
            moment_channels=2,
            use_tiling=True,
            decode_tiles=TileGrid.overlapping(latent, sample, self.overlap),
            encode_tiles=TileGrid.overlapping(sample, latent, self.overlap),
        )


@st.composite
def any_setting(draw: st.DrawFn) -> Setting:
    latent = draw(st.integers(2, 9))
    # People set one of the two sizes and not the other.
    sample = draw(st.sampled_from([latent * RATIO, latent * RATIO + RATIO, latent * RATIO - 3]))
    # Tiles advance by a latent at least, of either geometry: less leaves an encoder's last tile without one.
    overlap = draw(st.floats(0, 1 - max(1 / latent, RATIO / sample)))
    decodes = draw(st.booleans())
    # At least one side above the tile, so that tiling fires.
    long, short = latent + draw(st.integers(1, 20)), draw(st.integers(1, 25))
    if not decodes:
        step = int(sample * (1 - overlap))
        assume(step >= RATIO)  # a rounding below
        long, short = _encodable(sample + long, step), _encodable(short * RATIO, step)
    return Setting(
        direction="decode" if decodes else "encode",
        sides=draw(st.sampled_from([(long, short), (short, long)])),
        sample=sample,
        latent=latent,
        overlap=overlap,
        ranks=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )


def _encodable(side: int, step: int) -> int:
    """The next side whose last tile holds a latent: below that, an encoder fails on one rank too."""
    while (side - 1) % step + 1 < RATIO:
        side += 1
    return side


@settings(max_examples=150, deadline=None)
@given(any_setting())
def test_any_geometry_has_the_same_bits(setting: Setting) -> None:
    vae = FakeVae(
        tile_latent_min_size=setting.latent,
        tile_sample_min_size=setting.sample,
        tile_overlap_factor=setting.overlap,
    )
    value = torch.randn(1, 2, *setting.sides, generator=torch.Generator().manual_seed(3)).to(setting.dtype)
    if setting.direction == "decode":
        expected = vae.tiled_decode(value, return_dict=False)[0]
    else:
        expected = vae._tiled_encode(value)
    found = on_threads(setting, vae, value)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def on_threads(setting: Setting, vae: Any, value: torch.Tensor) -> torch.Tensor:
    ranks = setting.ranks
    asked = Work(
        direction=setting.direction,
        shape=tuple(value.shape),
        itemsize=value.element_size(),
        ranks=ranks,
        world_size=ranks,
        output="rank0",
    )
    adapter = FakeAdapter(vae, setting.facts)
    lines: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
        (source, to): queue.Queue() for source in range(ranks) for to in range(ranks)
    }

    def run(rank: int) -> Any:
        group = ThreadGroup(None, rank, ranks, ranks, timedelta(seconds=20))
        group.lines = lines
        strategy = TileStrategy()
        plan = strategy.plan(setting.facts, asked)
        call: Callable[..., Any] = getattr(strategy, setting.direction)
        landed = call(adapter, value, group, plan)
        assert group.traffic.nbytes == plan.bytes_sent(rank)
        return landed

    with ThreadPoolExecutor(ranks) as pool:
        landed = list(pool.map(run, range(ranks)))
    assert all(each.sample is None for each in landed[1:])
    assert all(line.empty() for line in lines.values())
    sample: torch.Tensor = landed[0].sample
    return sample
