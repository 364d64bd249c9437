"""What a failing rank leaves behind: one JSON file, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.errors import (
    AgreementError,
    OutputError,
    PeerError,
    RankError,
    RequestError,
    UnsupportedError,
    UserError,
    VaeppError,
)
from vaepp_sdk.text import message_of, one_line

__all__ = ["ErrorRecord", "alike", "read_record", "write_record"]

_PEER_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_PEER_WORDS = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed? ?out|gloo/transport|nccl .*(abort|remote)|"
    r"socket .*(closed|failed)|recvvalue failed",
    re.IGNORECASE,
)
_MAX_TRACE = 100_000
_USER_ERRORS: dict[str, type[UserError]] = {
    "OutputError": OutputError,
    "UnsupportedError": UnsupportedError,
}


@attrs.frozen(kw_only=True)
class ErrorRecord:
    """One rank's failure.

    Attributes:
        rank: the rank that raised.
        stage: the stage it was in.
        kind: `user` for a mistake of the user's, `peer` for a wait that another rank broke, else `own`.
        name: the exception's class.
        message: its whole message.
        trace: the formatted traceback.
        time: monotonic nanoseconds.
    """

    rank: int
    stage: str
    kind: str
    name: str
    message: str
    trace: str
    time: int

    @classmethod
    def of(cls, error: BaseException, rank: int, stage: str) -> ErrorRecord:
        """Describe an exception."""
        name, message = type(error).__name__, message_of(error)
        if isinstance(error, RankError):  # it says already where it happened
            stage = error.stage
            name, _, message = error.cause.partition(": ")
        return cls(
            rank=rank,
            stage=stage,
            kind=_kind(error),
            name=name,
            message=message,
            trace=_trace(error),
            time=time.monotonic_ns(),
        )

    @property
    def cause(self) -> str:
        """The failure in one line."""
        said = self.message.strip()
        return one_line(f"{self.name}: {said}" if said else self.name)

    def user_error(self) -> UserError:
        """The user's mistake as an exception to raise in the parent."""
        return _USER_ERRORS.get(self.name, UserError)(self.message)

    def error(self) -> VaeppError:
        """The failure as an exception to raise elsewhere."""
        if self.kind == "user":
            return self.user_error()
        if self.name == "AgreementError":  # it names the ranks itself, and no one rank failed
            return AgreementError(self.message)
        return RankError(self.rank, self.stage, self.cause)

    def refusal(self, *, alone: bool) -> VaeppError:
        """What failed a request and no rank: they are ready for the next.

        Args:
            alone: whether only this rank says so, and not all of them the same.
        """
        if self.kind == "user":
            return self.user_error()
        return RequestError(self.stage, self.cause, self.rank if alone else None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return attrs.asdict(self)


def alike(records: Sequence[ErrorRecord]) -> bool:
    """Whether ranks raised the same in the same stage."""
    return len({(one.stage, one.name, one.message) for one in records}) == 1


def write_record(record: ErrorRecord, path: Path) -> None:
    """Write a record to a temporary name, then rename it: a reader sees all of it or none."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record.to_dict()))
    os.replace(partial, path)  # noqa: PTH105  # the atomic rename is the point


def read_record(path: Path) -> ErrorRecord | None:
    """Read a rank's record, or None where it left none."""
    try:
        return ErrorRecord(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _trace(error: BaseException) -> str:
    """A traceback of bounded length: its beginning and its end."""
    try:
        trace = "".join(traceback.format_exception(error))
    except Exception:
        return "(its traceback cannot be shown)"
    left_out = len(trace) - _MAX_TRACE
    if left_out <= 0:
        return trace
    return f"{trace[: _MAX_TRACE // 2]}\n... ({left_out} characters) ...\n{trace[-_MAX_TRACE // 2 :]}"


def _kind(error: BaseException) -> str:
    """Whose failure it is. A peer's is told by type where torch has one, else by gloo's and NCCL's words."""
    if isinstance(error, UserError):
        return "user"
    chain: BaseException | None = error
    seen = set[int]()
    while chain is not None and id(chain) not in seen:  # a chain may lead back to itself
        seen.add(id(chain))
        if isinstance(chain, PeerError) or type(chain).__name__ in _PEER_TYPES:
            return "peer"
        if isinstance(chain, RuntimeError) and _PEER_WORDS.search(message_of(chain)):
            return "peer"
        chain = chain.__cause__ or chain.__context__
    return "own"
