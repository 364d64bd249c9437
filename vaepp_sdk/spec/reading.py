"""Reads a spec file: a regular file of at most 1 MiB that is valid TOML, or one clear sentence."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import attrs
import tomli

from vaepp_sdk.errors import Fault, SpecError
from vaepp_sdk.text import clean

__all__ = ["MAX_BYTES", "Wanted", "parse_toml", "read_text", "read_toml"]

MAX_BYTES = 1 << 20
"""The largest spec file read."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_SYSTEM_ERRORS = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.EACCES: "it may not be read by this user",
    errno.ELOOP: "it is a symbolic link that leads back to itself",
    errno.ENAMETOOLONG: "the name is longer than a file name can be",
    errno.ENXIO: "it is a socket or a device without a driver",
}


@attrs.frozen
class Wanted:
    """What a file is wanted for, in words for messages.

    Attributes:
        path: what to give instead of a path that leads nowhere.
        noun: what the file is.
        most: the most bytes it may have.
    """

    path: str
    noun: str
    most: int


def read_toml(path: Path) -> dict[str, Any]:
    """Read and parse a spec file.

    Raises:
        SpecError: it is missing, no regular file, too large, not UTF-8 or not TOML.
    """
    text = read_text(path, Wanted("the path of a TOML file", "a spec", MAX_BYTES))
    return parse_toml(text, clean(str(path), 300))


def read_text(path: Path, wanted: Wanted) -> str:
    """Read a regular file of bounded size in UTF-8.

    Raises:
        SpecError: it is missing, no regular file, too large or not UTF-8.
    """
    source = clean(str(path), 300)
    return _decode(_read(path, source, wanted), source)


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Parse TOML; `source` names it in the message.

    Raises:
        SpecError: it is not TOML, or nested or written in a way nobody needs.
    """
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        # One error class for every TOML mistake; the sentence comes from the parser and may quote the file.
        raise _refused(source, clean(str(error), 200), "correct the TOML there") from None
    except RecursionError:
        raise _refused(
            source, "it is nested too deeply", "no key of a spec needs more than 4 levels"
        ) from None
    except ValueError:
        # The only ValueError left is Python's own refusal of huge integers, which names no place.
        raise _refused(source, "it holds a number with thousands of digits", "write it shorter") from None


def _read(path: Path, source: str, wanted: Wanted) -> bytes:
    give, most = f"give {wanted.path}", f"{wanted.noun} has at most {wanted.most} bytes"
    # Non-blocking, so that a pipe without a writer is refused and not waited for.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except ValueError:
        raise _refused(source, "the path holds a NUL character", give) from None
    except OSError as error:
        raise _refused(source, _system_problem(error), give) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for test, name in _KINDS if test(status.st_mode)), "no file")
            raise _refused(source, f"it is {kind}", give)
        if status.st_size > wanted.most:
            raise _refused(source, f"it has {status.st_size} bytes", most)
        # Some files of the kernel claim size 0, so what is read is limited too.
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(wanted.most + 1)
    except OSError as error:
        raise _refused(source, _system_problem(error), give) from None
    finally:
        os.close(descriptor)
    if len(data) > wanted.most:
        raise _refused(source, f"it has more than {wanted.most} bytes", most)
    return data


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = "it is UTF-16" if utf16 else f"it is not UTF-8 (line {line}, byte {column})"
        raise _refused(source, found, "save it as UTF-8") from None


def _system_problem(error: OSError) -> str:
    known = _SYSTEM_ERRORS.get(error.errno or 0)
    return known or f"it cannot be read ({clean(error.strerror or 'unknown error')})"


def _refused(source: str, found: str, fix: str) -> SpecError:
    return SpecError([Fault("$", found, fix)], source)
