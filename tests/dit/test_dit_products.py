"""Products of dimensions: every pair on 4 ranks, and three at a time on 8."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from dims_jobs import CASES, GUIDED, TRUNCATED, Made, check, on

KEYS = (
    "data_parallel_size",
    "cfg_parallel_size",
    "pipeline_parallel_size",
    "ring_degree",
    "ulysses_degree",
    "tensor_parallel_size",
)


def test_every_pair_on_four_ranks(layered_model: Path, one_process: list[Made]) -> None:
    pairs = [dict.fromkeys(pair, 2) for pair in combinations(KEYS, 2)]
    calls = (GUIDED, TRUNCATED)
    wanted = [one_process[CASES.index(call)] for call in calls]
    for pair, found in zip(pairs, on(4, layered_model, *pairs, calls=calls), strict=True):
        check(found, wanted)
        assert [rank["groups"] for rank in found] == [2] * 4, (
            pair,
            "one group for each row that holds the rank",
        )


def test_three_at_a_time_on_eight_ranks(layered_model: Path, one_process: list[Made]) -> None:
    """Every dimension is in three of them, and meets each of the others once at least."""
    triples = [
        dict.fromkeys((KEYS[a], KEYS[b], KEYS[c]), 2)
        for a, b, c in (
            (0, 1, 5),
            (0, 2, 4),
            (1, 2, 3),
            (3, 4, 5),
            (0, 3, 5),
            (1, 4, 2),
            (2, 4, 5),
            (1, 3, 4),
        )
    ]
    found = on(8, layered_model, *triples, calls=(GUIDED,))
    for everyone in found:
        check(everyone, [one_process[CASES.index(GUIDED)]])
