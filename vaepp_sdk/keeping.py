"""Keeps a request's latents from `denoise` on: what fails after it costs no denoising."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path

import attrs
import torch

from vaepp_sdk.assembly import software
from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.events import LatentsKept
from vaepp_sdk.kept import remove_run, settings_of
from vaepp_sdk.latents import LatentStore, write_latents
from vaepp_sdk.model_folder import ModelFolder
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.request import Request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.stages import Observer
from vaepp_sdk.text import reason_of

__all__ = ["Keeper"]

_NOWHERE = -1
_SPARE = -2
"""Where rank 0 says that latents are: a run's number in the store, this less a run's number in the spare
one, or nowhere."""


@attrs.frozen(eq=False)
class Keeper:
    """Writes latents before decode begins: a rank that is killed in decode could not write them any more.

    Attributes:
        store: where runs keep their latents.
        resolved: what runs.
        group: the DiT group, seen from this rank.
        timeout: the limit of one wait for rank 0.
        observer: told on every rank where the latents are.
        spare: where they are kept when the store's disk is full, or cannot be written for another reason.
    """

    store: LatentStore
    resolved: Resolved
    group: DiTGroup
    timeout: timedelta
    observer: Observer
    spare: LatentStore = attrs.field(factory=LatentStore.temporary)

    def keep(self, latents: torch.Tensor | None, own: range, request: Request) -> None:
        """Write the latents of this rank's replica; every rank calls this once the replica has made them.

        Ranks of one replica leave once rank 0 has written. Where nothing can be written, in the spare store
        neither, the run goes on after a warning: its pictures may still come out.

        Args:
            latents: this replica's; None where it made none.
            own: the numbers of its pictures.
            request: the request.

        Raises:
            PeerError: rank 0 is gone, or did not answer in time.
        """
        place = self._first(latents, own, request) if self.group.rank == 0 else _NOWHERE
        place = self.group.told_by_rank0(place, "run number", self.timeout)
        if place == _NOWHERE:
            return
        folder = self.store.run(place) if place >= 0 else self.spare.run(_SPARE - place)
        leads = self.group.rank % (self.group.world_size // self.group.dims.data) == 0
        if leads and self.group.rank != 0:
            try:
                self._write(folder, latents, own, request)
            except OSError as error:
                _warn(f"the latents cannot be kept in {folder} ({reason_of(error)}); what fails loses them")
        self.observer(LatentsKept(str(folder), request.number))

    def _first(self, latents: torch.Tensor | None, own: range, request: Request) -> int:
        """Write rank 0's latents where they fit, and return where that is, as one number for all ranks."""
        try:
            return self._new_run(self.store, latents, own, request)
        except OSError as error:
            problem = f"the latents cannot be kept in {self.store.path} ({reason_of(error)})"
        try:
            number = self._new_run(self.spare, latents, own, request)
        except OSError as error:
            also = f"nor in {self.spare.path} ({reason_of(error)})"
            _warn(f"{problem}, {also}; what fails from here on loses them")
            return _NOWHERE
        _warn(f"{problem}; they are in {self.spare.run(number)} while this request runs")
        return _SPARE - number

    def _new_run(self, store: LatentStore, latents: torch.Tensor | None, own: range, request: Request) -> int:
        """The number of a new run with rank 0's latents in it; a folder that gets none goes."""
        number = store.new_run()
        try:
            self._write(store.run(number), latents, own, request)
        except OSError:
            remove_run(store.run(number))
            raise
        return number

    def _write(self, folder: Path, latents: torch.Tensor | None, own: range, request: Request) -> None:
        if latents is None:
            return
        model = ModelFolder(self.resolved.model_path, self.resolved.pipeline_class, ())
        details = {
            "spec": self.resolved.spec.to_dict(),
            "call": dict(request.call),
            "seed": request.seed,
            "images": request.images,
            "pipeline": self.resolved.pipeline_class,
            "vae": settings_of(model.config("vae")),
            "software": software(),
        }
        write_latents(folder, latents, own.start, details)


def _warn(text: str) -> None:
    warnings.warn(text, VaeppWarning, stacklevel=2)
