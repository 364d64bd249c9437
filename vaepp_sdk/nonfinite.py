"""Values that are not finite: found on the rank that made them, and told with their region."""

from __future__ import annotations

import warnings

import torch

from vaepp_sdk.errors import RankError, VaeppWarning

__all__ = ["BLACK", "bad_region", "check_latents", "complain"]

BLACK = -1.0
"""The darkest value a VAE of diffusers gives."""


def check_latents(latents: torch.Tensor, rank: int, *, allowed: bool) -> None:
    """Look at the latents that a rank has made, as the pipeline returns them.

    Raises:
        RankError: they hold values that are not finite, and that is not allowed.
    """
    bad = ~torch.isfinite(latents)
    if bool(bad.any()):
        # Some pipelines pack latents into a sequence, which has no rows and columns.
        where = f" in {bad_region(bad)}" if latents.ndim > 3 else ""
        complain(
            rank,
            "denoise",
            f"the latents hold values that are not finite (NaN or Inf){where}",
            allowed=allowed,
        )


def bad_region(bad: torch.Tensor, top: int = 0, left: int = 0) -> str:
    """The rectangle around the marked values, and the pictures that have any.

    Args:
        bad: `(batch, channels, [frames,] rows, columns)`, true where a value is not finite; some are.
        top: the row at which the first one stands in the whole picture.
        left: likewise, its column.
    """
    plane = bad.flatten(0, -3).any(0)
    rows, columns = (plane.any(dim).nonzero().flatten() for dim in (1, 0))
    where = (
        f"rows {top + int(rows[0])} to {top + int(rows[-1])}, "
        f"columns {left + int(columns[0])} to {left + int(columns[-1])}"
    )
    if bad.shape[0] == 1:
        return where
    pictures = [str(index) for index, one in enumerate(bad.flatten(1).any(1).tolist()) if one]
    return f"{where} of picture{'s' if len(pictures) > 1 else ''} {', '.join(pictures)}"


def complain(rank: int, stage: str, problem: str, *, allowed: bool) -> None:
    """Refuse what a rank has made, or warn of it where it is allowed.

    Raises:
        RankError: it is not allowed.
    """
    if not allowed:
        raise RankError(
            rank, stage, f"{problem}; nothing was saved ([output] allow_nonfinite = true allows it)"
        )
    warnings.warn(f"rank {rank}, stage {stage}: {problem}; they are allowed", VaeppWarning, stacklevel=2)
