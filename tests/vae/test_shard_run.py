"""Sharded decode and encode on real ranks, against the untiled decode and encode on one."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from counted import counted
from diffusers.models.attention_processor import AttnProcessor
from shard_cases import Case, check_cases, prepared
from torch import nn

from vaepp_sdk import UnsupportedError, parallelize_vae
from vaepp_sdk.errors import PeerError, RunError
from vaepp_sdk.testing import run_ranks

BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
WIDE = {"widths": (8, 12, 16, 16), "quant": True}

CASES = [
    Case((16, 12)),
    Case((37, 5), dtype=F64),
    Case((5, 41), batch=2, build=WIDE, output="rank0"),
    Case((39, 6), dtype=BF16, output="sharded"),
    Case((30, 31), dtype=BF16),
    Case((9, 33), dtype=F64, vae="flux2", output="sharded"),
    Case((33, 7), vae="flux2", batch=2, dtype=BF16),
    Case((17, 11), build={"attention": False}, output="rank0"),
    Case((12, 9), prepare="fuse_qkv_projections"),
    Case((10, 4), build={"force_upcast": True}, prepare="half", dtype=F16),
    Case((11, 6), batch=3, prepare="enable_slicing", output="sharded"),
    Case((3, 2), dtype=F64),
    Case((1, 3), output="rank0"),
    Case((1, 1), active=1),
    Case((2, 2), output="sharded", batch=2),
    Case((13, 9), prepare="enable_tiling"),
    Case((35, 6), vae="tiny", dtype=F64),
    Case((6, 35), vae="tiny", batch=2, output="rank0"),
    Case((18, 17), vae="tiny", dtype=BF16),
    Case((136, 48), direction="encode", dtype=F64),
    Case((61, 299), direction="encode", batch=2, output="rank0"),  # no whole number of latents
    Case((303, 40), direction="encode", vae="flux2", output="sharded"),
    Case((64, 40), direction="encode", dtype=BF16),
    Case((135, 45), direction="encode", vae="tiny", dtype=F64),  # whose encoder rounds up
    Case((49, 35), direction="encode", vae="tiny", output="sharded"),
    Case((33, 66), direction="encode", vae="tiny"),
    Case((8, 17), direction="encode", output="rank0"),
    Case((72, 104), direction="encode", dtype=BF16),  # seams of one column, which strided kernels get wrong
    Case((24, 120), direction="encode", vae="tiny", dtype=BF16),
]
SANA = {"upsample_block_type": "interpolate", "downsample_block_type": "Conv"}
MORE = [
    Case((21, 12), vae="hunyuan image", dtype=F64),
    Case((9, 25), vae="hunyuan image", batch=2, output="rank0"),
    Case((20, 8), vae="hunyuan image", dtype=BF16),
    Case((72, 48), vae="hunyuan image", direction="encode", dtype=F64),
    Case((40, 76), vae="hunyuan image", direction="encode", output="sharded"),
    Case((19, 12), vae="dc", build=SANA),
    Case((9, 26), vae="dc", batch=2, output="rank0"),
    Case((14, 16), vae="dc", dtype=BF16),
    Case((2, 1), vae="dc", active=1),  # so few positions that the class itself attends quadratically
    Case((76, 48), vae="dc", direction="encode"),
    Case((32, 76), vae="dc", direction="encode", batch=2, output="sharded"),
    Case((24, 72), vae="dc", direction="encode", build=SANA, dtype=BF16),
    Case((24, 76), vae="dc", direction="encode", build=SANA | {"encoder_layers_per_block": (0, 1, 1)}),
    Case((9, 14), vae="dc", build={"decoder_norm_types": "batch_norm"}, batch=2),
]
BLOCKS = [  # no straight sequences of layers: several bands on a rank, in turn
    Case((19, 12), vae="hunyuan image", dtype=F64, options={"row_blocks": 2}),
    Case((72, 24), vae="hunyuan image", direction="encode", output="rank0", options={"row_blocks": 3}),
    Case((13, 9), vae="dc", batch=2, options={"row_blocks": 2}),
    Case((9, 14), vae="dc", dtype=BF16, output="sharded", options={"peak_limit": "100KiB"}),
    Case((7, 15), vae="dc", build=SANA, options={"row_blocks": 2}),
    Case((28, 76), vae="dc", direction="encode", options={"row_blocks": 4}),
    Case((17, 10), vae="dc", output="rank0", options={"row_blocks": 2, "recompute": "always"}),
    Case((48, 44), vae="dc", direction="encode", options={"row_blocks": 3, "recompute": "always"}),
    Case((9, 11), vae="tiny", dtype=F64, options={"row_blocks": 2, "recompute": "always"}),
]
PART = [
    Case((37, 6), size=2, active=2),
    Case((6, 38), size=3, output="rank0", active=3),
    Case((19, 5), size=3, output="sharded", batch=2),
    Case((160, 45), size=2, direction="encode"),
    Case((3, 2), active=3),
]


@pytest.mark.parametrize(
    ("world_size", "cases"), [(2, CASES + MORE + BLOCKS), (4, CASES + MORE + PART + BLOCKS[::2])]
)
def test_the_result_is_the_untiled_one_up_to_rounding(world_size: int, cases: list[Case]) -> None:
    check_cases(world_size, cases)


def test_eight_ranks() -> None:
    small: dict[str, Any] = {"widths": (4, 4), "latent_channels": 4}
    check_cases(
        8,
        [
            Case((67, 3), build=small, dtype=F64, active=8),
            Case((3, 9), build=small, output="rank0", active=8),
            Case((5, 4), build=small, output="sharded", active=5),
            Case((35, 18), build=small, direction="encode", active=8),
        ],
    )


class BoomError(Exception):
    pass


def boom(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    """Fail in the decode itself; the planner's trace on the meta device comes before it."""
    if arguments[0].device.type != "meta":
        raise BoomError


