"""What stands at the beginning of a safetensors file, read and checked without torch."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vaepp_sdk.text import reason_of

__all__ = ["BrokenFileError", "header_bytes", "tensor_names"]

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000
"""Bytes of a header; the format's own limit."""

_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has put where a large one belongs."""


class BrokenFileError(Exception):
    """What is wrong with a file."""


def tensor_names(path: Path) -> frozenset[str]:
    """The tensors that a whole file holds; only its header is read.

    Raises:
        BrokenFileError: it is not whole, or no safetensors file.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise BrokenFileError("there is no such file")
        with path.open("rb") as file:
            header = header_bytes(file)
            begin, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BrokenFileError(f"it cannot be read: {reason_of(error)}") from None
    tensors, end = _described(header)
    if begin + end != size:
        raise BrokenFileError(f"it has {size} bytes, and by its header {begin + end}")
    return tensors


def header_bytes(file: BinaryIO, most: int = _MAX_HEADER) -> bytes:
    """The header of a file that stands at its beginning; then it stands at its tensors.

    Args:
        file: a regular file.
        most: the most bytes that are read.

    Raises:
        BrokenFileError: it has none.
    """
    begin = file.read(_LENGTH.size)
    if _POINTER.startswith(begin) and begin:
        raise BrokenFileError("it is a pointer of Git LFS, and not the file itself")
    size = os.fstat(file.fileno()).st_size
    length = _LENGTH.unpack(begin)[0] if len(begin) == _LENGTH.size else 0
    if not 2 <= length <= most:
        raise BrokenFileError(f"it does not begin as a safetensors file does, and has {size} bytes")
    if size < _LENGTH.size + length:
        raise BrokenFileError(f"it has {size} bytes, and its header alone {_LENGTH.size + length}")
    return file.read(length)


def _described(header: bytes) -> tuple[frozenset[str], int]:
    """The names of the tensors, and where the last one ends."""
    try:
        found: Mapping[str, Any] = json.loads(header)
        tensors = {name: entry for name, entry in found.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
        return frozenset(tensors), max(map(int, ends), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise BrokenFileError("its header does not say where its tensors are") from None
