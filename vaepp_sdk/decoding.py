"""The decode stage: the VAE as the spec wants it, and what it gives on this rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import attrs
import torch

from vaepp_sdk.entries import load_object
from vaepp_sdk.errors import PeerError, UnsupportedError
from vaepp_sdk.idle import IdleModules
from vaepp_sdk.nonfinite import BLACK, bad_region, complain
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.pixels import PixelFinish
from vaepp_sdk.plain import PlainVAE
from vaepp_sdk.registry import Registry
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.stages import PipelineStages, PixelStages
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.descent import OnOom, StepDown
from vaepp_sdk.vae.landing import Piece, ShardedSample
from vaepp_sdk.vae.plan import Box, Output
from vaepp_sdk.vae.wrapper import ParallelVAE
from vaepp_sdk.vae_rules import serves_one_rank

__all__ = ["Decoder", "set_switches"]


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
        vae: the VAE: as it is, or the drop-in that spreads its work.
        rank: this rank in the DiT group.
        output: where pictures land.
        allow_nonfinite: whether values that are not finite are warned of, not refused.
        idle: what can leave the device while the VAE works.
        pixels: what turns decoded pieces into pixels before they travel; None where nothing does.
    """

    vae: PlainVAE | ParallelVAE
    rank: int
    output: Output
    allow_nonfinite: bool
    idle: IdleModules
    pixels: PixelFinish | None = None

    @classmethod
    def build(
        cls,
        pipe: Any,
        stages: PipelineStages,
        resolved: Resolved,
        registry: Registry,
        group: DiTGroup,
        timeout: timedelta,
        progress: Callable[[int, int], None],
        sharers: int,
    ) -> Decoder:
        """Prepare a VAE as a spec wants it; creates no process group.

        Args:
            pipe: the pipeline; the switches of its VAE are set.
            stages: the pipeline's stages.
            resolved: what was decided.
            registry: strategies and VAE classes.
            group: the DiT group.
            timeout: the limit of one wait for other ranks.
            progress: told `(done, total)` as this rank works through its pieces.
            sharers: ranks that share this host's memory.
        """
        vae = pipe.vae
        settings = resolved.spec.vae
        set_switches(vae, resolved.use_tiling, settings.vae_use_slicing)
        # Checked when the spec was loaded, so the name is one of the three.
        output: Output = settings.output  # type: ignore[assignment]
        allowed = resolved.spec.output is not None and resolved.spec.output.allow_nonfinite
        idle = IdleModules(pipe, group.device, sharers)

        def parallel(view: VaeGroup, output: Output) -> ParallelVAE:
            view.progress = progress
            made = _parallel(vae, resolved, registry, view, output)
            made.descent.free_more, made.descent.sharers = idle.park, sharers
            return made

        if resolved.vae_size > 1 or serves_one_rank(settings, resolved.entry, registry):
            view = VaeGroup.over(None, resolved.vae_size, timeout)
            pixels = None
            if isinstance(stages, PixelStages) and output != "sharded":
                pixels = view.finish = PixelFinish(partial(stages.to_pixels, pipe))
            return cls(parallel(view, output), group.rank, output, allowed, idle, pixels)
        # Each rank decodes everything for itself, or the first one does and nobody waits for it.
        everyone = output == "all"
        view = VaeGroup.over(None, 1, timeout) if everyone else VaeGroup(None, 0, 1, 1, timeout)

        def spare() -> ParallelVAE:
            return parallel(view, "all" if everyone else "rank0")

        able = settings.on_oom == "step_down" and _steps_down(vae, resolved, registry)
        return cls(PlainVAE(vae, view, spare if able else None), group.rank, output, allowed, idle)

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
            PeerError: another rank made such values before it sent them on.
        """
        if self.pixels is not None:
            self.pixels.reset()
        if isinstance(self.vae, PlainVAE) and self.output != "all" and self.rank != 0:
            return ()  # one rank does all the VAE's work, so its pictures are nowhere else
        sample = self._sample(latents)
        if self.pixels is not None:
            self._tell_bad(self.pixels)
        if isinstance(sample, ShardedSample):
            pieces = sample.pieces
        else:
            whole = Box(0, 0, sample.shape[-2], sample.shape[-1])
            pieces = (Piece(whole, sample),) if sample.shape[0] else ()
        return pieces if self.pixels else tuple(self._checked(piece) for piece in pieces)

    @property
    def steps_down(self) -> tuple[StepDown, ...]:
        """What the last decode did because a rank's memory was not enough."""
        return self.vae.steps_down

    def _sample(self, latents: torch.Tensor) -> Any:
        if isinstance(self.vae, PlainVAE):
            return self.vae.decode(latents)
        return self.vae.decode(latents, return_dict=False)[0]

    def _tell_bad(self, pixels: PixelFinish) -> None:
        """Where pixels landed, the ranks that made them have looked: tell of the one that made most."""
        assert isinstance(self.vae, ParallelVAE)
        counts = self.vae.descent.group.share(pixels.bad, "values that are not finite")
        maker = max(range(len(counts)), key=counts.__getitem__)
        if not counts[maker]:
            return
        problem = "the picture has values that are not finite (NaN or Inf)"
        if maker == self.rank:
            complain(maker, "decode", f"{problem} in {pixels.region}", allowed=self.allow_nonfinite)
        elif not self.allow_nonfinite:
            raise PeerError(self.rank, [maker], "decode", f"{problem} there")

    def _checked(self, piece: Piece) -> Piece:
        """A piece whose values are all finite: where others are allowed, they are painted black."""
        bad = ~torch.isfinite(piece.tensor)
        if not bool(bad.any()):
            return piece
        maker, windows = self._maker(bad.flatten(0, -3).any(0))
        where = bad_region(bad, piece.box.top, piece.box.left)
        problem = f"the picture has values that are not finite (NaN or Inf) in {where}{windows}"
        complain(maker, "decode", problem, allowed=self.allow_nonfinite)
        return Piece(piece.box, piece.tensor.masked_fill(bad, BLACK))

    def _maker(self, bad: torch.Tensor) -> tuple[int, str]:
        """The rank that computed most of the bad pixels: blending spreads them to its neighbours' windows."""
        made = self.vae.lighter if isinstance(self.vae, PlainVAE) else self.vae
        plan = made.last_plan if made is not None else None
        if plan is None or self.leaves_sharded:
            return self.rank, ""
        found: dict[int, int] = {}
        for window in plan.windows:
            found[window.owner] = found.get(window.owner, 0) + int(bad[window.target.slices].sum())
        maker = max(found, key=lambda rank: found[rank])
        return maker, f", most of them in windows that rank {maker} decoded"


def _parallel(
    vae: Any, resolved: Resolved, registry: Registry, view: VaeGroup, output: Output
) -> ParallelVAE:
    """The drop-in, as the spec and the pipeline's entry want it."""
    pipeline, settings = resolved.entry, resolved.spec.vae
    assert pipeline is not None, "only a pipeline with an entry is decoded apart"
    entry = registry.vae(type(vae))
    pick = pipeline.pick or entry.pick
    chooser = StrategyChooser(registry, settings.strategy, pipeline.strategies, pick, settings.options)
    adapter = load_object(entry.adapter, f"VAE class {entry.name!r}")(vae)
    chooser.check(adapter)
    # Checked when the spec was loaded, so it is one of the two.
    on_oom: OnOom = settings.on_oom  # type: ignore[assignment]
    return ParallelVAE(adapter, view, chooser, output, on_oom=on_oom)


def _steps_down(vae: Any, resolved: Resolved, registry: Registry) -> bool:
    """Whether there are strategies for this VAE that a plain decode could step down to."""
    try:
        registry.vae(type(vae))
    except UnsupportedError:
        return False
    return resolved.entry is not None and bool(resolved.entry.strategies)
