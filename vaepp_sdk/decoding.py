"""The decode stage: the VAE as the spec wants it, and what it gives on this rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import attrs
import torch

from vaepp_sdk.entries import load_object
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.nonfinite import bad_region, complain
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.registry import Registry
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.landing import Piece, ShardedSample
from vaepp_sdk.vae.plan import Box, Output
from vaepp_sdk.vae.wrapper import ParallelVAE
from vaepp_sdk.vae_rules import serves_one_rank

__all__ = ["Decoder", "set_switches"]

_BLACK = -1.0
"""The darkest value a VAE of diffusers gives."""


def set_switches(vae: Any, use_tiling: bool | None, use_slicing: bool) -> None:
    """Set a VAE's own switches as the spec has them.

    Raises:
        UnsupportedError: the class has no such switch.
    """
    wanted = {"use_tiling": use_tiling, "use_slicing": use_slicing or None}
    for name, value in wanted.items():
        if value is None:
            continue
        if not hasattr(vae, name):
            raise UnsupportedError(f"vae_{name} is set and {type(vae).__name__} cannot do it; leave it out")
        setattr(vae, name, value)


@attrs.define(eq=False)
class Decoder:
    """Decodes latents that all ranks of the DiT group hold.

    Attributes:
        vae: the VAE: the plain one, or the drop-in that spreads its work.
        rank: this rank in the DiT group.
        output: where pictures land.
        allow_nonfinite: whether values that are not finite are warned of, not refused.
    """

    vae: Any
    rank: int
    output: Output
    allow_nonfinite: bool = False

    @classmethod
    def build(
        cls,
        vae: Any,
        resolved: Resolved,
        registry: Registry,
        group: DiTGroup,
        timeout: timedelta,
        progress: Callable[[int, int], None],
    ) -> Decoder:
        """Prepare a VAE as a spec wants it; creates no process group.

        Args:
            vae: the pipeline's VAE; its switches are set.
            resolved: what was decided.
            registry: strategies and VAE classes.
            group: the DiT group.
            timeout: the limit of one wait for other ranks.
            progress: told `(done, total)` as this rank works through its pieces.
        """
        settings = resolved.spec.vae
        set_switches(vae, resolved.use_tiling, settings.vae_use_slicing)
        # Checked when the spec was loaded, so the name is one of the three.
        output: Output = settings.output  # type: ignore[assignment]
        alone = serves_one_rank(settings, resolved.entry, registry)
        if (resolved.vae_size > 1 or alone) and resolved.entry is not None:
            entry = registry.vae(type(vae))
            chooser = StrategyChooser(
                registry,
                settings.strategy,
                resolved.entry.strategies,
                resolved.entry.pick or entry.pick,
                settings.options,
            )
            adapter = load_object(entry.adapter, f"VAE class {entry.name!r}")(vae)
            view = VaeGroup.over(None, resolved.vae_size, timeout)
            view.progress = progress
            vae = ParallelVAE(adapter, view, chooser, output)
        allowed = resolved.spec.output is not None and resolved.spec.output.allow_nonfinite
        return cls(vae, group.rank, output, allowed)

    @property
    def leaves_sharded(self) -> bool:
        """Whether each rank keeps its own rectangles of the pictures."""
        return isinstance(self.vae, ParallelVAE) and self.output == "sharded"

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> tuple[Piece, ...]:
        """Decode, and check what came out.

        Args:
            latents: as the pipeline gives them to `vae.decode`, the same on every rank.

        Returns:
            What landed on this rank: one piece that is the whole picture, this rank's own rectangles where
            the output stays sharded, or nothing.

        Raises:
            RankError: values that are not finite; names the rank that computed them and the region.
        """
        if not isinstance(self.vae, ParallelVAE) and self.output != "all" and self.rank != 0:
            return ()  # one rank does all the VAE's work, so its pictures are nowhere else
        sample = self.vae.decode(latents, return_dict=False)[0]
        if isinstance(sample, ShardedSample):
            pieces = sample.pieces
        else:
            whole = Box(0, 0, sample.shape[-2], sample.shape[-1])
            pieces = (Piece(whole, sample),) if sample.shape[0] else ()
        return tuple(self._checked(piece) for piece in pieces)

    def _checked(self, piece: Piece) -> Piece:
        """A piece whose values are all finite: where others are allowed, they are painted black."""
        bad = ~torch.isfinite(piece.tensor)
        if not bool(bad.any()):
            return piece
        maker, windows = self._maker(bad.flatten(0, -3).any(0))
        where = bad_region(bad, piece.box.top, piece.box.left)
        problem = f"the picture has values that are not finite (NaN or Inf) in {where}{windows}"
        complain(maker, "decode", problem, allowed=self.allow_nonfinite)
        return Piece(piece.box, piece.tensor.masked_fill(bad, _BLACK))

    def _maker(self, bad: torch.Tensor) -> tuple[int, str]:
        """The rank that computed most of the bad pixels: blending spreads them to its neighbours' windows."""
        plan = self.vae.last_plan if isinstance(self.vae, ParallelVAE) else None
        if plan is None or self.leaves_sharded:
            return self.rank, ""
        found: dict[int, int] = {}
        for window in plan.windows:
            found[window.owner] = found.get(window.owner, 0) + int(bad[window.target.slices].sum())
        maker = max(found, key=lambda rank: found[rank])
        return maker, f", most of them in windows that rank {maker} decoded"
