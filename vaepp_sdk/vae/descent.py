"""Runs a call's VAE work; where a rank's memory is not enough, all ranks step down together and try again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import attrs
import torch

from vaepp_sdk.errors import PeerError, RankError, VaeppWarning
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.facts import Direction, VaeFacts
from vaepp_sdk.vae.ladder import Ladder, Step
from vaepp_sdk.vae.landing import Landed
from vaepp_sdk.vae.ledger import Ledger
from vaepp_sdk.vae.memory import is_out_of_memory, release, room
from vaepp_sdk.vae.plan import Output, Work, WorkPlan

__all__ = ["Descent", "OnOom", "StepDown", "nothing_to_free"]

OnOom = Literal["step_down", "fail"]
"""What happens where a rank's memory is not enough."""

PlannedT = TypeVar("PlannedT")

_DONE, _OUT_OF_MEMORY, _FAILED = range(3)


@attrs.frozen
class StepDown:
    """One step down.

    Attributes:
        ranks: the ranks whose memory was not enough.
        predicted: whether that was foreseen, rather than found out.
        before: what was too large.
        after: what was done instead.
    """

    ranks: tuple[int, ...]
    predicted: bool
    before: str
    after: str

    def __str__(self) -> str:
        ranks = _ranks(self.ranks)
        found = "would not have enough memory" if self.predicted else "ran out of memory"
        return f"{ranks} {found} with {self.before}; going on with {self.after}"


def nothing_to_free() -> None:
    """No memory that could be given back."""


def _unheard(planned: WorkPlan | Exception, value: torch.Tensor | None) -> None:
    """A plan that nobody waits for."""