def fail_everywhere(rank: int) -> tuple[bool, bool, float]:
    """An error half way on every rank, then a decode of the same VAE."""
    vae, value = prepared(Case((37, 5)))
    wrapped = parallelize_vae(vae, strategy="shard")
    before = [set(vars(module)) for module in vae.modules()]
    handle = vae.decoder.up_blocks[1].register_forward_pre_hook(boom)
    try:
        wrapped.decode(value)
        raised = False
    except BoomError:
        raised = True
    handle.remove()
    restored = [set(vars(module)) for module in vae.modules()] == before
    with torch.no_grad():
        expected = vae.decode(value).sample
    return raised, restored, float((wrapped.decode(value).sample - expected).abs().max())


def decode_in_threads(rank: int) -> list[str]:
    """What others get who decode while the VAE decodes: with its wrapper, another one, the VAE itself."""
    vae, value = prepared(Case((9, 5)))
    vae.enable_tiling()
    wrapped, tiles = (parallelize_vae(vae, strategy=name) for name in ("shard", "tile"))
    others: list[Any] = [wrapped, tiles, vae]
    said: list[str] = []

    def decode(other: Any) -> None:
        try:
            other.decode(value)
        except RunError as error:
            said.append(str(error))

    def another(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].is_meta or not others:  # the layers are being looked at, or this is another one
            return
        called, others[:] = list(others), []
        for other in called:
            thread = threading.Thread(target=decode, args=(other,))
            thread.start()
            thread.join()

    handle = vae.decoder.register_forward_pre_hook(another)
    wrapped.decode(value)
    handle.remove()
    wrapped.decode(value)
    return said


def fail_and_go_on(rank: int) -> tuple[tuple[bool, bool, float], list[str]]:
    return fail_everywhere(rank), decode_in_threads(rank)


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    return run_ranks(2, fail_and_go_on)


def test_one_vae_object_serves_one_thread_at_a_time(two_ranks: list[Any]) -> None:
    for _, (own, second, plain) in two_ranks:
        assert "already running in another thread" in own
        assert own == second
        assert "was called from another thread; use one VAE object for one call at a time" in plain


def test_an_error_half_way_restores_every_module_and_the_next_decode_is_right(two_ranks: list[Any]) -> None:
    for (raised, restored, apart), _ in two_ranks:
        assert raised
        assert restored
        assert apart < 5e-5  # rounding


def fail_on_one(rank: int) -> tuple[str, str, bool, bool, float]:
    """An error half way on one rank, then another decode: what each rank raises, and what is left behind."""
    vae, value = prepared(Case((37, 5)))
    wrapped = parallelize_vae(vae, strategy="shard")
    before = [set(vars(module)) for module in vae.modules()]
    handle = vae.decoder.up_blocks[1].register_forward_pre_hook(boom) if rank == 1 else None
    raised, cause = "nothing", ""
    try:
        wrapped.decode(value)
    except (BoomError, PeerError) as error:
        raised, cause = type(error).__name__, str(error)
    if handle is not None:
        handle.remove()
    restored = [set(vars(module)) for module in vae.modules()] == before
    # Other numbers, so that a message of the first decode would show in the second.
    other = value.flip(-2)
    with torch.no_grad():
        expected = vae.decode(other).sample
    apart = float((wrapped.decode(other).sample - expected).abs().max())
    return raised, cause, restored, not wrapped._busy.locked(), apart


