"""Runs families on many layouts in one launch, and holds what they make to that of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from dims_jobs import Call, Made, check, layout_rank
from families import Family, Layout

from vaepp_sdk.testing import run_ranks

Job = tuple[str, Call, Sequence[Layout], Sequence[Call]]


@attrs.frozen
class Model:
    """A checkpoint and what one process makes of it."""

    path: str
    family: Family
    wanted: list[Made]

    def job(self, layouts: Sequence[Layout]) -> Job:
        """Its requests on these layouts."""
        return self.path, self.family.base, layouts, self.family.calls


def families_rank(rank: int, jobs: Sequence[Job]) -> list[list[dict[str, Any]]]:
    """Each job's calls on each of its layouts."""
    return [layout_rank(rank, model, layouts, calls, base) for model, base, layouts, calls in jobs]


def models_in(folder: Path, families: Mapping[str, Family]) -> dict[str, Model]:
    """Build each family's checkpoint, and run its requests in one process."""
    models = {name: Model(str(folder / name), family, []) for name, family in families.items()}
    for name, family in families.items():
        family.build(folder / name)
    (found,) = run_ranks(1, families_rank, [model.job([{}]) for model in models.values()], timeout=900)
    return {
        name: attrs.evolve(model, wanted=made[0]["made"])
        for (name, model), made in zip(models.items(), found, strict=True)
    }


def check_on(
    ranks: int, models: Mapping[str, Model], chosen: Mapping[str, Sequence[tuple[str, ...]]]
) -> None:
    """Run each family on products of twos, all in one launch, and compare to one process."""
    layouts = {name: [dict.fromkeys(keys, 2) for keys in products] for name, products in chosen.items()}
    jobs = [models[name].job(layouts[name]) for name in layouts]
    found = run_ranks(ranks, families_rank, jobs, timeout=900, collective=300)
    for index, (name, tried) in enumerate(layouts.items()):
        for number, layout in enumerate(tried):
            everyone = [rank[index][number] for rank in found]
            check(everyone, models[name].wanted, exact=set(layout) <= models[name].family.exact)
            spare = all(size == ranks for size in layout.values())
            assert not spare or all(rank["groups"] == 0 for rank in everyone), "the world group serves"
