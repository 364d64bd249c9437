"""Writes latents before anything can go wrong with them, and reads them back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vaepp_sdk.errors import UserError
from vaepp_sdk.kept import FORMAT

__all__ = ["LatentStore", "load_latents", "write_latents"]

_RUN = re.compile(r"run-(\d+)")


@attrs.frozen
class LatentStore:
    """Where runs keep their latents: `run-0`, `run-1` and so on.

    Attributes:
        path: the folder of all runs; made when the first one needs it.
        private: whether only this user may see it, as below the system's folder for temporary files.
    """

    path: Path
    private: bool = False

    @classmethod
    def temporary(cls) -> LatentStore:
        """A store of this user's below the system's folder for temporary files."""
        return cls(Path(tempfile.gettempdir()) / f"vaepp-latents-{os.getuid()}", private=True)

    def new_run(self) -> int:
        """Make the folder of a new run and return its number; of several runs at once none gets another's.

        Raises:
            OSError: it cannot be made.
        """
        self.path.mkdir(mode=0o700 if self.private else 0o777, parents=True, exist_ok=True)
        if self.private:
            self._check_private()
        found = [int(match[1]) for path in self.path.iterdir() if (match := _RUN.fullmatch(path.name))]
        number = max(found, default=-1) + 1
        while True:
            try:
                self.run(number).mkdir()
            except FileExistsError:
                number += 1
            else:
                return number

    def run(self, number: int) -> Path:
        """The folder of a run."""
        return self.path / f"run-{number}"

    def _check_private(self) -> None:
        """Others may write to the folder for temporary files, and could have been here first."""
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(13, "it is not a folder that only this user can see", str(self.path))


def write_latents(folder: Path, latents: torch.Tensor, first: int, details: Mapping[str, Any]) -> Path:
    """Write one replica's latents; the file is there completely or not at all, and the disk has it.

    Args:
        folder: a run's folder.
        latents: the pictures' latents along the first dimension, on any device.
        first: the number of the first picture.
        details: what made them; plain data.

    Raises:
        OSError: it cannot be written.
    """
    plain = latents.detach().cpu().contiguous()
    digest = hashlib.sha256(plain.view(-1).view(torch.uint8).numpy().data).hexdigest()
    header = {"format": FORMAT, "first": first, "sha256": digest, **details}
    data = save({"latents": plain}, metadata={"vaepp": json.dumps(header)})
    target = folder / f"latents-{first:04d}.safetensors"
    scratch = folder / f".{target.name}-{secrets.token_hex(8)}.tmp"
    try:
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)
        _sync(folder)  # the new name must last too
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return target


def load_latents(files: Sequence[str], device: torch.device) -> torch.Tensor:
    """The latents of all pictures, in order.

    Args:
        files: as `KeptRun.files` lists them.
        device: where they are wanted.

    Raises:
        UserError: a file has changed since it was checked.
    """
    parts = []
    for name in files:
        try:
            with safe_open(name, framework="pt") as file:
                # Memory of its own: what a file hands out may be the file itself, mapped.
                parts.append(file.get_tensor("latents").clone())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{name} cannot be read: {error}") from error
    return torch.cat(parts).to(device)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
