"""Saves pictures: whole files or none, never over another, with what made them in their metadata."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from vaepp_sdk.errors import OutputError

__all__ = ["PictureFolder", "metadata", "slug"]

_NUMBERED = re.compile(r"(\d{4,})-.*\.png")
_SLUG_LENGTH = 48


def slug(prompt: str) -> str:
    """A prompt as a part of a file name: `a-z`, `0-9` and single dashes, at most 48 characters."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(words) > _SLUG_LENGTH:
        words = words[: _SLUG_LENGTH + 1].rpartition("-")[0] or words[:_SLUG_LENGTH]
    return words or "picture"


def metadata(prompt: str, seed: int, details: Mapping[str, Any], software: str) -> PngInfo:
    """PNG text chunks: `prompt`, `seed`, `Software`, and `vaepp`, which holds `details` as JSON.

    Args:
        prompt: any text. Where it is no valid Unicode (lone surrogates), `prompt` shows U+FFFD instead;
            `vaepp` has it as it was.
        seed: of this picture.
        details: plain data.
        software: names and versions of what made the picture.
    """
    info = PngInfo()
    info.add_itxt("prompt", prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    info.add_text("seed", str(seed))
    info.add_text("Software", software)
    info.add_text("vaepp", json.dumps({"prompt": prompt, "seed": seed, **details}))
    return info


@attrs.define(eq=False)
class PictureFolder:
    """A folder that pictures are saved to, as in `0007-a-futuristic-city-at-sunset-seed7.png`.

    Numbers go on after those that are there; with `overwrite` they start at 0 in each run, so that running
    the same spec again replaces its pictures.

    Attributes:
        path: the folder.
        overwrite: whether a file of the same name is replaced.
    """

    path: Path
    overwrite: bool = False
    _next: int | None = None

    def prepare(self) -> None:
        """Make the folder, and see now rather than at the end whether it can be written.

        Raises:
            OutputError: it cannot.
        """
        self._make()
        try:
            probe = self.path / f".vaepp-{secrets.token_hex(8)}.tmp"
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            probe.unlink()
        except OSError as error:
            raise _refused(self.path, error) from error

    def number(self, count: int) -> int:
        """Take `count` numbers in a row and return the first.

        Raises:
            OutputError: the folder cannot be read.
        """
        if self._next is None:
            self._next = 0 if self.overwrite else self._after_existing()
        first, self._next = self._next, self._next + count
        return first

    def save(self, image: Image, name: str, info: PngInfo) -> Path:
        """Write one picture under a name of its own; it is there completely or not at all.

        Raises:
            OutputError: the name is taken, or the file cannot be written; names the file.
        """
        self._make()
        target = self.path / name
        scratch = self.path / f".{name}-{secrets.token_hex(8)}.tmp"
        try:
            _write(image, scratch, info)
            if self.overwrite:
                scratch.replace(target)
            else:
                _place(scratch, target)
        except OSError as error:
            raise _refused(target, error) from error
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()
        return target

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise OutputError(
                f"cannot write {self.path}: it is not a folder; name another output.dir"
            ) from error
        except OSError as error:
            raise _refused(self.path, error) from error

    def _after_existing(self) -> int:
        try:
            names = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        except OSError as error:
            raise _refused(self.path, error) from error
        found = [int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))]
        return max(found, default=-1) + 1


def _write(image: Image, path: Path, info: PngInfo) -> None:
    """Write a new file and wait until the disk has it: a full disk may say so only then."""
    with path.open("xb") as file:
        image.save(file, format="PNG", pnginfo=info)
        file.flush()
        os.fsync(file.fileno())


def _place(scratch: Path, target: Path) -> None:
    """Give a finished file its name, unless that is taken; checking first would leave a gap for others."""
    try:
        os.link(scratch, target)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links: take the name with an empty file, which nobody else then has.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        scratch.replace(target)


def _refused(path: Path, error: OSError) -> OutputError:
    if isinstance(error, FileExistsError):
        return OutputError(
            f"{path} exists and is not replaced; name another output.dir, or write output.overwrite = true"
        )
    return OutputError(f"cannot write {path}: {error.strerror or error}; name another output.dir")
