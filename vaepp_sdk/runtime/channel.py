"""Messages between the parent and its ranks: one JSON object a line, of bounded size, over a socket pair.

Only plain data crosses. The parent's end never blocks, so that one rank that does not read cannot keep the
parent from watching the others.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

from vaepp_sdk.errors import RunError

__all__ = ["MAX_MESSAGE", "Message", "ParentChannel", "RankChannel", "encode"]

MAX_MESSAGE = 16 * 2**20
"""The most bytes of one message. Pictures do not travel this way, so this is far more than any needs."""

Message = dict[str, Any]

_CHUNK = 2**16


def encode(message: Message) -> bytes:
    """A message as it travels.

    Raises:
        RunError: it is too long.
    """
    data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(data) > MAX_MESSAGE:
        raise RunError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE}")
    return data


class _Lines:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._held = 0

    def add(self, data: bytes) -> list[Message]:
        """Take bytes in; return the messages they complete.

        Raises:
            RunError: a message is too long, or no JSON object.
        """
        *complete, rest = data.split(b"\n")
        found = []
        for line in complete:
            found.append(_decode(b"".join([*self._pieces, line])))
            self._pieces, self._held = [], 0
        if rest:
            self._pieces.append(rest)
            self._held += len(rest)
        if self._held > MAX_MESSAGE:
            raise RunError(f"a message is over the limit of {MAX_MESSAGE} bytes")
        return found


def _decode(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(f"a message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise RunError(f"a message is a JSON {type(message).__name__}, not an object")
    return message


class RankChannel:
    """A rank's end: blocking, and safe to send on from any thread."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            RunError: it is too long.
            OSError: the parent is gone.
        """
        if os.getpid() != self._owner:
            os._exit(1)  # a fork of this rank that went on with its work: it must not answer in its place
        data = encode(message)
        with self._lock:
            self._end.sendall(data)

    def messages(self) -> Iterator[Message]:
        """Every message until the parent closes its end."""
        lines = _Lines()
        while data := self._receive():
            yield from lines.add(data)

    def _receive(self) -> bytes:
        try:
            return self._end.recv(_CHUNK)
        except ConnectionError:
            return b""


class ParentChannel:
    """The parent's end of one rank's channel: never blocks."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._lines = _Lines()
        self._outbox = bytearray()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._end.fileno()

    @property
    def has_output(self) -> bool:
        """Whether `flush` has something left to write."""
        return bool(self._outbox)

    def post(self, data: bytes) -> None:
        """Queue one encoded message; `flush` sends it as the rank takes it."""
        self._outbox += data

    def flush(self) -> None:
        """Send what the rank takes now; what a dead rank will never read is dropped."""
        try:
            while self._outbox:
                del self._outbox[: self._end.send(self._outbox)]
        except BlockingIOError:
            pass
        except ConnectionError:
            self._outbox.clear()

    def read(self) -> tuple[list[Message], bool]:
        """The messages that have arrived, and whether more can come.

        Raises:
            RunError: the rank sent something that is not a message.
        """
        found: list[Message] = []
        try:
            while data := self._end.recv(_CHUNK):
                found += self._lines.add(data)
        except BlockingIOError:
            return found, True
        except ConnectionError:
            pass
        return found, False

    def close(self) -> None:
        """Close this end; a rank that still reads sees the end of the file."""
        self._end.close()
