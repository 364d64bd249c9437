"""Where ranks compare their plans, before the first message of a decode or encode."""

from __future__ import annotations

import attrs

from vaepp_sdk.parallel.gate import Gate
from vaepp_sdk.vae.plan import WorkPlan

__all__ = ["PlanGate"]


@attrs.frozen
class PlanGate:
    """Compares what every rank of a job, or of a group of it, has planned.

    Attributes:
        gate: theirs.
    """

    gate: Gate

    def __call__(self, planned: WorkPlan | Exception) -> None:
        """Go on only if all ranks have the same plan.

        Args:
            planned: this rank's plan, or the error that kept it from one: the caller raises that afterwards.

        Raises:
            AgreementError: plans differ; on every rank.
            PeerError: another rank has no plan, or has not come in time.
        """
        if self.gate.is_open:
            return
        if isinstance(planned, WorkPlan):
            self.gate.agree("decoding", {"the work plan": f"{planned.strategy} {planned.digest}"})
        else:
            self.gate.give_up("decoding", f"{type(planned).__name__} in planning: {_first_line(planned)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no words"])[0]
