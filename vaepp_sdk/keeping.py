"""Keeps a request's latents from `denoise` on: what fails after it costs no denoising."""

from __future__ import annotations

import warnings
from datetime import timedelta

import attrs
import torch

from vaepp_sdk.assembly import software
from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.events import LatentsKept
from vaepp_sdk.kept import settings_of
from vaepp_sdk.latents import LatentStore, write_latents
from vaepp_sdk.model_folder import ModelFolder
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.request import Request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.stages import Observer

__all__ = ["Keeper"]

_NOWHERE = -1


@attrs.frozen(eq=False)
class Keeper:
    """Writes latents before decode begins: a rank that is killed in decode could not write them any more.

    Attributes:
        store: where runs keep their latents.
        resolved: what runs.
        group: the DiT group, seen from this rank.
        timeout: the limit of one wait for rank 0.
        observer: told on every rank where the latents are.
    """

    store: LatentStore
    resolved: Resolved
    group: DiTGroup
    timeout: timedelta
    observer: Observer

    def keep(self, latents: torch.Tensor | None, own: range, request: Request) -> None:
        """Write the latents of this rank's replica; every rank calls this once the replica has made them.

        Ranks of one replica leave once rank 0 has written. Where nothing can be written the run goes on after
        a warning: its pictures may still come out.

        Args:
            latents: this replica's; None where it made none.
            own: the numbers of its pictures.
            request: the request.

        Raises:
            PeerError: rank 0 is gone, or did not answer in time.
        """
        replicas = self.group.dims.data
        number = self._new_run() if self.group.rank == 0 else _NOWHERE
        leads = latents is not None and self.group.rank % (self.group.world_size // replicas) == 0
        if leads and self.group.rank == 0:
            self._write(number, latents, own, request)
        number = self.group.told_by_rank0(number, "run number", self.timeout)
        if leads and self.group.rank != 0:
            self._write(number, latents, own, request)
        if number != _NOWHERE:
            self.observer(LatentsKept(str(self.store.run(number)), request.number))

    def _new_run(self) -> int:
        try:
            return self.store.new_run()
        except OSError as error:
            _tell(self.store, error)
            return _NOWHERE

    def _write(self, number: int, latents: torch.Tensor | None, own: range, request: Request) -> None:
        if number == _NOWHERE or latents is None:
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
        try:
            write_latents(self.store.run(number), latents, own.start, details)
        except OSError as error:
            _tell(self.store, error)


def _tell(store: LatentStore, error: OSError) -> None:
    reason = error.strerror or str(error)
    warnings.warn(
        f"the latents cannot be kept in {store.path} ({reason}); what fails from here on loses them",
        VaeppWarning,
        stacklevel=2,
    )
