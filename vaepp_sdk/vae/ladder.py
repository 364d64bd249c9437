"""The ways down from a plan that is too large: pure arithmetic on plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from vaepp_sdk.entries import Rung
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.plan import Work, WorkPlan
from vaepp_sdk.vae.strategy import Strategy

__all__ = ["MAX_ATTEMPTS", "Ladder", "Step"]

MAX_ATTEMPTS = 3
"""How often one call is tried: as it was asked for, with at most half of that, and as light as can be."""


@attrs.frozen(eq=False)
class Step:
    """One way to do a call's work.

    Attributes:
        rung: the strategy and its options.
        images: how many pictures of the batch are worked on at a time.
        batch: how many it has.
        plan: the plan for so many pictures.
        asked: whether it is what was asked for.
    """

    rung: Rung
    images: int
    batch: int
    plan: WorkPlan
    asked: bool = False

    def peak(self, ranks: Sequence[int] | None = None) -> int:
        """The busiest rank's predicted bytes, of all ranks or of some; 0 where they are not known.

        Ranks that only help the result land have no estimate of their own: for them alone, all count.
        """
        peaks = self.plan.peak_bytes
        chosen = range(len(peaks)) if ranks is None else [rank for rank in ranks if rank < len(peaks)]
        return max((peaks[rank] for rank in chosen or range(len(peaks))), default=0)

    @property
    def key(self) -> tuple[str, int]:
        """Equal for steps that do the same."""
        return self.plan.digest, self.images

    def fits(self, rooms: Sequence[int | None]) -> bool:
        """Whether every rank has room for its own predicted peak; None where nobody can tell."""
        return not self.short_of(rooms)

    def short_of(self, rooms: Sequence[int | None]) -> tuple[int, ...]:
        """The ranks that have less room than their predicted peak."""
        pairs = enumerate(zip(self.plan.peak_bytes, rooms, strict=False))
        return tuple(rank for rank, (peak, free) in pairs if free is not None and peak > free)

    def __str__(self) -> str:
        options = ", ".join(f"{name} = {value}" for name, value in self.rung.options.items())
        found = f"strategy '{self.rung.strategy}'" + (f" ({options})" if options else "")
        few = self.images < self.batch
        return f"{found}, {self.images} of {self.batch} pictures at a time" if few else found


@attrs.frozen(eq=False)
class Ladder:
    """Every step for one call, from the one that was asked for downwards.

    Each is planned when it is looked at, and left out where it cannot be.

    Attributes:
        chooser: strategies by name.
        adapter: the VAE's adapter.
        facts: the VAE's facts.
        work: the whole batch.
        images: how many pictures are worked on at a time at the top.
    """

    chooser: StrategyChooser
    adapter: VaeAdapter
    facts: VaeFacts
    work: Work
    images: int

    def top(self) -> Step:
        """What was asked for.

        Raises:
            UnsupportedError: it cannot be done.
        """
        work = self._part(self.images)
        plan = self.chooser.plan(self.adapter, self.facts, work)[1]
        return Step(self.chooser.top(self.facts, work), self.images, self.work.shape[0], plan, asked=True)

    def planned(self, step: Step, images: int) -> tuple[Strategy[Any], WorkPlan]:
        """The strategy of a step, and its plan for so many pictures.

        Raises:
            UnsupportedError: it cannot be done.
        """
        if step.asked:
            return self.chooser.plan(self.adapter, self.facts, self._part(images))
        return self.chooser.plan_rung(step.rung, self.adapter, self.facts, self._part(images))

    def below(self) -> Iterator[Step]:
        """Every step below the top, in the order in which the strategies name them; then fewer pictures."""
        top = self.top()
        lowest = top.rung
        for rung in self.chooser.lighter(top.rung, self.facts, self._part(self.images)):
            step = self._step(rung, self.images)
            if step is not None:
                lowest = rung
                yield step
        images = self.images
        while images > 1:
            images = -(-images // 2)
            step = self._step(lowest, images)
            if step is not None:
                yield step

    def next(self, tried: Sequence[Step], ranks: Sequence[int]) -> Step | None:
        """The step to try after those that failed, never one that was tried.

        The second attempt takes the first step that needs at most half, the third the lightest there is, even
        where estimates say that it is no lighter.

        Args:
            tried: every step so far.
            ranks: those whose memory was not enough for the last one.
        """
        if len(tried) >= MAX_ATTEMPTS:
            return None
        limit = tried[-1].peak(ranks)
        seen = {step.key for step in tried}
        left = [step for step in self.below() if step.key not in seen]
        half = [step for step in left if 2 * step.peak(ranks) <= limit]
        if half and len(tried) + 1 < MAX_ATTEMPTS:
            return half[0]
        # Of equals the lowest: what a step does not change, such as the picture that lands, hides the rest.
        return min(reversed(left), key=lambda step: step.peak(ranks), default=None)

    def fitting(self, rooms: Sequence[int | None]) -> Step:
        """The first step whose predicted peak every rank has room for; the lightest where none is.

        Args:
            rooms: each rank's free bytes; None where nobody can tell.
        """
        top = self.top()
        if top.fits(rooms):
            return top
        below = list(self.below())
        found = next((step for step in below if step.fits(rooms)), None)
        return found or min([top, *below], key=Step.peak)

    def _step(self, rung: Rung, images: int) -> Step | None:
        try:
            plan = self.chooser.plan_rung(rung, self.adapter, self.facts, self._part(images))[1]
        except UnsupportedError:
            return None
        return Step(rung, images, self.work.shape[0], plan)

    def _part(self, images: int) -> Work:
        return attrs.evolve(self.work, shape=(images, *self.work.shape[1:]))
