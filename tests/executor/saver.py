"""Saves pictures in children that are killed, or that the disk refuses: run by `test_saving_killed`.

    python saver.py FOLDER [full]

Prints one JSON object: what was found after each child.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image

from vaepp_sdk.errors import OutputError
from vaepp_sdk.saving import Origin, PictureFolder

POINTS = 20
OLD, NEW = (1, 2, 3), (9, 8, 7)


def save(folder: Path, overwrite: bool, colour: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (300, 200), colour)
    PictureFolder(folder, overwrite).save(picture, "0000-a-seed1.png", Origin("a", 1, {}, "test").png())


def lines_of(action: Callable[[], None], at: int | None = None) -> int:
    """Run an action and count the lines of Python it takes; at a line's number the process kills itself."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return count


def child(action: Callable[[], object]) -> int:
    """Run an action in a fork; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except OutputError as error:
            (Path(sys.argv[1]) / "refused.txt").write_text(str(error))
            os._exit(2)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def state(folder: Path) -> str:
    """Which picture is there, whole."""
    path = folder / "0000-a-seed1.png"
    if not path.exists():
        return "none"
    with Image.open(path) as picture:
        picture.load()
        extrema: Any = picture.getextrema()
    return {OLD: "old", NEW: "new"}.get(tuple(low for low, _ in extrema), "broken")


def killed(folder: Path, overwrite: bool) -> list[str]:
    """What is there after a kill at each of many lines: spread over all of them, and the last ones."""
    found = []
    save(folder / "warm", True, NEW)  # imports take lines of their own

    def attempt(place: Path, at: int | None = None) -> int:
        if overwrite:
            save(place, False, OLD)
        return lines_of(lambda: save(place, overwrite, NEW), at)

    total = attempt(folder / f"{overwrite}-count")
    half = POINTS // 2
    points = [1 + point * (total - half) // half for point in range(half)]
    for line in [*points, *range(total - half + 1, total + 1)]:
        place = folder / f"{overwrite}-{line}"
        status = child(functools.partial(attempt, place, line))
        assert os.WTERMSIG(status) == signal.SIGKILL, (line, total, status)
        found.append(state(place))
    return found


def refused(folder: Path) -> dict[str, Any]:
    """The kernel refuses to make the file as large as it must be."""
    place = folder / "limited"
    save(place, False, OLD)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        save(place, True, NEW)

    status = child(limited)
    left = sorted(path.name for path in place.iterdir())
    said = (folder / "refused.txt").read_text()
    return {"code": os.waitstatus_to_exitcode(status), "state": state(place), "left": left, "said": said}


def full(folder: Path) -> dict[str, Any]:
    """A disk of 64 KiB, which holds the old picture and not the new one besides."""
    save(folder, False, OLD)
    noise = Image.frombytes("RGB", (300, 200), os.urandom(300 * 200 * 3))
    try:
        PictureFolder(folder, True).save(noise, "0000-a-seed1.png", Origin("a", 1, {}, "test").png())
    except OutputError as error:
        left = sorted(path.name for path in folder.iterdir())
        return {"state": state(folder), "left": left, "said": str(error)}
    return {"state": "no refusal"}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if sys.argv[2:] == ["full"]:
        print(json.dumps(full(where)))
    else:
        print(
            json.dumps(
                {"replace": killed(where, True), "new": killed(where, False), "refused": refused(where)}
            )
        )
