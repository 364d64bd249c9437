"""What the tests of `shard` decode and encode, and how far a result may be from the untiled one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest.mock import patch

import attrs
import torch
from counted import Counted, counted
from diffusers import AutoencoderTiny
from vae_models import tiny_flux2, tiny_kl
from vae_zoo import build
from vaepp_plugins import vae_common
from vaepp_strategies.layers.buffers import Buffers

from vaepp_sdk import parallelize_vae
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.landing import ShardedSample
from vaepp_sdk.vae.plan import Output
from vaepp_sdk.vae.trace import LayerTrace, trace_layers

RELATIVE = {torch.float32: 2e-5, torch.float64: 1e-12}
"""Rounding of a few dozen layers, as a share of the largest output; a wrong row or statistic moves 1e-2."""


def tiny_autoencoder(*, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    vae = AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=16, **config
    )
    return torch.nn.Module.to(vae, dtype).eval().requires_grad_(False)


def clip_vae(name: str, dtype: torch.dtype, **config: Any) -> Any:
    """A video VAE whose pictures stay between -1 and 1: clamped ones would hide mistakes.

    Wan is built with 8 channels: normalised over 4, positions of nearly no length would make rounding large.
    """
    vae = build(name, dtype, **config)
    for parameter in vae.decoder.conv_out.parameters():
        parameter.mul_(0.5)
    return vae


BUILDERS: dict[str, Callable[..., Any]] = {
    "kl": tiny_kl,
    "flux2": tiny_flux2,
    "tiny": tiny_autoencoder,
    "dc": lambda dtype, **config: build("AutoencoderDC", dtype, **config),
    "hunyuan image": lambda dtype: build("AutoencoderKLHunyuanImage", dtype),
    "wan": lambda dtype, width=8: clip_vae("AutoencoderKLWan", dtype, width=width),
    "wan 2.2": lambda dtype: clip_vae("AutoencoderKLWan_22", dtype, width=8),
    "qwen": lambda dtype: clip_vae("AutoencoderKLQwenImage", dtype, width=8),
    "hunyuan": lambda dtype: clip_vae("AutoencoderKLHunyuanVideo", dtype),
    "cogvideox": lambda dtype, **config: clip_vae("AutoencoderKLCogVideoX", dtype, **config),
    "mochi": lambda dtype, **config: build("AutoencoderKLMochi", dtype, **config),
    "ltx": lambda dtype, **config: clip_vae("AutoencoderKLLTXVideo", dtype, **config),
    "ltx 2": lambda dtype, **config: clip_vae("AutoencoderKLLTX2Video", dtype, **config),
    "hunyuan 1.5": lambda dtype: clip_vae("AutoencoderKLHunyuanVideo15", dtype),
}


@attrs.frozen
class Case:
    """One decode or encode; `sides` are the input's rows and columns, `frames` a clip's."""

    sides: tuple[int, int]
    frames: int | None = None
    batch: int = 1
    size: int | None = None
    output: Output = "all"
    direction: Literal["decode", "encode"] = "decode"
    vae: str = "kl"
    build: Mapping[str, Any] = attrs.field(factory=dict)
    dtype: torch.dtype = torch.float32
    prepare: str = ""
    active: int | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)
    arguments: Mapping[str, Any] = attrs.field(factory=dict)


def prepared(case: Case) -> tuple[Any, torch.Tensor]:
    """The VAE, alike on every rank, and its input, in whose rows and columns statistics differ."""
    vae = BUILDERS[case.vae](dtype=case.dtype, **case.build)
    if case.prepare:
        getattr(vae, case.prepare)()
    latent = getattr(vae.config, "latent_channels", None) or vae.config.z_dim
    channels = latent if case.direction == "decode" else 3
    torch.manual_seed(7)
    clip = () if case.frames is None else (case.frames,)
    value = torch.randn(case.batch, channels, *clip, *case.sides)
    value = value + torch.linspace(-2, 3, case.sides[0]).view(-1, 1) + torch.linspace(-1, 2, case.sides[1])
    return vae, value.to(case.dtype)


def arguments(case: Case) -> dict[str, Any]:
    """What the VAE takes besides its input."""
    if case.vae == "ltx" and case.direction == "decode" and not case.build:
        return {"temb": torch.linspace(0.02, 0.3, case.batch, dtype=case.dtype)}
    return dict(case.arguments)


TRACES: dict[Any, LayerTrace] = {}
"""What `traced_once` has traced in this process, or was given by another one."""


@contextmanager
def traced_once(case: Case) -> Iterator[None]:
    """Trace the layers of all cases of one VAE once: a trace takes longer than the case itself."""
    vae = (case.vae, str(case.build), case.dtype, case.prepare, str(case.arguments))

    def once(module: Any, run: Callable[..., Any], shape: Sequence[int]) -> LayerTrace:
        key = (*vae, run.__name__, tuple(shape))
        if key not in TRACES:
            TRACES[key] = trace_layers(module, run, shape)
        return TRACES[key]

    with patch.object(vae_common, "trace_layers", once):
        yield


def whole(result: Any) -> Any:
    """The tensor, or the pieces, that a decode or encode returned."""
    for name in ("sample", "latents", "latent"):
        if hasattr(result, name):
            return getattr(result, name)
    posterior = result.latent_dist
    return posterior if isinstance(posterior, ShardedSample) else posterior.parameters


@attrs.frozen(eq=False)
class Expected:
    """The untiled result on one rank and, for low precision, that of the same weights in float64."""

    untiled: torch.Tensor
    exact: torch.Tensor | None


@torch.no_grad()
def expect(case: Case) -> Expected:
    vae, value = prepared(case)
    vae.disable_tiling()
    untiled = whole(getattr(vae, case.direction)(value, **arguments(case)))
    if case.dtype in RELATIVE:
        return Expected(untiled, None)
    vae = torch.nn.Module.to(vae, torch.float64)
    return Expected(untiled, whole(getattr(vae, case.direction)(value.double(), **arguments(case))))


def run_case(rank: int, case: Case, expected: Expected) -> dict[str, Any]:
    """What one rank saw of a case."""
    vae, value = prepared(case)
    wrapped = parallelize_vae(vae, size=case.size, strategy="shard", output=case.output, **case.options)
    told: list[tuple[int, int]] = []
    wrapped._group.progress = lambda done, total: told.append((done, total))
    wrapped._group.traffic.reset()
    with counted() as seen, patch.object(Buffers, "give", spoil), traced_once(case):
        result = whole(getattr(wrapped, case.direction)(value, **arguments(case)))
    plan, traffic = wrapped.last_plan, wrapped._group.traffic
    slices = case.batch if case.prepare == "enable_slicing" else 1
    planned = Counter((move.dst, move.nbytes) for move in plan.moves * slices if move.src == rank)
    steps = len(getattr(plan, "grid", plan).steps)  # several bands on a rank tell of one
    progress = [(done + 1, steps + 1) for done in range(steps + 1)] * slices
    return {
        "landed": landed(rank, case, result, expected.untiled.shape),
        "close": close(result, expected),
        "wire": Counter(seen.sent) == planned,
        "traffic": (traffic.nbytes, traffic.messages) == (slices * plan.bytes_sent(rank), planned.total()),
        "told": told == (progress if plan.owned(rank) else []),
        "reused": reused(case, seen),
        "restored": not any("forward" in vars(module) for module in vae.modules()),
        "no groups": seen.groups == 0,
        "active": case.active in (None, len(plan.windows)),
        "digest": plan.digest,
    }


def reused(case: Case, seen: Counted) -> bool:
    """Whether buffers served more than one message each, where messages are many and bands stay home."""
    few = len(seen.direct) < 50 or case.options.get("deterministic") == "reference"
    # Sums of linear attention are tiny, and each has memory of its own: many, where there are many bands.
    few = few or (case.vae == "dc" and "row_blocks" in case.options)
    return few or 2 * seen.buffers < len(seen.direct)


give = Buffers.give


def spoil(buffers: Buffers, taken: Sequence[torch.Tensor]) -> None:
    """Take back buffers and spoil what is in them: whoever still reads it would see."""
    for buffer in taken:
        buffer.fill_(255)  # NaN in every dtype
    give(buffers, taken)


def landed(rank: int, case: Case, result: Any, shape: torch.Size) -> bool:
    """Whether this rank got what the case's output says."""
    if case.output == "sharded":
        return isinstance(result, ShardedSample) and result.shape == tuple(shape)
    here = case.output == "all" or rank == 0
    return bool(result.shape == (shape if here else (0, *shape[1:])) and result.dtype == case.dtype)


