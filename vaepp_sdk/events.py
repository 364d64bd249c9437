"""What observers of a run are told."""

from __future__ import annotations

import attrs

__all__ = ["Event", "LatentsKept", "Progress", "StageEnd", "StageStart"]


@attrs.frozen(kw_only=True)
class StageStart:
    """A stage is about to run on this rank.

    Attributes:
        rank: this rank in the DiT group.
        world_size: ranks in the DiT group.
        stage: `load`, `encode_prompt`, `denoise`, `decode`, `save`; `call` for a pipeline without entry.
        request: the request's number, counted from 0 in each run; -1 while loading.
    """

    rank: int
    world_size: int
    stage: str
    request: int


@attrs.frozen(kw_only=True)
class StageEnd:
    """A stage has ended on this rank.

    Attributes:
        rank: this rank in the DiT group.
        world_size: ranks in the DiT group.
        stage: the stage's name, as in `StageStart`.
        request: the request's number, as in `StageStart`.
        seconds: wall-clock time of the stage.
        peak_bytes: the most memory the device's allocator held during the stage; on CPU, the process's
            resident peak so far.
        error: one line naming what the stage raised, or None.
    """

    rank: int
    world_size: int
    stage: str
    request: int
    seconds: float
    peak_bytes: int
    error: str | None = None


@attrs.frozen
class Progress:
    """A stage has come further on this rank.

    Attributes:
        stage: the stage's name, as in `StageStart`.
        done: pieces of its work that are done: steps, tiles.
        total: pieces in all.
    """

    stage: str
    done: int
    total: int


@attrs.frozen
class LatentsKept:
    """The latents of a request are on the disk, whatever happens to the ranks now.

    Attributes:
        folder: the folder that holds them.
        request: the request's number, as in `StageStart`.
        stage: the stage that made them.
    """

    folder: str
    request: int
    stage: str = "denoise"


Event = StageStart | StageEnd | Progress | LatentsKept
