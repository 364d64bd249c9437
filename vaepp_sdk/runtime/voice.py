"""What is said on stderr, once for all ranks of a machine that have the same to say."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time

from vaepp_sdk.text import clean

__all__ = ["complain", "first_to_say", "hush", "safe", "tell"]

_LINE = 2000
_LINGER = 2.0
_SAID: list[socket.socket] = []
_HUSHED = threading.Event()


def safe(text: str) -> str:
    """A text of several lines without anything a terminal would obey."""
    return "\n".join(clean(line, _LINE) for line in text.split("\n"))


def first_to_say(message: str) -> bool:
    """Whether no other rank of this machine says the same; true where no launcher started several.

    The first holds the message's name until it exits, so it must not exit before the others have come here.
    """
    if _HUSHED.is_set():
        return False
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1 or sys.platform != "linux":
        return True
    job = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    digest = hashlib.sha256("\n".join([*job, message]).encode(errors="replace")).hexdigest()
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0vaepp-{digest}")  # a name of the kernel's, no file
    except OSError:
        name.close()
        return False
    _SAID.append(name)
    return True


def hush() -> None:
    """Leave it to another rank of this machine, which has said why the job ends."""
    _HUSHED.set()


def complain(message: str, *notes: str) -> None:
    """One block on stderr; under a launcher it says which rank speaks, unless the message names one.

    Where nothing can be written there, nobody hears, and the run and its exit code stay what they are.
    """
    rank = os.environ.get("RANK")
    name = f"vaepp-run: rank {clean(rank)}" if rank and not message.startswith("rank ") else "vaepp-run"
    lines = [f"{name}: {message}", *(f"  {note}" for note in notes)]
    with contextlib.suppress(OSError):
        print(safe("\n".join(lines)), file=sys.stderr, flush=True)


def tell(message: str, *notes: str) -> None:
    """Complain once for all ranks of this machine that have the same to say."""
    if not first_to_say(message):
        return
    complain(message, *notes)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        # The launcher ends the other ranks when this one exits; they are to find it said.
        time.sleep(_LINGER)
