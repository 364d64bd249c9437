"""Tiled decode and encode of the classes beyond the KL family, on real ranks against the class's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import attrs
import pytest
import torch
from counted import counted
from vae_models import tiny_flux2, tiny_kl
from vae_zoo import ZOO, build
from vaepp_strategies import tile_plan
from vaepp_strategies.tile_plan import plan_tiles

from vaepp_sdk import UnsupportedError, parallelize_vae
from vaepp_sdk.entries import load_object
from vaepp_sdk.registry import default_registry
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.facts import Direction
from vaepp_sdk.vae.landing import ShardedSample
from vaepp_sdk.vae.plan import Output, Work

BF16 = torch.bfloat16
TIMESTEP = torch.tensor([0.05])


@attrs.frozen
class Case:
    """One decode or encode; `input` is the input's frames, rows and columns, or its rows and columns."""

    vae: str
    input: tuple[int, ...]
    direction: Direction = "decode"
    batch: int = 1
    dtype: torch.dtype = torch.float32
    output: Output = "all"
    slicing: bool = False
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    options: Mapping[str, Any] = attrs.field(factory=dict)


DC, IMAGE = "AutoencoderDC", "AutoencoderKLHunyuanImage"
WAN, WAN22, QWEN = "AutoencoderKLWan", "AutoencoderKLWan_22", "AutoencoderKLQwenImage"
HUNYUAN, HUNYUAN15 = "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15"
LTX, LTX2 = "AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video"
COG, MOCHI = "AutoencoderKLCogVideoX", "AutoencoderKLMochi"
LONGER = {"tile_sample_min_num_frames": 16, "tile_sample_stride_num_frames": 12}