def close(result: Any, expected: Expected) -> bool:
    """Whether what a rank holds is equal to the untiled result up to rounding."""
    if isinstance(result, ShardedSample):
        return all(close_at(piece.tensor, expected, piece.box.slices) for piece in result.pieces)
    return result.shape[0] == 0 or close_at(result, expected, (slice(None), slice(None)))


def close_at(found: torch.Tensor, expected: Expected, where: tuple[slice, slice]) -> bool:
    """Whether the rows and columns `where` of a result are equal to the untiled ones up to rounding."""
    untiled = expected.untiled[(..., *where)]
    if expected.exact is None:
        limit = RELATIVE[untiled.dtype] * max(1.0, float(expected.untiled.abs().max()))
        return float((found - untiled).abs().max()) <= limit
    exact = expected.exact[(..., *where)]
    mine, theirs = (found.double() - exact).abs(), (untiled.double() - exact).abs()
    # Both are noise of the dtype: equal on average; the largest of some thousand values varies more.
    return bool(mine.mean() <= 1.1 * theirs.mean() and mine.max() <= 1.5 * theirs.max())


def run_cases(
    rank: int, cases: list[Case], expected: list[Expected], traces: dict[Any, LayerTrace]
) -> tuple[list[dict[str, Any]], dict[Any, LayerTrace]]:
    TRACES.update(traces)
    reports = [run_case(rank, case, one) for case, one in zip(cases, expected, strict=True)]
    return reports, TRACES if rank == 0 else {}


def check_cases(world_size: int, cases: list[Case]) -> None:
    """Run all cases in one launch and assert every rank's report.

    Each rank traces what no launch before it has traced; equal digests of plans show equal traces.
    """
    expected = [expect(case) for case in cases]
    by_rank = run_ranks(world_size, run_cases, cases, expected, TRACES, timeout=600)
    TRACES.update(by_rank[0][1])
    for case, reports in zip(cases, zip(*(found for found, _ in by_rank), strict=True), strict=True):
        assert len({report.pop("digest") for report in reports}) == 1, case
        for rank, report in enumerate(reports):
            assert all(report.values()), (rank, case, report)
