"""A plugin that counts each rank's process groups after every request, for `benchmarks.soak`.

`VAEPP_SOAK` names a folder; rank r writes the number into the file `groups-r` there.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch.distributed import distributed_c10d

from vaepp_sdk import hookimpl
from vaepp_sdk.events import StageEnd

VAEPP_API = 1


@hookimpl
def vaepp_on_stage_end(event: StageEnd) -> None:
    """Write how many process groups this rank has."""
    if event.stage == "decode":
        count = len(distributed_c10d._world.pg_map)
        (Path(os.environ["VAEPP_SOAK"]) / f"groups-{event.rank}").write_text(str(count))
