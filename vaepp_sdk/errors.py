"""The exception tree.

* VaeppError
    * UserError             the user's mistake: exit code 2, one message, no traceback
        * SpecError         one or more faults in a spec or a request, each with its path
        * PluginError       a plugin that cannot be used, named
        * UnsupportedError  a model, layer or layout that is known and not supported
        * OutputError       a place that cannot be written, or a file that would be overwritten
    * RunError              the run failed: exit code 1
        * RankError         one rank failed; names rank, stage and cause
        * RequestError      one request failed on all ranks alike, and they are ready for others
        * PeerError         a wait for another rank ended without it; names the peers
        * AgreementError    ranks that must agree do not; names both sides

`VaeppWarning` is the category of every warning vaepp gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

__all__ = [
    "AgreementError",
    "Fault",
    "OutputError",
    "PeerError",
    "PluginError",
    "RankError",
    "RequestError",
    "RunError",
    "SpecError",
    "UnsupportedError",
    "UserError",
    "VaeppError",
    "VaeppWarning",
    "is_check",
]


class VaeppError(Exception):
    """Base of every error vaepp raises on purpose.

    Attributes:
        exit_code: what `vaepp-run` exits with when this error reaches it.
    """

    exit_code = 1


class UserError(VaeppError):
    """Something the user asked for cannot be done; the message says what would work."""

    exit_code = 2


@attrs.frozen
class Fault:
    """One thing wrong with a spec.

    Attributes:
        path: where, as in `$.parallel.tensor_parallel_size`.
        found: what was found there.
        fix: what would work.
    """

    path: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: {self.found}; {self.fix}"


class SpecError(UserError):
    """A spec or request that cannot be run, with every fault found in it.

    Args:
        faults: at least one fault.
        source: the file or object the spec came from, for the first line of the message.
    """

    def __init__(self, faults: Iterable[Fault], source: str = "the spec") -> None:
        self.faults: tuple[Fault, ...] = tuple(faults)
        self.source = source
        noun = "fault" if len(self.faults) == 1 else "faults"
        lines = [f"{source}: {len(self.faults)} {noun}", *(f"  {fault}" for fault in self.faults)]
        super().__init__("\n".join(lines))


class PluginError(UserError):
    """A plugin that cannot be loaded or registered.

    Args:
        plugin: the entry-point name, with its distribution where known.
        problem: what is wrong and what would work.
    """

    def __init__(self, plugin: str, problem: str) -> None:
        self.plugin = plugin
        super().__init__(f"plugin {plugin}: {problem}")


class UnsupportedError(UserError):
    """A model, layer or layout that vaepp knows it cannot serve; the message names what it can."""


class OutputError(UserError):
    """An output that cannot be written, or that would replace an existing file."""


class RunError(VaeppError):
    """A run that started and failed."""


class RankError(RunError):
    """One rank failed.

    Args:
        rank: the rank whose failure came first.
        stage: the stage it was in.
        cause: one line saying what happened there.
        harmless: whether it was a check that failed, before the stage exchanged anything with other ranks.
    """

    def __init__(self, rank: int, stage: str, cause: str, *, harmless: bool = False) -> None:
        self.rank = rank
        self.stage = stage
        self.cause = cause
        self.harmless = harmless
        super().__init__(f"rank {rank} failed in stage {stage}: {cause}")


class RequestError(RunError):
    """A request failed where ranks exchanged nothing: it fails alone, and the ranks are ready for others.

    Args:
        stage: the stage.
        cause: one line saying what happened there.
        rank: the one rank where it failed, or None where all ranks say the same.
    """

    def __init__(self, stage: str, cause: str, rank: int | None = None) -> None:
        self.stage = stage
        self.cause = cause
        self.rank = rank
        who = "the request" if rank is None else f"rank {rank}"
        super().__init__(f"{who} failed in stage {stage}, and the ranks are ready for others: {cause}")


class PeerError(RunError):
    """A wait for other ranks ended without them.

    Args:
        rank: the rank that waited.
        peers: the ranks it waited for.
        what: the exchange, as in `tile seam, round 2`.
        cause: why the wait ended.
    """

    def __init__(self, rank: int, peers: Sequence[int], what: str, cause: str) -> None:
        self.rank = rank
        self.peers = tuple(peers)
        self.what = what
        self.cause = cause
        names = ", ".join(str(peer) for peer in self.peers)
        noun = "rank" if len(self.peers) == 1 else "ranks"
        super().__init__(f"rank {rank} waited for {noun} {names} ({what}): {cause}")


class AgreementError(RunError):
    """Ranks that must hold the same value do not."""


def is_check(error: BaseException) -> bool:
    """Whether an error is of a kind that checks of arguments raise, and that leaves a process as it was.

    What the system and the device raise is a `RuntimeError`, a `MemoryError` or an `OSError`, and says
    nothing of what else is broken.
    """
    return isinstance(error, Exception) and not isinstance(error, RuntimeError | MemoryError | OSError)


class VaeppWarning(UserWarning):
    """The category of every warning vaepp gives."""
