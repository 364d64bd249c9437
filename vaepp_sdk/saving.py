"""Saves pictures and clips: whole or not at all, never over another, with what made them beside or inside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from vaepp_sdk.errors import OutputError
from vaepp_sdk.text import reason_of

__all__ = ["Origin", "PictureFolder", "slug"]

_FRAMES = "-frames"
"""How the name of a folder with a clip's frames ends."""

_NUMBERED = re.compile(rf"(\d{{4,}})-.*(?:\.png|\.mp4|{_FRAMES})")
_SLUG_LENGTH = 48


def slug(prompt: str) -> str:
    """A prompt as a part of a file name: `a-z`, `0-9` and single dashes, at most 48 characters."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(words) > _SLUG_LENGTH:
        words = words[: _SLUG_LENGTH + 1].rpartition("-")[0] or words[:_SLUG_LENGTH]
    return words or "picture"


@attrs.frozen
class Origin:
    """What made a picture.

    Attributes:
        prompt: any text.
        seed: of this picture.
        details: plain data.
        software: names and versions.
    """

    prompt: str
    seed: int
    details: Mapping[str, Any]
    software: str

    def png(self) -> PngInfo:
        """PNG text chunks: `prompt`, `seed`, `Software`, and `vaepp`, which holds the details as JSON.

        Where the prompt is no valid Unicode (lone surrogates), `prompt` shows U+FFFD instead; `vaepp` has it
        as it was.
        """
        info = PngInfo()
        info.add_itxt("prompt", self.prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        info.add_text("seed", str(self.seed))
        info.add_text("Software", self.software)
        info.add_text("vaepp", json.dumps({"prompt": self.prompt, "seed": self.seed, **self.details}))
        return info

    def text(self) -> str:
        """The same as a JSON file, for clips: video files have no place for it."""
        held = {"prompt": self.prompt, "seed": self.seed, "software": self.software, **self.details}
        return json.dumps(held, indent=2) + "\n"


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

    def renumber(self) -> int:
        """One number after those that other runs have taken meanwhile.

        Raises:
            OutputError: the folder cannot be read.
        """
        self._next = max(self._next or 0, self._after_existing())
        return self.number(1)

    def save(self, image: Image, name: str, info: PngInfo) -> Path:
        """Write one picture under a name of its own; it is there completely or not at all.

        Raises:
            OutputError: the name is taken, or the file cannot be written; names the file.
        """
        return self._put(name, lambda path: _write(image, path, info))

    def save_clip(self, frames: Sequence[Image], name: str, origin: Origin, rate: int | None) -> Path:
        """Write a clip under a name of its own; it is there completely or not at all.

        Args:
            frames: its pictures.
            name: the file's without its ending.
            origin: what made it.
            rate: frames a second, for a video file with a JSON file beside it; None for a folder of PNG
                files.

        Returns:
            The video file or the folder.

        Raises:
            OutputError: the name is taken, or a file cannot be written; names the file.
        """
        if rate is None:
            return self._put(f"{name}{_FRAMES}", lambda path: _write_frames(frames, path, origin.png()))
        made = self._put(f"{name}.mp4", lambda path: _write_video(frames, path, rate))
        self._put(f"{name}.json", lambda path: _write_text(origin.text(), path))
        return made

    def _put(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write under another name first."""
        self._make()
        target = self.path / name
        scratch = self.path / f".{name}-{secrets.token_hex(8)}.tmp"
        try:
            write(scratch)
            if self.overwrite:
                _replace(scratch, target)
            else:
                _place(scratch, target)
        except OSError as error:
            raise _refused(target, error) from error
        finally:
            _remove(scratch)
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


def _write_text(text: str, path: Path) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_frames(frames: Sequence[Image], path: Path, info: PngInfo) -> None:
    """Write a new folder of numbered frames."""
    path.mkdir()
    for number, frame in enumerate(frames):
        _write(frame, path / f"frame-{number:04d}.png", info)


def _write_video(frames: Sequence[Image], path: Path, rate: int) -> None:
    """Write a new video file; sides of odd length are rounded up, as its format wants them."""
    from diffusers.utils import export_to_video

    made = path.with_name(f"{path.name}.mp4")  # the encoder goes by the ending
    try:
        export_to_video(list(frames), str(made), fps=rate, macro_block_size=2)
        made.rename(path)
    finally:
        made.unlink(missing_ok=True)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace(scratch: Path, target: Path) -> None:
    """Give a finished file or folder its name, where another of its kind may have it."""
    if scratch.is_dir() and target.is_dir() and not target.is_symlink():
        old = target.with_name(f"{scratch.name}-old")
        target.rename(old)  # a folder with files in it cannot be replaced in one step
        scratch.rename(target)
        shutil.rmtree(old)
    else:
        scratch.replace(target)


def _remove(scratch: Path) -> None:
    """Remove what was not finished, if there is any."""
    if scratch.is_dir():
        shutil.rmtree(scratch, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        scratch.unlink()


def _place(scratch: Path, target: Path) -> None:
    """Give a finished file or folder its name, unless that is taken; checking first would leave a gap."""
    if scratch.is_dir():
        target.mkdir()  # the name is taken, or now nobody else's
        scratch.replace(target)
        return
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
    return OutputError(f"cannot write {path}: {reason_of(error)}; name another output.dir")
