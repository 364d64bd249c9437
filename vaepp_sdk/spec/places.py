"""Where a model comes from and where pictures go: ids and folders, checked and made absolute."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vaepp_sdk.spec.values import RefusedError, text_problem
from vaepp_sdk.text import clean, shown

__all__ = ["absolute_place", "model_place", "output_place"]

_HUB_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_HUB_LENGTH = 96
_MAX_NAME = 255
_ONE_FILE = (".safetensors", ".ckpt", ".gguf", ".bin", ".pt", ".pth")
"""How checkpoints end that hold a whole model in one file, which other programs take."""
_HUB_FIX = "write a hub id, name or org/name, or the path of a folder, as in ./my-model"


def model_place(text: str, base: Path) -> str:
    """A hub id as it is, or the absolute path of a folder that exists.

    A folder comes first, as in diffusers: `org/name` is the folder beside the spec file where there is one.

    Args:
        text: `model.id` as written.
        base: the folder that relative paths are relative to.

    Raises:
        RefusedError: it is neither, or a folder that is not there.
    """
    if not text:
        raise RefusedError("found an empty string", _HUB_FIX)
    if "://" in text or text.lower().startswith("file:"):
        raise RefusedError("found a URL", _HUB_FIX)
    if "@" in text and ":" in text:
        raise RefusedError("found an id with credentials", _HUB_FIX)
    looks_local = text in (".", "..") or text.startswith(("./", "../", "/", "~"))
    if ".." in text and not looks_local:
        raise RefusedError(f"found {shown(text)}, which holds '..'", _HUB_FIX)
    folder = absolute_place(text, base)
    if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises where a parent may not be read
        return str(folder)
    if looks_local:
        problem = "is no folder" if os.path.lexists(folder) else "does not exist"
        raise RefusedError(f"found {shown(text)}, and {clean(str(folder), 200)} {problem}", _HUB_FIX)
    if folder.suffix in _ONE_FILE and os.path.isfile(folder):  # noqa: PTH113 - as above
        raise RefusedError(f"found {shown(text)}, which is one file", f"{_HUB_FIX}, in diffusers format")
    if not _is_hub_id(text):
        raise RefusedError(f"found {shown(text)}", _HUB_FIX)
    return text


def output_place(text: str, base: Path) -> str:
    """The absolute path of an output folder, which need not exist yet.

    Args:
        text: `output.dir` as written.
        base: the folder that relative paths are relative to.

    Raises:
        RefusedError: it cannot be a folder.
    """
    fix = 'write the path of a folder, as in "out"'
    if not text:
        raise RefusedError("found an empty string", fix)
    folder = absolute_place(text, base)
    for place in (folder, *folder.parents):
        # The nearest thing that exists decides: below it everything can still be made.
        if os.path.lexists(place):
            if not os.path.isdir(place):  # noqa: PTH112 - as above
                raise RefusedError(f"{clean(str(place), 200)} is no folder", fix)
            break
    return str(folder)


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    fits = len(parts) <= 2 and len(text) <= _HUB_LENGTH and "--" not in text
    return fits and not text.endswith(".git") and all(_HUB_PART.fullmatch(part) for part in parts)


def absolute_place(text: str, base: Path) -> Path:
    """An absolute path; one with `..` is resolved as the system does it, through links."""
    problem = text_problem(text)
    if problem:
        raise RefusedError(f"found {shown(text)}", problem)
    names = os.fsencode(text).split(b"/")
    if len(os.fsencode(text)) > 4000 or any(len(name) > _MAX_NAME for name in names):
        raise RefusedError(f"found {shown(text)}", f"no name in a path may be longer than {_MAX_NAME} bytes")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise RefusedError(f"found {shown(text)}", "there is no such home folder") from None
    # realpath, not Path.resolve(): a link that leads back to itself must not raise here.
    return Path(os.path.realpath(base / path)) if ".." in path.parts else base / path