CASES = [
    # 4 pixels a latent, tiles of 8 latents that advance by 6.
    Case(DC, (9, 13), batch=2, slicing=True),
    Case(DC, (17, 8), dtype=BF16, output="sharded"),
    Case(DC, (8, 7), output="rank0"),  # tiling does not fire
    Case(DC, (36, 60), "encode", output="rank0"),
    Case(DC, (37, 71), "encode", batch=2),  # tiles padded to whole latents
    Case(DC, (32, 28), "encode"),
    Case(IMAGE, (14, 9), batch=2),
    Case(IMAGE, (6, 8), output="rank0"),
    Case(IMAGE, (13, 17), dtype=BF16, output="sharded"),
    Case(IMAGE, (32, 28), "encode", batch=2, slicing=True),
    Case(IMAGE, (52, 44), "encode", attributes={"use_tiling": False}),
    # 8 pixels a latent, tiles of 8 latents that advance by 6.
    Case(WAN, (3, 9, 13), output="rank0"),
    Case(WAN, (1, 13, 7), batch=2),
    Case(WAN, (2, 8, 8)),  # tiling does not fire
    Case(WAN, (2, 14, 9), dtype=BF16, output="sharded"),
    Case(WAN, (9, 72, 104), "encode"),
    Case(WAN, (6, 75, 64), "encode", batch=2, slicing=True, output="rank0"),  # a frame and 3 rows too many
    Case(WAN, (5, 64, 56), "encode", dtype=BF16),
    Case(WAN22, (3, 9, 11), options={"tile_size": 128, "tile_overlap_factor": 0.25}),  # as it is set already
    Case(WAN22, (1, 8, 15), batch=2, dtype=BF16, output="sharded"),
    Case(WAN22, (2, 6, 8), output="rank0"),
    Case(WAN22, (5, 144, 208), "encode", output="rank0"),
    Case(WAN22, (1, 272, 176), "encode"),
    Case(WAN22, (5, 128, 96), "encode"),
    Case(QWEN, (1, 9, 14), batch=2, slicing=True),
    Case(QWEN, (3, 13, 7), output="sharded"),
    Case(QWEN, (2, 8, 8), output="rank0"),  # clamped, unlike tiles
    Case(QWEN, (5, 80, 107), "encode"),
    Case(QWEN, (1, 64, 60), "encode", output="rank0"),
    # Windows of 2 latent frames and one more, which advance by 1.
    Case(HUNYUAN, (2, 9, 13), batch=2),
    Case(HUNYUAN, (5, 9, 7), output="rank0", options={"tile_size": 64, "tile_overlap_factor": 0.25}),
    Case(HUNYUAN, (4, 7, 6), output="sharded"),  # cut in time only
    Case(HUNYUAN, (4, 7, 9), dtype=BF16),
    Case(HUNYUAN, (3, 9, 9), attributes={"use_tiling": False}, batch=2, slicing=True),
    Case(HUNYUAN, (4, 9, 9), attributes={"use_framewise_decoding": False}, output="sharded"),
    Case(HUNYUAN, (7, 9, 6), attributes=LONGER),
    Case(HUNYUAN, (5, 7, 6), attributes={"tile_sample_stride_num_frames": 6}),  # nothing divides
    Case(HUNYUAN, (9, 76, 64), "encode", output="rank0"),
    Case(HUNYUAN, (14, 68, 40), "encode", batch=2, slicing=True),
    Case(HUNYUAN, (13, 60, 44), "encode", output="sharded"),
    Case(HUNYUAN, (5, 100, 67), "encode", output="rank0"),  # the last row of tiles is cropped away
    Case(HUNYUAN, (5, 61, 44), "encode"),  # an incomplete latent row is kept
    Case(HUNYUAN15, (2, 5, 6), output="rank0"),
    Case(HUNYUAN15, (1, 7, 4), batch=2, slicing=True),
    Case(HUNYUAN15, (2, 4, 3), output="sharded"),
    Case(HUNYUAN15, (5, 80, 64), "encode"),
    Case(HUNYUAN15, (1, 64, 48), "encode", output="rank0"),
    # 32 pixels a latent, tiles of 4 latents that advance by 3; windows of frames as above, of 8 pictures.
    Case(LTX, (2, 5, 4), arguments={"temb": TIMESTEP}),
    Case(LTX, (5, 4, 5), arguments={"temb": TIMESTEP}, output="rank0"),
    Case(LTX, (3, 3, 4), arguments={"temb": TIMESTEP.repeat(2)}, batch=2, output="sharded"),
    Case(LTX, (4, 4, 5), arguments={"temb": TIMESTEP}, attributes={"use_framewise_decoding": False}),
    Case(LTX, (17, 160, 96), "encode", output="rank0"),
    Case(LTX, (33, 96, 128), "encode", batch=2, slicing=True),
    Case(LTX2, (2, 5, 3), batch=2, slicing=True),
    Case(LTX2, (5, 5, 3), arguments={"causal": True}, output="rank0"),
    Case(LTX2, (4, 3, 4), output="sharded"),
    Case(LTX2, (17, 160, 96), "encode", arguments={"causal": False}),
    Case(LTX2, (33, 96, 160), "encode", output="rank0"),
    # Tiles of 6 x 10 latents, which advance by 5 and 8.
    Case(COG, (3, 7, 12), output="rank0"),
    Case(COG, (4, 6, 18), batch=2, slicing=True),
    Case(COG, (1, 5, 10), output="sharded"),
    Case(COG, (1, 12, 6)),
    Case(COG, (2, 7, 11), dtype=BF16),
    Case(COG, (17, 56, 72), "encode"),
    Case(COG, (8, 60, 100), "encode", output="rank0"),
    Case(COG, (1, 48, 80), "encode", batch=2),
    Case(MOCHI, (2, 9, 8), output="rank0"),
    Case(MOCHI, (3, 13, 7), attributes={"drop_last_temporal_frames": False}),
    Case(MOCHI, (1, 8, 8), batch=2, slicing=True),
    Case(MOCHI, (3, 9, 7), attributes={"use_framewise_decoding": True}, output="sharded"),
    Case(MOCHI, (7, 72, 64), "encode", output="rank0"),
    Case(MOCHI, (1, 75, 40), "encode"),
]


@cache
def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(name, dtype)


def prepared(case: Case) -> tuple[Any, torch.Tensor]:
    vae = built(case.vae, case.dtype)
    channels = latent_channels(vae) if case.direction == "decode" else 3
    generator = torch.Generator().manual_seed(7)
    return vae, torch.randn(case.batch, channels, *case.input, generator=generator).to(case.dtype)


def latent_channels(vae: Any) -> int:
    return int(vae.config.get("latent_channels") or vae.config.z_dim)


def settled(vae: Any, case: Case) -> Any:
    """The case's switches, put back afterwards, for VAEs are built once."""
    return patch.multiple(vae, use_slicing=case.slicing, **case.attributes)


def whole(result: Any, direction: str) -> Any:
    if direction == "decode":
        return result.sample
    if hasattr(result, "latent"):
        return result.latent
    posterior = result.latent_dist
    return posterior if isinstance(posterior, ShardedSample) else posterior.parameters


def reference(case: Case) -> torch.Tensor:
    vae, value = prepared(case)
    with settled(vae, case), torch.no_grad():
        found: torch.Tensor = whole(getattr(vae, case.direction)(value, **case.arguments), case.direction)
    return found


def run_case(rank: int, case: Case, expected: torch.Tensor) -> dict[str, Any]:
    vae, value = prepared(case)
    wrapped = parallelize_vae(vae, strategy="tile", output=case.output, **case.options)
    with settled(vae, case), counted() as seen:
        result = whole(getattr(wrapped, case.direction)(value, **case.arguments), case.direction)
    plan = wrapped.last_plan
    repeats = case.batch if case.slicing else 1
    return {
        "same": same(rank, case, result, expected),
        "values": held(result),
        "sent": sum(size for _, size in seen.sent),
        "planned": sum(move.nbytes for move in plan.moves if move.src == rank) * repeats,
        "groups": seen.groups,
        "digest": plan.digest,
    }


