"""The drop-in for `pipe.vae`: the same methods, spread over the ranks."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vaepp_sdk.errors import RunError
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.arguments import CallArguments, read_arguments
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.descent import Descent, OnOom, StepDown
from vaepp_sdk.vae.facts import Direction
from vaepp_sdk.vae.inputs import check_input
from vaepp_sdk.vae.landing import Landed, ShardedSample
from vaepp_sdk.vae.plan import Output, WorkPlan

__all__ = ["ParallelVAE"]

_BUSY: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
"""Held while a VAE works: one object may be wrapped several times, with other settings."""


class ParallelVAE(nn.Module):
    """A VAE whose decode and encode run on the first ranks of the DiT group.

    Everything else (`config`, `dtype`, `device`, the tiling and slicing switches, every other attribute) is
    the wrapped VAE's own. All ranks of the group must call `decode` and `encode` alike, with equal inputs.

    Args:
        adapter: the adapter of the wrapped VAE.
        group: the VAE's view of the DiT group.
        chooser: picks the strategy of each call.
        output: where results land. With `rank0`, other ranks get an empty batch, so that a pipeline's own
            post-processing yields no pictures there; with `sharded`, a `ShardedSample`.
        on_oom: what happens where a rank's memory is not enough: `step_down` or `fail`.
        sharers: ranks that share this host's memory.

    Attributes:
        descent: how calls are run, and what was done where memory was not enough.
    """

    def __init__(
        self,
        adapter: VaeAdapter,
        group: VaeGroup,
        chooser: StrategyChooser,
        output: Output,
        *,
        on_oom: OnOom = "step_down",
        sharers: int = 1,
    ) -> None:
        super().__init__()
        self.vae = adapter.vae
        self._adapter = adapter
        self._group = group
        self._output: Output = output
        self._busy = _BUSY.setdefault(adapter.vae, threading.Lock())
        self.descent = Descent(group, chooser, output, on_oom, sharers=sharers)

    @property
    def last_plan(self) -> WorkPlan | None:
        """The plan of the last call, or None."""
        return self.descent.plan

    @property
    def steps_down(self) -> tuple[StepDown, ...]:
        """What the last call did because memory was not enough."""
        return self.descent.steps

    def __getattr__(self, name: str) -> Any:
        """Attributes the wrapper lacks are the wrapped VAE's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_old_forward":  # accelerate's mark of a hook on this very module
                raise
            return getattr(super().__getattr__("vae"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings of the wrapped VAE, such as `use_tiling` or its tile sizes, are set there.

        What the wrapper itself has, methods included, and private names are set here: accelerate replaces
        `forward` and leaves a hook on the module that a pipeline holds.
        """
        wrapped = self.__dict__.get("_modules", {}).get("vae")
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if wrapped is not None and not own and hasattr(wrapped, name):
            setattr(wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """An attribute that only the wrapped VAE has, such as accelerate's hook, is deleted there."""
        if name in self.__dict__ or name in self._modules:
            super().__delattr__(name)
        else:
            delattr(self.vae, name)

    @torch.no_grad()
    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Decode latents, the same on every rank.

        Takes and returns what the wrapped class's own `decode` does, latents of shape
        `(batch, latent channels, [frames,] rows, columns)` in the VAE's dtype first. A generator has no
        effect: decoding draws no random numbers.

        Raises:
            TypeError: the wrapped class's `decode` does not take these arguments.
            UnsupportedError: this work cannot be done; on every rank alike, before any collective.
            AgreementError: ranks have different plans or inputs; on every rank.
            RankError: a rank's memory is not enough, whatever is tried; on every rank alike.
            PeerError: another rank is gone or did not answer in time.
        """
        call = read_arguments(self.vae.decode, type(self.vae).__name__, args, kwargs)
        return self._adapter.wrap_decode(self._run("decode", call), call.return_dict)

    @torch.no_grad()
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Encode pictures, the same on every rank.

        Takes and returns what the wrapped class's own `encode` does, pictures of shape
        `(batch, picture channels, [frames,] rows, columns)` in the VAE's dtype first.

        Raises:
            TypeError: the wrapped class's `encode` does not take these arguments.
            UnsupportedError: this work cannot be done; on every rank alike, before any collective.
            AgreementError: ranks have different plans or inputs; on every rank.
            RankError: a rank's memory is not enough, whatever is tried; on every rank alike.
            PeerError: another rank is gone or did not answer in time.
        """
        call = read_arguments(self.vae.encode, type(self.vae).__name__, args, kwargs)
        return self._adapter.wrap_encode(self._run("encode", call), call.return_dict)

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refused: a round trip would need the posterior on every rank; call `encode` and `decode`."""
        raise NotImplementedError("call encode() and decode() of a parallel VAE, not the module itself")

    def _run(self, direction: Direction, call: CallArguments) -> torch.Tensor | ShardedSample:
        if not self._busy.acquire(blocking=False):
            raise RunError(
                f"this parallel {type(self.vae).__name__} is already running in another thread; "
                "call it from one thread at a time"
            )
        try:
            adapter = self.descent.planned(lambda: self._prepared(direction, call))
            return self._result(self.descent.run(adapter, direction, call.value), call.value)
        finally:
            self._busy.release()

    def _prepared(self, direction: Direction, call: CallArguments) -> VaeAdapter:
        """The adapter for one call, once its input is checked and the VAE is where it computes."""
        _onload(self)
        _onload(self.vae)
        check_input(self._adapter.facts(), direction, call.value, self.vae)
        return self._adapter.with_arguments(direction, call.further)

    def _result(self, landed: list[Landed], value: torch.Tensor) -> torch.Tensor | ShardedSample:
        """One result of all slices: the whole output, an empty batch, or this rank's pieces."""
        if self._output == "sharded":
            shape = (sum(part.shape[0] for part in landed), *landed[0].shape[1:])
            return ShardedSample(shape, _join([part.pieces for part in landed]))
        samples = [part.sample for part in landed if part.sample is not None]
        if not samples:
            return value.new_empty((0, *landed[0].shape[1:]))
        return samples[0] if len(samples) == 1 else torch.cat(samples)


def _join(slices: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Pieces of several slices as pieces of one batch; the slices were cut alike."""
    if len(slices) == 1:
        return slices[0]
    return tuple(
        type(pieces[0])(pieces[0].box, torch.cat([piece.tensor for piece in pieces]))
        for pieces in zip(*slices, strict=True)
    )


def _onload(vae: nn.Module) -> None:
    """Let an offload hook on this module bring it to its device, as diffusers' own decode does."""
    hook = vars(vae).get("_hf_hook")
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)
