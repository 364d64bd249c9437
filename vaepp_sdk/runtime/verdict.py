"""Which rank failed first, and how to say it: pure, from what is known of every rank."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import attrs

from vaepp_sdk.errors import RankError, VaeppError
from vaepp_sdk.runtime.beats import Beat
from vaepp_sdk.runtime.leaving import GRACE
from vaepp_sdk.runtime.process import Ending
from vaepp_sdk.runtime.records import ErrorRecord
from vaepp_sdk.runtime.stacks import waits_for_peers

__all__ = ["Evidence", "Trigger", "bad_end", "judge", "lingering", "needs_stacks"]


@attrs.frozen
class Evidence:
    """What is known of one rank when a job fails.

    Attributes:
        rank: its number.
        busy: whether it owed an answer.
        beat: its heartbeat.
        record: the error it left, if any.
        ending: how it ended, if it has.
        last_line: the last line it printed.
    """

    rank: int
    busy: bool
    beat: Beat
    record: ErrorRecord | None
    ending: Ending | None
    last_line: str = ""


@attrs.frozen
class Trigger:
    """What was seen first: a rank, and one sentence."""

    rank: int
    what: str


def needs_stacks(ranks: Sequence[Evidence]) -> bool:
    """Whether no rank shows a failure of its own, so that one of the silent ones must be at fault."""
    return not any(_own(one) or _died(one) for one in ranks)


def judge(ranks: Sequence[Evidence], trigger: Trigger, stacks: Mapping[int, str] | None = None) -> VaeppError:
    """The error to raise for a failed job.

    In this order: a rank that is stuck outside any exchange (where stacks were asked for), the earliest error
    that no peer caused, a rank that died without a word, what was seen first.

    Args:
        ranks: evidence of every rank.
        trigger: what was seen first.
        stacks: the stacks of silent ranks, where `needs_stacks`.
    """
    stuck = [one for one in ranks if one.busy and not one.ending and not one.record]
    if stacks is not None:
        alone = [one for one in stuck if not waits_for_peers(stacks.get(one.rank, ""))]
        if alone:
            # A process that does not even answer a signal comes before one that does.
            worst = min(alone, key=lambda one: (bool(stacks.get(one.rank)), one.beat.moved, one.rank))
            return _stuck(worst, trigger, bool(stacks.get(worst.rank)))
    own = sorted((one.record.time, one.rank) for one in ranks if one.record and _own(one))
    if own:
        record = next(one.record for one in ranks if one.rank == own[0][1])
        assert record is not None
        return record.error()
    died = sorted((one.rank != trigger.rank, one.rank) for one in ranks if _died(one))
    if died:
        one = next(one for one in ranks if one.rank == died[0][1])
        last = f"; its last words: {one.last_line}" if one.last_line else ""
        return RankError(one.rank, one.beat.stage, f"{one.ending}{last}")
    return _first_seen(ranks, trigger)


def bad_end(ranks: Sequence[Evidence], late: Container[int]) -> str | None:
    """The first rank that was asked to leave and did not leave in good order.

    Args:
        ranks: evidence of every rank.
        late: those that took too long, and were ended.
    """
    for one in ranks:
        if one.rank in late:
            work = "its work was done, but" if one.beat.done else "it was not done with its work, and"
            what = f"{work} its process did not end"
        elif one.record:
            what = one.record.cause
        elif one.ending is None or not one.ending.may_be_good or not one.beat.done:
            what = str(one.ending)
        else:
            continue
        return f"rank {one.rank} did not end in good order: {what}"
    return None


def lingering(kept: Mapping[str, Sequence[int]]) -> str | None:
    """What kept ranks alive that had done their work.

    Args:
        kept: the ranks, by what kept them.
    """
    if not kept:
        return None
    each = (f"{what} kept rank {' and '.join(map(str, ranks))} alive" for what, ranks in kept.items())
    return f"all work is done, but {'; '.join(each)}; ended after {GRACE:g} s"


def _own(one: Evidence) -> bool:
    return one.record is not None and one.record.kind != "peer"


def _died(one: Evidence) -> bool:
    if one.ending is None or one.record is not None:
        return False
    return one.ending.code != 0 or not one.beat.done


def _stuck(one: Evidence, trigger: Trigger, answers: bool) -> RankError:
    where = f" at step {one.beat.step} of {one.beat.total}" if one.beat.total else ""
    how = "it runs and does not come further" if answers else "its process does not run (stopped or stuck)"
    return RankError(one.rank, one.beat.stage, f"{how}{where}; {trigger.what}")


def _first_seen(ranks: Sequence[Evidence], trigger: Trigger) -> VaeppError:
    one = next(one for one in ranks if one.rank == trigger.rank)
    return one.record.error() if one.record else RankError(one.rank, one.beat.stage, trigger.what)