def same(rank: int, case: Case, result: Any, expected: torch.Tensor) -> bool:
    if isinstance(result, ShardedSample):
        return result.shape == expected.shape and all(
            torch.equal(piece.tensor, expected[(..., *piece.box.index)]) for piece in result.pieces
        )
    if case.output == "rank0" and rank != 0:
        return bool(result.shape == (0, *expected.shape[1:]) and result.dtype == expected.dtype)
    return torch.equal(result, expected) and result.dtype == expected.dtype


def held(result: Any) -> int:
    if isinstance(result, ShardedSample):
        return sum(piece.tensor.numel() for piece in result.pieces)
    return int(result.numel())


def run_cases(rank: int, cases: list[Case], expected: list[torch.Tensor]) -> list[dict[str, Any]]:
    # Peaks are tested elsewhere, and a trace of the layers takes longer than most of these cases.
    with patch.object(tile_plan, "untiled_bytes", lambda *_, **__: 1):
        return [run_case(rank, case, tensor) for case, tensor in zip(cases, expected, strict=True)]


@cache
def references() -> list[torch.Tensor]:
    return [reference(case) for case in CASES]


@pytest.mark.parametrize(("world_size", "step"), [(2, 1), (3, 2)])
def test_bit_identical_to_one_rank(world_size: int, step: int) -> None:
    cases, expected = CASES[::step], references()[::step]
    by_rank = run_ranks(world_size, run_cases, cases, expected, timeout=600.0)
    for case, tensor, reports in zip(cases, expected, zip(*by_rank, strict=True), strict=True):
        assert len({report["digest"] for report in reports}) == 1, case
        for rank, report in enumerate(reports):
            assert report["same"], (case, rank, report)
            assert report["sent"] == report["planned"], (case, rank, report)
            assert report["groups"] == 0, (case, rank, report)
        if case.output == "sharded":
            assert sum(report["values"] for report in reports) == tensor.numel(), case


def test_ranks_share_tiles_and_windows_of_frames() -> None:
    """Without this, one rank could do all the work and every other test here would pass."""
    for case in (Case(WAN, (3, 9, 13)), Case(HUNYUAN, (5, 7, 6)), Case(LTX, (17, 160, 96), "encode")):
        facts = adapter_of(case.vae).facts()
        _, value = prepared(case)
        work = Work(
            direction=case.direction,
            shape=tuple(value.shape),
            itemsize=4,
            ranks=2,
            world_size=2,
            output="all",
        )
        plan = plan_tiles(facts, work)
        assert min(plan.cost(rank) for rank in range(2)) > 0.3 * plan.cost(0), case
        assert {move.kind for move in plan.moves} == {"seam", "output"}, case


def adapter_of(name: str, vae: Any = None) -> Any:
    entry = default_registry().vae(type(built(name)))
    return load_object(entry.adapter, name)(vae if vae is not None else built(name))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_facts_say_what_comes_out_of_a_window(name: str) -> None:
    """On the meta device, where shapes flow and numbers do not."""
    vae = build(name).to("meta")
    adapter = adapter_of(name, vae)
    adapter = adapter.with_arguments("decode", {"temb": TIMESTEP.to("meta")} if name == LTX else {})
    facts = adapter.facts()
    clips = [(count,) for count in range(1, 8)] if facts.temporal_ratio else [()]
    for frames in clips:
        latent = torch.empty(1, facts.latent_channels, *frames, 3, 2, device="meta")
        decoded = adapter.decode_window(latent).shape
        assert tuple(decoded) == facts.out_shape("decode", latent.shape), frames
        pictures = torch.empty(1, 3, *decoded[2:], device="meta")
        assert tuple(vae_encode(adapter, pictures).shape) == facts.out_shape("encode", pictures.shape), frames


def vae_encode(adapter: Any, pictures: torch.Tensor) -> Any:
    return adapter.with_arguments("encode", {}).encode_window(pictures)


def test_facts_say_how_many_latents_odd_clips_give() -> None:
    for name in (WAN, QWEN, HUNYUAN, COG, MOCHI):
        adapter = adapter_of(name, build(name).to("meta"))
        for frames in (2, 3, 6, 8, 10, 12, 16, 19):
            pictures = torch.empty(1, 3, frames, 16, 24, device="meta")
            expected = adapter.facts().out_shape("encode", pictures.shape)
            assert tuple(adapter.encode_window(pictures).shape) == expected, (name, frames)


