"""Where ranks compare their plans, before the first message of a decode or encode."""

from __future__ import annotations

import attrs
import torch

from vaepp_sdk.parallel.fingerprint import fingerprint
from vaepp_sdk.parallel.gate import Gate
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.plan import WorkPlan

__all__ = ["PlanGate"]

_BEFORE = {"decode": "decoding", "encode": "encoding"}

_INPUT = "the input (seed all ranks alike, or broadcast it)"


@attrs.frozen
class PlanGate:
    """Compares what every rank of a job, or of a group of it, has planned.

    Attributes:
        gate: theirs.
        sharers: the ranks that must hold the same input, where nobody has compared it; else None.
    """

    gate: Gate
    sharers: VaeGroup | None = None

    def __call__(self, planned: WorkPlan | Exception, value: torch.Tensor | None = None) -> None:
        """Go on only if all ranks have the same plan, and those that work the same input.

        Args:
            planned: this rank's plan, or the error that kept it from one: the caller raises that afterwards.
            value: what is decoded or encoded next, of any shape; None where nothing is yet.

        Raises:
            AgreementError: plans or inputs differ; on every rank.
            PeerError: another rank has no plan, or has not come in time.
        """
        if self.gate.is_open:
            return
        if not isinstance(planned, WorkPlan):
            self.gate.give_up("VAE work", f"{type(planned).__name__} in planning: {_first_line(planned)}")
            return
        facts = {"the work plan": f"{planned.strategy} {planned.digest}"}
        works = value is not None and self.sharers is not None and self.sharers.is_member
        own = {_INPUT: fingerprint(value)} if works and value is not None else {}
        self.gate.agree(_BEFORE[planned.work.direction], facts, own)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no words"])[0]
