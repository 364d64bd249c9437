"""Pictures on their way from a rank to the parent: raw bytes in shared memory without a name.

The header travels as JSON; the bytes lie in a memory file that both processes hold. It has no name in any
file system, so a killed run cannot leave pictures behind, and the size of `/dev/shm` does not matter.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vaepp_sdk.errors import RunError

__all__ = ["make_store", "read_pictures", "write_pictures"]

_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


def make_store(rank: int) -> int:
    """An empty memory file for one rank's pictures; returns its descriptor."""
    return os.memfd_create(f"vaepp-pictures-{rank}", os.MFD_CLOEXEC)


def write_pictures(descriptor: int, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Write pictures from the start of the file; returns their headers.

    Args:
        descriptor: the memory file.
        pictures: of mode L, RGB or RGBA; others are converted to RGB.
    """
    os.ftruncate(descriptor, 0)
    headers, offset = [], 0
    for picture in pictures:
        plain = picture if picture.mode in _CHANNELS else picture.convert("RGB")
        headers.append({"mode": plain.mode, "width": plain.width, "height": plain.height})
        data = memoryview(plain.tobytes())
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    return headers


def read_pictures(descriptor: int, headers: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """Read pictures and empty the file, so that the memory goes back to the system.

    Raises:
        RunError: the headers do not fit the bytes.
    """
    sizes = [_CHANNELS[one["mode"]] * one["width"] * one["height"] for one in headers]
    if sum(sizes) != os.fstat(descriptor).st_size:
        raise RunError(f"a rank announced {sum(sizes)} bytes of pictures and wrote another number")
    if not sizes:
        return []
    found, offset = [], 0
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as memory:
        for header, size in zip(headers, sizes, strict=True):
            data = memory[offset : offset + size]
            found.append(Image.frombytes(header["mode"], (header["width"], header["height"]), data))
            offset += size
    os.ftruncate(descriptor, 0)
    return found
