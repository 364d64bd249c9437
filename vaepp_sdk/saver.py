"""What a request makes, and how it is saved: names, metadata, and which rank writes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import attrs
from PIL.Image import Image

from vaepp_sdk.assembly import software
from vaepp_sdk.errors import OutputError
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.request import Request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.saving import Origin, PictureFolder, slug
from vaepp_sdk.vae.plan import Box

__all__ = ["Picture", "Saver"]


@attrs.frozen(eq=False)
class Picture:
    """One picture or clip, or a rectangle of one where the output stays sharded.

    Attributes:
        image: the pixels; of a clip, those of each frame.
        index: its number in the request.
        box: which rectangle it is; None for a whole picture.
    """

    image: Image | list[Image]
    index: int
    box: Box | None = None


@attrs.frozen(eq=False)
class Saver:
    """Saves what one rank has.

    Attributes:
        folder: where to.
        resolved: what runs.
        group: the DiT group.
        timeout: the limit of a wait for another rank.
    """

    folder: PictureFolder
    resolved: Resolved
    group: DiTGroup
    timeout: timedelta

    def save(
        self, request: Request, pictures: Sequence[Picture], *, sharded: bool, steps_down: Sequence[str]
    ) -> tuple[str, ...]:
        """Save what this rank has; of pictures that landed on every rank, rank 0's.

        Args:
            request: what was asked for.
            pictures: what landed here.
            sharded: whether each rank has pieces of its own.
            steps_down: what the decode did because a rank's memory was not enough.

        Raises:
            OutputError: a picture cannot be saved.
        """
        if self.group.rank != 0 and not sharded:
            return ()
        first = self._agreed_number(request.images) if sharded else self.folder.number(request.images)
        return tuple(self._save_one(request, picture, first, steps_down) for picture in pictures)

    def _save_one(self, request: Request, picture: Picture, first: int, steps_down: Sequence[str]) -> str:
        """Save one picture; where another run has taken its name meanwhile, under the next number."""
        number = first + picture.index
        while True:
            try:
                return self._save_as(number, request, picture, steps_down)
            except OutputError as error:
                # The pieces of one picture share a name, so ranks would have to agree on another.
                if picture.box is not None or not isinstance(error.__cause__, FileExistsError):
                    raise
                number = self.folder.renumber()

    def _agreed_number(self, count: int) -> int:
        """Rank 0's next number on every rank, so that the rectangles of a picture share a name."""
        number = self.folder.number(count) if self.group.rank == 0 else 0
        return self.group.told_by_rank0(number, "file number", self.timeout)

    def _save_as(self, number: int, request: Request, picture: Picture, steps_down: Sequence[str]) -> str:
        seed = request.seed + picture.index
        prompt = request.prompts[picture.index * len(request.prompts) // request.images]
        name = f"{number:04d}-{slug(prompt)}-seed{seed}"
        details: dict[str, Any] = {
            "spec": self.resolved.spec.to_shareable(),
            "call": dict(request.call),
            "pipeline": self.resolved.pipeline_class,
        }
        if steps_down:
            details["stepped_down"] = list(steps_down)
        if picture.box is not None:
            name += f"-y{picture.box.top}-x{picture.box.left}"
            if picture.box.frames is not None:
                name += f"-f{picture.box.frames[0]}"
            details["position"] = attrs.asdict(picture.box)
        origin = Origin(prompt, seed, details, software())
        if isinstance(picture.image, Image):
            return str(self.folder.save(picture.image, f"{name}.png", origin.png()))
        rate = self.resolved.clip_rate if picture.box is None else None
        return str(self.folder.save_clip(picture.image, name, origin, rate))
