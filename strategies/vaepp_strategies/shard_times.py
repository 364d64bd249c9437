"""Joins the windows of frames in which some VAEs run a long clip: on a band as on the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vaepp_strategies.blend import blend_into
from vaepp_strategies.tile_geometry import Span

__all__ = ["in_windows"]


def in_windows(
    run: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor, times: Sequence[Span]
) -> torch.Tensor:
    """Run each window of frames, blend it with the one before, and join what is kept.

    Args:
        run: decodes or encodes one window.
        value: the whole input, `(batch, channels, frames, rows, columns)` where it is cut in time.
        times: the windows; none to run the input in one piece.
    """
    if not times:
        return run(value)
    kept: list[torch.Tensor] = []
    before: torch.Tensor | None = None
    for span in times:
        window = run(value.narrow(2, span.start, span.length)).narrow(2, span.skip, span.out)
        if before is not None and span.blend:
            blend_into(before.narrow(2, before.shape[2] - span.blend, span.blend), window, -3)
        kept.append(window.narrow(2, 0, span.kept).clone())
        before = window
    return torch.cat(kept, dim=2)
