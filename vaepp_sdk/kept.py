"""Latents that were kept: what a run's folder holds, read and checked without torch.

A folder `run-N` holds one safetensors file for each replica that made pictures. The file's own header says
what made the latents, so that they can be decoded without anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.errors import UserError
from vaepp_sdk.headers import BrokenFileError, header_bytes
from vaepp_sdk.text import clean, reason_of

__all__ = [
    "FORMAT",
    "KeptFile",
    "KeptRun",
    "differing_keys",
    "holds_latents",
    "remove_run",
    "resume_notes",
    "settings_of",
]

FORMAT = 1
"""The version of what the header says."""

_FILES = "latents-*.safetensors"
_MAX_HEADER = 16 << 20
_FIELDS = ("call", "first", "format", "images", "pipeline", "seed", "sha256", "software", "spec", "vae")


@attrs.frozen
class KeptFile:
    """One file of latents.

    Attributes:
        path: the file.
        first: the number of its first picture.
        count: how many pictures it has.
    """

    path: Path
    first: int
    count: int


@attrs.frozen(kw_only=True)
class KeptRun:
    """The latents of one request.

    Attributes:
        folder: the folder.
        files: its files, in the order of their pictures.
        spec: the tables of the spec that made them.
        call: the request's arguments, without `seed`.
        seed: the first picture's.
        pipeline: the pipeline class.
        vae: the settings of the VAE they are for.
        software: names and versions of what made them.
    """

    folder: Path
    files: tuple[KeptFile, ...]
    spec: Mapping[str, Any]
    call: Mapping[str, Any]
    seed: int
    pipeline: str
    vae: Mapping[str, Any]
    software: str

    @classmethod
    def read(cls, folder: str | Path) -> KeptRun:
        """Read a run's folder and check that its files are whole.

        Raises:
            UserError: it holds no latents, or a file that is broken or not of the same request.
        """
        if folder == "":
            raise UserError("found an empty string; give the folder of a run, as in out/run-7")
        place = Path(folder).absolute()
        paths = sorted(place.glob(_FILES)) if place.is_dir() else []
        if not paths:
            raise UserError(f"{_name(place)} holds no latents; give the folder of a run, as in out/run-7")
        headers = [_checked(path) for path in paths]
        first = headers[0]["__metadata__"]
        for path, header in zip(paths, headers, strict=True):
            other = header["__metadata__"]
            if any(other[key] != first[key] for key in ("spec", "call", "seed", "images")):
                raise UserError(f"{_name(path)} belongs to another request than {paths[0].name}")
        files = tuple(_file(path, header) for path, header in zip(paths, headers, strict=True))
        _check_complete(files, first["images"], place)
        kept = {key: first[key] for key in ("spec", "call", "seed", "pipeline", "vae", "software")}
        return cls(folder=place, files=tuple(sorted(files, key=lambda file: file.first)), **kept)


def holds_latents(folder: Path) -> bool:
    """Whether a run's folder has any."""
    return any(folder.glob(_FILES))


def resume_notes(folder: Path | None) -> list[str]:
    """The command that goes on from a run's latents, where there are any."""
    if folder is None or not holds_latents(folder):
        return []
    return [f"the latents are kept; go on from them with: vaepp-run --resume {folder}"]


def remove_run(folder: Path) -> None:
    """Remove the latents of a run that nobody needs any more, and its folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in folder.glob(_FILES):
            path.unlink()
        folder.rmdir()


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A VAE's `config.json` without what says where it came from, or which version wrote it."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two VAEs differ, sorted."""
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def _file(path: Path, header: Mapping[str, Any]) -> KeptFile:
    return KeptFile(path, header["__metadata__"]["first"], header["latents"]["shape"][0])


def _check_complete(files: tuple[KeptFile, ...], images: int, place: Path) -> None:
    """Every picture once: a replica that could not write its own leaves a gap."""
    numbers = [number for file in files for number in range(file.first, file.first + file.count)]
    missing = sorted(set(range(images)) - set(numbers))
    if missing or len(numbers) != images:
        found = f"the latents of pictures {missing}" if missing else "one place for each picture"
        raise UserError(f"{_name(place)} lacks {found} of {images}; they must be made again")


def _checked(path: Path) -> dict[str, Any]:
    """A file's header, its metadata read; the file is whole.

    Raises:
        UserError: it is not, or is no file of kept latents.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise BrokenFileError("it is no regular file")
        with path.open("rb") as file:
            found = _meaning(header_bytes(file, _MAX_HEADER))
            body = hashlib.sha256()
            size = 0
            while chunk := file.read(1 << 20):
                body.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise UserError(f"{_name(path)} cannot be read: {reason_of(error)}") from error
    except BrokenFileError as error:
        raise UserError(f"{_name(path)} is no file of kept latents: {error}") from None
    whole = found["latents"]["data_offsets"] == [0, size]
    if not whole or body.hexdigest() != found["__metadata__"]["sha256"]:
        raise UserError(f"{_name(path)} is broken: its bytes are not those that were written")
    return found


def _meaning(header: bytes) -> dict[str, Any]:
    """The header as plain data, every field that is used below of the right type."""
    try:
        found = json.loads(header)
        metadata = json.loads(found["__metadata__"]["vaepp"])
        tensor = found["latents"]
        shape = tensor["shape"]
        whole = all(isinstance(side, int) and side > 0 for side in shape) and len(shape) > 1
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BrokenFileError("its header does not say what made it") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise BrokenFileError(f"it was not written in format {FORMAT}, which this version of vaepp reads")
    missing = [name for name in _FIELDS if name not in metadata]
    tables = all(isinstance(metadata.get(name), dict) for name in ("spec", "call", "vae"))
    numbers = all(_is_count(metadata.get(name)) for name in ("first", "images", "seed"))
    if missing or not tables or not numbers or not whole:
        raise BrokenFileError("its header is incomplete")
    return {"__metadata__": metadata, "latents": tensor}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _name(path: Path) -> str:
    return clean(str(path), 300)