def test_an_error_on_one_rank_reaches_the_others_and_the_next_decode_is_right() -> None:
    results = run_ranks(2, fail_on_one)
    assert [result[0] for result in results] == ["PeerError", "BoomError"]
    assert results[0][1].startswith("rank 0 waited for rank 1 (decode): it raised an error")
    for _, _, restored, free, apart in results:
        assert restored
        assert free
        assert apart < 5e-5  # rounding


class Centred(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value - value.mean(dim=(2, 3), keepdim=True)


class Doubled(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.tanh(value) * 2


class Shifted(nn.Module):
    """Reads its neighbours without a layer that says so."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(value, (0, 0, 1, 0))[..., :-1, :]


def _convolution(**settings: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **settings})


REPLACEMENTS: dict[str, tuple[Any, str]] = {
    "centred": (Centred(), r"conv_act.0 \(Centred\): not known, and runs .*mean"),
    "shifted": (Shifted(), r"conv_act.0 \(Shifted\): not known, and runs .*constant_pad_nd"),
    "circular": (_convolution(padding_mode="circular"), r"\(Conv2d\): its padding mode is 'circular'"),
    "reflect": (_convolution(padding_mode="reflect"), r"\(Conv2d\): its padding mode is 'reflect'"),
    "dilated": (_convolution(padding=2, dilation=2), r"\(Conv2d\): its dilation is \(2, 2\)"),
    "even": (nn.Conv2d(8, 8, 2, padding="same"), r"\(Conv2d\): its kernel is \(2, 2\)"),
    "transposed": (nn.ConvTranspose2d(8, 8, 3, padding=1), r"\(ConvTranspose2d\): not known"),
    "pooled": (nn.AdaptiveAvgPool2d(8), r"\(AdaptiveAvgPool2d\): not known"),
    "smooth": (nn.Upsample(scale_factor=1, mode="bilinear"), r"\(Upsample\): its mode is 'bilinear'"),
    "instance": (nn.InstanceNorm2d(8), r"\(InstanceNorm2d\): not known"),
}
SERVED = {
    "pointwise": Doubled(),
    "grouped": _convolution(groups=4),
    "wide": _convolution(kernel_size=5, padding=2),
    "in place": nn.SiLU(inplace=True),
}


def replaced(rank: int) -> dict[str, tuple[str, int, float]]:
    """What each VAE with one other layer is refused with, the messages sent before, and how far it is off."""
    found = {}
    for name, layer in [*((name, layer) for name, (layer, _) in REPLACEMENTS.items()), *SERVED.items()]:
        vae, value = prepared(Case((18, 9)))
        torch.manual_seed(0)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0.0, 0.2)
        vae.decoder.conv_act = nn.Sequential(layer)
        message, apart = "", 0.0
        with counted() as seen:
            try:
                result = parallelize_vae(vae, strategy="shard").decode(value).sample
                with torch.no_grad():
                    expected = vae.decode(value).sample
                apart = float((result - expected).abs().max() / expected.abs().max())
            except UnsupportedError as error:
                message = str(error)
        found[name] = (message, len(seen.sent), apart)
    vae, value = prepared(Case((9, 5)))
    vae.decoder.mid_block.attentions[0].set_processor(AttnProcessor())
    with pytest.raises(
        UnsupportedError, match=r"attentions.0 \(Attention\): its processor is a AttnProcessor"
    ):
        parallelize_vae(vae, strategy="shard").decode(value)
    return found | {"without an encoder": half(rank)}


def half(rank: int) -> tuple[str, int, float]:
    """A VAE without its encoder: what encode raises, the messages sent before, how far decode is off."""
    vae, value = prepared(Case((18, 9)))
    vae.encoder = None
    wrapped = parallelize_vae(vae, strategy="shard")
    with torch.no_grad():
        expected = vae.decode(value).sample
    apart = float((wrapped.decode(value).sample - expected).abs().max() / expected.abs().max())
    with counted() as seen, pytest.raises(TypeError) as caught:
        wrapped.encode(value[:, :3])
    return str(caught.value), len(seen.sent), apart


def test_unknown_layers_are_refused_by_name_before_any_message() -> None:
    for found in run_ranks(2, replaced):
        for name, (_, pattern) in REPLACEMENTS.items():
            message, sent, _ = found[name]
            assert re.search(pattern, message), (name, message)
            assert sent == 0, name
        for name in SERVED:
            message, sent, apart = found[name]
            assert not message, (name, message)
            assert sent, name
            assert apart < 2e-5, (name, apart)  # rounding
        message, sent, apart = found["without an encoder"]
        assert "not callable" in message
        assert sent == 0
        assert apart < 2e-5  # rounding
