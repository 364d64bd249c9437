"""Random stacks of layers, sharded on real ranks, against the stack itself."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from vaepp_strategies.shard_run import ShardStrategy

from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import Direction, VaeFacts
from vaepp_sdk.vae.plan import Work
from vaepp_sdk.vae.trace import trace_layers

WIDTH = 8
UP = ("up", "up block", "up bare")
DOWN = ("down", "down block")
LEVEL = (
    "conv3",
    "conv5",
    "conv1",
    "grouped",
    "norm",
    "silu",
    "relu in place",
    "resnet",
    "attention",
    "heads",
)


def layer(kind: str) -> nn.Module:
    """One layer of a stack, all of one width."""
    made: dict[str, Any] = {
        "conv3": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        "conv5": lambda: nn.Conv2d(WIDTH, WIDTH, 5, padding=2, bias=False),
        "conv1": lambda: nn.Conv2d(WIDTH, WIDTH, 1),
        "grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4),
        "norm": lambda: nn.GroupNorm(2, WIDTH),
        "silu": nn.SiLU,
        "relu in place": lambda: nn.ReLU(inplace=True),
        "resnet": lambda: ResnetBlock2D(in_channels=WIDTH, temb_channels=None, groups=4),
        "attention": lambda: _attention(1),
        "heads": lambda: _attention(2),
        "up": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
        "up block": lambda: Upsample2D(WIDTH, use_conv=True),
        "up bare": lambda: Upsample2D(WIDTH),
        "down": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2),
        "down block": lambda: Downsample2D(WIDTH, use_conv=True, padding=0),
    }
    built: nn.Module = made[kind]()
    return built


def _attention(heads: int) -> Attention:
    return Attention(
        WIDTH,
        heads=heads,
        dim_head=WIDTH // heads,
        norm_num_groups=2,
        residual_connection=True,
        bias=True,
        _from_deprecated_attn_block=True,
    )


class Residual(nn.Module):
    """A branch added to its input: a tensor that comes from no layer, and one that two layers read."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.branch = nn.ModuleList(map(called_once, kinds))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result = value.clone()
        for part in self.branch:
            result = part(result)
        return value + result


class Reader(nn.Module):
    """A resnet block is called with a second argument."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.block = block

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.block(value, None)
        return result


def called_once(kind: str) -> nn.Module:
    made = layer(kind)
    return Reader(made) if isinstance(made, ResnetBlock2D) else made


@attrs.frozen
class Stack:
    """Layers, innermost tuples in a residual branch, and an input for them."""

    kinds: tuple[str | tuple[str, ...], ...]
    sides: tuple[int, int]
    batch: int
    ranks: int
    direction: Direction
    seed: int

    def build(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        made = [called_once(kind) if isinstance(kind, str) else Residual(kind) for kind in self.kinds]
        stack = nn.Sequential(*made).double().eval().requires_grad_(False)
        for parameter in stack.parameters():
            nn.init.normal_(parameter, 0.3, 0.5 / math.sqrt(max(1, parameter.numel() // WIDTH)))
        return stack


class StackAdapter(VaeAdapter):
    """Treats a stack as the decoder or the encoder of a VAE."""

    def __init__(self, stack: nn.Module, factor: int) -> None:
        self.vae = stack
        trace = trace_layers(stack, self.decode_window, (1, WIDTH, 8 * factor, 8 * factor))
        self._facts = VaeFacts(
            vae_class="Stack",
            spatial_ratio=factor,
            latent_channels=WIDTH,
            picture_channels=WIDTH,
            moment_channels=WIDTH,
            use_tiling=False,
            picture_layers=lambda _: trace,
        )

    def facts(self) -> VaeFacts:
        return self._facts

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.vae(latent.clone())
        return result

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        return self.decode_window(picture)

    def wrap_decode(self, sample: Any, return_dict: bool) -> Any:
        raise NotImplementedError

    def wrap_encode(self, moments: Any, return_dict: bool) -> Any:
        raise NotImplementedError


LEVELS = st.lists(
    st.one_of(st.sampled_from(LEVEL), st.tuples(*[st.sampled_from(LEVEL[:8])] * 2)), min_size=1, max_size=4
)


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    direction: Direction = draw(st.sampled_from(["decode", "encode"]))
    scales = draw(st.lists(st.sampled_from(UP if direction == "decode" else DOWN), max_size=2))
    kinds: list[str | tuple[str, ...]] = list(draw(LEVELS))
    for scale in scales:
        kinds += [scale, *draw(LEVELS)]
    unit = 1 if direction == "decode" else 2 ** len(scales)
    sides = draw(st.tuples(st.integers(1, 14), st.integers(1, 14)))
    return Stack(
        kinds=tuple(kinds),
        sides=(sides[0] * unit, sides[1] * unit),
        batch=draw(st.integers(1, 2)),
        ranks=draw(st.integers(2, 4)),
        direction=direction,
        seed=draw(st.integers(0, 99)),
    )


@torch.no_grad()
def run_stacks(rank: int, cases: list[Stack]) -> list[tuple[float, bool, int]]:
    """By stack: the largest difference, whether the wire carried what was planned, and the ranks at work."""
    found = []
    for case in cases:
        stack = case.build()
        scales = sum(kind in UP + DOWN for kind in case.kinds)
        adapter = StackAdapter(stack, 2**scales)
        torch.manual_seed(case.seed)
        value = torch.randn(case.batch, WIDTH, *case.sides, dtype=torch.float64)
        strategy, group = ShardStrategy(), VaeGroup.over(None, case.ranks)
        strategy.check(adapter)
        shape = tuple(value.shape)
        work = Work(
            direction=case.direction, shape=shape, itemsize=8, ranks=case.ranks, world_size=4, output="all"
        )
        plan = strategy.plan(adapter.facts(), work)
        run = strategy.decode if case.direction == "decode" else strategy.encode
        result = run(adapter, value, group, plan).sample
        expected = adapter.decode_window(value)
        assert result is not None
        sent = sum(move.src == rank for move in plan.moves)
        wire = (group.traffic.messages, group.traffic.nbytes) == (sent, plan.bytes_sent(rank))
        apart = float((result - expected).abs().max() / max(1.0, float(expected.abs().max())))
        found.append((apart, wire, len(plan.windows)))
    return found


def test_any_stack_gives_its_own_result() -> None:
    cases: list[Stack] = []

    @settings(
        max_examples=60,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(stacks())
    def collect(case: Stack) -> None:
        cases.append(case)

    collect()
    results = run_ranks(4, run_stacks, cases, timeout=600)
    for case, reports in zip(cases, zip(*results, strict=True), strict=True):
        for rank, (apart, wire, _) in enumerate(reports):
            # Float64 rounding of up to a dozen layers.
            assert apart <= 1e-12, (rank, case, apart)
            assert wire, (rank, case)
    assert sum(reports[2] > 1 for reports in results[0]) > len(cases) // 2