REFUSED = {
    "broken tiled encode": (Case(IMAGE, (36, 44), "encode"), "cannot encode in tiles: its own tiled encode"),
    "a sliver of pixels": (Case(COG, (1, 84, 80), "encode"), "less than one latent"),
    "pixels of half a latent": (Case(WAN22, (1, 262, 160), "encode"), "multiples of 16"),
    "frames of half a latent": (Case(LTX, (10, 96, 96), "encode"), "nearest: 9 or 17"),
    "nothing to reflect": (Case(LTX2, (2, 4, 7)), "takes 2 or more"),
    "no timestep": (Case(LTX, (2, 4, 4)), "call decode(z, temb=...)"),
    "slices with timesteps": (
        Case(LTX, (1, 4, 4), batch=2, slicing=True, arguments={"temb": TIMESTEP.repeat(2)}),
        "wrong timesteps",
    ),
    "framewise encode": (
        Case(MOCHI, (7, 64, 64), "encode", attributes={"use_framewise_encoding": True}),
        "use_framewise_encoding",
    ),
    "windows that stand still": (
        Case(HUNYUAN, (5, 8, 8), attributes={"tile_sample_stride_num_frames": 2}),
        "advance by 0",
    ),
}
BROKEN_THERE = ("broken tiled encode", "a sliver of pixels", "nothing to reflect", "slices with timesteps")
"""Cases in which the class itself fails, so that nothing that works is refused."""


def refusals(rank: int) -> dict[str, tuple[str, int]]:
    found = {}
    for name, (case, _) in REFUSED.items():
        vae, value = prepared(case)
        wrapped = parallelize_vae(vae, strategy="tile")
        with settled(vae, case), counted() as seen:
            try:
                getattr(wrapped, case.direction)(value, **case.arguments)
                said = "nothing"
            except UnsupportedError as error:
                said = str(error)
        found[name] = (said, len(seen.sent))
    return found


def test_refusals_are_alike_and_come_before_any_message() -> None:
    by_rank = run_ranks(2, refusals)
    assert by_rank[0] == by_rank[1]
    for name, (said, messages) in by_rank[0].items():
        assert REFUSED[name][1] in said, (name, said)
        assert "\n" not in said
        assert messages == 0


@pytest.mark.parametrize("name", BROKEN_THERE)
def test_what_is_refused_fails_on_one_rank_too(name: str) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        reference(REFUSED[name][0])


def positional(rank: int, expected: torch.Tensor) -> bool:
    """A timestep second, as LTX pipelines give it."""
    vae, value = prepared(Case(LTX, (2, 5, 4)))
    found = parallelize_vae(vae, strategy="tile").decode(value, TIMESTEP, return_dict=False)[0]
    with pytest.raises(TypeError, match="does not take causal"):
        parallelize_vae(vae, strategy="tile").decode(value, TIMESTEP, causal=True)
    return torch.equal(found, expected)


def test_a_timestep_can_be_given_by_position() -> None:
    assert all(run_ranks(2, positional, reference(Case(LTX, (2, 5, 4), arguments={"temb": TIMESTEP}))))


def test_a_decoder_that_draws_noise_is_refused() -> None:
    vae = build(LTX)
    vae.register_to_config(decoder_inject_noise=(False, False, False, False, True))
    with pytest.raises(UnsupportedError, match="draws noise"):
        adapter_of(LTX, vae)


def test_ratios_that_are_not_those_of_the_layers_are_refused() -> None:
    """As LTX-2 has them where its configuration leaves them out."""
    vae = build(LTX2)
    vae.spatial_compression_ratio = 64
    with pytest.raises(UnsupportedError, match=r"declares 64 pixels and 8 .* spatial_compression_ratio=32"):
        adapter_of(LTX2, vae)


@pytest.mark.parametrize("made", ["kl", "kl sides", "flux2", WAN, WAN22, QWEN])
def test_facts_read_from_a_configuration_are_those_of_the_vae(made: str) -> None:
    """As far as options are checked against them before the VAE is loaded."""
    sides: Any = [96, 96]
    builders: dict[str, Callable[[], Any]] = {
        "kl": partial(tiny_kl, sample_size=80),
        "kl sides": partial(tiny_kl, sample_size=sides),
        "flux2": tiny_flux2,
    }
    small = builders.get(made, partial(build, made))()
    vae = type(small).from_config(small.config)  # with the tiles that its class sets
    entry = default_registry().vae(type(vae))
    assert entry.facts is not None
    config = {**vae.config, "_class_name": type(vae).__name__}
    found, facts = entry.facts(config), load_object(entry.adapter, made)(vae).facts()
    for name in ("vae_class", "spatial_ratio", "latent_channels", "picture_channels", "decode_tiles"):
        assert getattr(found, name) == getattr(facts, name), name
    assert found.encode_tiles in (None, facts.encode_tiles)
