"""How many bytes `deterministic = "reference"` holds at its peak: an estimate from a trace of the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.plan import Work
from vaepp_strategies.reference_layers import ReferenceLayer, whole_side
from vaepp_strategies.shard_frames import traced, window_frames
from vaepp_strategies.shard_plan import ShardPlan

__all__ = ["ReferenceMemory"]


@attrs.frozen(kw_only=True)
class ReferenceMemory:
    """The bytes of one picture's or clip's bands.

    Attributes:
        facts: the VAE.
        work: what is asked.
        plain: the plain mode's plan of the same work.
        layers: the layers that do not run on a band as they are; none where one rank does all the work.
    """

    facts: VaeFacts
    work: Work
    plain: ShardPlan
    layers: Mapping[str, ReferenceLayer]

    def peaks(self) -> tuple[int, ...]:
        """Every active rank's live bytes at their peak, weights and the input excluded."""
        if not self.layers:
            return self.plain.peak_bytes
        whole = self._whole()
        # A normalisation holds its input and output twice over: as bands, and as whole channels. So does a
        # convolution, with the neighbours' rows and without.
        return tuple(max(2 * peak, whole) for peak in self.plain.peak_bytes)

    def _whole(self) -> int:
        """The most bytes while a layer runs on the whole."""
        return max(self._in_window(count) for count in set(window_frames(self.work, self.plain.times)))

    def _in_window(self, frames: int) -> int:
        trace = traced(self.facts, self.work.direction, frames)
        share = math.prod(self.work.shape[-2:]) / math.prod(trace.in_shape[-2:])
        _, apart = whole_side(trace, self.work.direction)
        values = 0.0
        for call in trace.calls:
            layer = self.layers.get(call.name)
            given, made = math.prod(call.in_shape), math.prod(call.out_shape)
            if call.name in apart:
                values = max(values, call.peak + made / self._ranks)
            elif layer is not None and layer.how == "whole":
                # It gathers bands, joins them, and cuts its own band out of what comes of them.
                values = max(values, (call.before + given + made) / self._ranks + 2 * given + made)
        return self.work.shape[0] * int(share * values) * self.work.itemsize

    @property
    def _ranks(self) -> int:
        return len(self.plain.windows)