@attrs.define(eq=False)
class Descent:
    """The way down of one parallel VAE, alike on every rank of the DiT group.

    Every rank tries its part. A rank that fails frees what it holds and plays the rest of its part with
    nothing in it (see `Ledger`), so that all ranks come to the end of the plan. There they tell each other
    who failed, and all take the same step down, because each works it out from the same facts.

    Attributes:
        group: the VAE's view of the DiT group.
        chooser: strategies.
        output: where results land.
        on_oom: whether to step down, or to fail on all ranks alike.
        free_more: frees what the VAE does not need, such as a transformer that waits; called on every rank.
        on_plan: told of each plan before its first message, on every rank, and the first time of what it is
            for; or of the error that kept this rank from a plan.
        sharers: ranks that share this host's memory.
        failed_before: the ranks on which what was asked for has failed already, outside of this; where there
            are any, it is not tried again.
        steps: the steps down that the last call took, or took over from an earlier one of its kind.
        plan: the plan that served the last call, of its last pictures.
    """

    group: VaeGroup
    chooser: StrategyChooser
    output: Output
    on_oom: OnOom = "step_down"
    free_more: Callable[[], None] = nothing_to_free
    on_plan: Callable[[WorkPlan | Exception, torch.Tensor | None], None] = _unheard
    sharers: int = 1
    failed_before: tuple[int, ...] = ()
    steps: tuple[StepDown, ...] = ()
    plan: WorkPlan | None = None
    _settled: dict[tuple[VaeFacts, Work], tuple[Step, tuple[StepDown, ...]]] = attrs.field(
        factory=dict, init=False
    )
    _idle_told: set[int] = attrs.field(factory=set, init=False)

    def run(self, adapter: VaeAdapter, direction: Direction, value: torch.Tensor) -> list[Landed]:
        """Decode or encode; returns what landed of each part of the batch.

        Raises:
            UnsupportedError: this work cannot be done; on every rank alike.
            RankError: a rank's memory is not enough for any step, or none may be taken; on every rank alike.
            PeerError: a rank is gone, or did not answer in time.
        """
        ladder = self.planned(lambda: self._ladder(adapter, direction, value))
        key = (ladder.facts, ladder.work)
        if key in self._settled:
            step, self.steps = self._settled[key]
            tried: list[Step] = []
        else:
            step, tried = self._first(ladder, value.device)
        while True:
            landed, failed = self._attempt(ladder, step, value, again=bool(tried))
            if not failed:
                self._settled[key] = (step, self.steps)
                self._tell_idle(step.plan)
                return landed
            tried.append(step)
            step = self._lower(ladder, tried, failed)

    def _tell_idle(self, plan: WorkPlan) -> None:
        """Say that ranks had nothing to do, as where a picture is smaller than a tile; for so many once."""
        idle = sorted(set(range(plan.work.ranks)) - {window.owner for window in plan.windows})
        if self.group.rank or not idle or len(idle) in self._idle_told:
            return
        self._idle_told.add(len(idle))
        pieces = f"{len(plan.windows)} piece{'s' if len(plan.windows) > 1 else ''}"
        had = f"{_ranks(idle)} {'have' if len(idle) > 1 else 'has'} nothing to do"
        unit = "latents" if plan.work.direction == "decode" else "pixels"
        size = f"{plan.work.shape[-2]} x {plan.work.shape[-1]} {unit}"
        fix = "smaller pieces, another strategy or fewer ranks for the VAE would suit this size"
        warnings.warn(
            f"{plan.work.direction} of {size}: strategy '{plan.strategy}' makes {pieces}, so {had}; {fix}",
            VaeppWarning,
            stacklevel=2,
        )

    def _ladder(self, adapter: VaeAdapter, direction: Direction, value: torch.Tensor) -> Ladder:
        # What stays where it is need not be made smaller.
        finish = self.group.finish if direction == "decode" and self.output != "sharded" else None
        work = Work(
            direction=direction,
            shape=tuple(value.shape),
            itemsize=value.element_size(),
            ranks=self.group.size,
            world_size=self.group.world_size,
            output=self.output,
            landed_itemsize=None if finish is None else finish.dtype.itemsize,
        )
        images = 1 if adapter.vae.use_slicing else value.shape[0]
        return Ladder(self.chooser, adapter, adapter.facts(), work, images)

    def planned(self, plan: Callable[[], PlannedT]) -> PlannedT:
        """Do what comes before a plan's messages; an error is told to the ranks that had none, and raised."""
        try:
            return plan()
        except Exception as error:
            self.on_plan(error, None)
            raise

    def _first(self, ladder: Ladder, device: torch.device) -> tuple[Step, list[Step]]:
        """The step to begin with, and those that have failed before."""
        self.steps = ()
        top = self.planned(ladder.top)
        self.on_plan(top.plan, None)  # the other ranks may not have come so far: they would wait in vain
        if self.failed_before:
            return self._lower(ladder, [top], dict.fromkeys(self.failed_before, "")), [top]
        if self.on_oom == "fail":
            return top, []
        return self._foreseen(ladder, top, device), []

    def _foreseen(self, ladder: Ladder, top: Step, device: torch.device) -> Step:
        """The first step that every rank has room for."""
        rooms = self._rooms(device)
        if top.fits(rooms):
            return top
        self.free_more()
        rooms = self._rooms(device)
        step = self.planned(lambda: ladder.fitting(rooms))
        if step.key == top.key:
            return top
        return self._noted(top, step, top.short_of(rooms), predicted=True)

    def _rooms(self, device: torch.device) -> list[int | None]:
        mine = room(device, self.sharers)
        shared = self.group.share(-1 if mine is None else mine, "free memory")
        return [None if free < 0 else free for free in shared]

    def _attempt(
        self, ladder: Ladder, step: Step, value: torch.Tensor, *, again: bool
    ) -> tuple[list[Landed], dict[int, str]]:
        """Try one step: what landed, and the ranks whose memory was not enough, each with what it said."""
        landed: list[Landed] = []
        for part in value.split(step.images):
            found, error = self._part(ladder, step, part, again=again)
            flags = self.group.share(_flag(error), "whether the other ranks have done their parts")
            self._raise_failure(error, flags, ladder.work.direction)
            failed = {rank: "" for rank, flag in enumerate(flags) if flag == _OUT_OF_MEMORY}
            if failed:
                return [], failed | ({self.group.rank: _words(error)} if error else {})
            assert found is not None
            landed.append(found)
        return landed, {}

    def _raise_failure(self, error: Exception | None, flags: Sequence[int], direction: Direction) -> None:
        """Raise an error that is no lack of memory: on its rank as it is, on all others as a peer's."""
        if _flag(error) == _FAILED:
            assert error is not None
            raise error
        broken = [rank for rank, flag in enumerate(flags) if flag == _FAILED]
        if broken:
            cause = "it raised an error, which is told there; nothing is left of its messages"
            raise PeerError(self.group.rank, broken, direction, cause)

    def _part(
        self, ladder: Ladder, step: Step, part: torch.Tensor, *, again: bool
    ) -> tuple[Landed | None, Exception | None]:
        """This rank's share of some pictures, or its error once its messages are played out."""
        strategy, plan = self.planned(lambda: ladder.planned(step, part.shape[0]))
        self.plan = plan
        # Looking at the input once more would need memory where there was none.
        self.on_plan(plan, None if again else part)
        run: Callable[..., Landed] = strategy.decode if plan.work.direction == "decode" else strategy.encode
        ledger = Ledger(plan.moves, self.group.rank)
        self.group.watch = ledger
        try:
            return run(ladder.adapter, part, self.group, plan), None
        except PeerError:
            raise
        except Exception as error:
            if not ledger.exact:
                raise
            found = error
            if is_out_of_memory(error):
                # Its traceback holds the tensors that memory is needed for.
                found = error.with_traceback(None)
                found.__context__ = found.__cause__ = None
        finally:
            self.group.watch = None
        release(part.device)
        ledger.play_out(self.group, part.device)
        return None, found

    def _lower(self, ladder: Ladder, tried: Sequence[Step], failed: dict[int, str]) -> Step:
        ranks = tuple(failed)
        lower = self.planned(lambda: ladder.next(tried, ranks)) if self.on_oom == "step_down" else None
        if lower is None:
            raise RankError(ranks[0], ladder.work.direction, self._why(tried, failed))
        self.free_more()
        return self._noted(tried[-1], lower, ranks, predicted=False)

    def _why(self, tried: Sequence[Step], failed: dict[int, str]) -> str:
        said = next((words for words in failed.values() if words), "another rank has its words")
        ways = "; ".join(str(step) for step in tried[1 if self.failed_before else 0 :]) or "the VAE as it is"
        if self.on_oom == "fail":
            return f"out of memory with {ways}, and [vae] on_oom is 'fail' ({said})"
        where = _ranks(tuple(failed))
        return f"out of memory on {where} with each of: {ways}; there is nothing lighter ({said})"

    def _noted(self, before: Step, after: Step, ranks: tuple[int, ...], *, predicted: bool) -> Step:
        """Note one step down, and say it once."""
        asked = "the VAE as it is" if self.failed_before and before.asked else str(before)
        step = StepDown(ranks, predicted, asked, str(after))
        self.steps = (*self.steps, step)
        if self.group.rank == 0:
            promise = self.chooser.registry.strategy(after.rung.strategy).promise
            changed = f"; its promise: {promise}" if after.rung.strategy != before.rung.strategy else ""
            warnings.warn(f"{after.plan.work.direction}: {step}{changed}", VaeppWarning, stacklevel=2)
        return after


def _flag(error: Exception | None) -> int:
    """What other ranks are told of this one's part."""
    if error is None:
        return _DONE
    return _OUT_OF_MEMORY if is_out_of_memory(error) else _FAILED


def _words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in ranks)}"
