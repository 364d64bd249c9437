"""Applies a pipeline's plan to its transformer: the dimensions that do not change weights."""

from __future__ import annotations

from typing import Any

from vaepp_sdk.dit.chain import Chain
from vaepp_sdk.dit.guidance import BatchSplit, CallSplit
from vaepp_sdk.dit.line import Stage
from vaepp_sdk.dit.row import Row
from vaepp_sdk.dit.sequence import SequenceSplit
from vaepp_sdk.entries import DiTPlan
from vaepp_sdk.parallel.group import DiTGroup

__all__ = ["spread", "stages_of", "transformers_of"]


def stages_of(plan: DiTPlan, group: DiTGroup) -> tuple[Stage, ...]:
    """This rank's run of each list of layers; empty where it holds them all."""
    row = Row.over(group.axis("pipeline"))
    if plan.pipeline is None or row.size == 1:
        return ()
    return tuple(Stage(chain, row) for chain in plan.pipeline.chains)


def transformers_of(pipe: Any, plan: DiTPlan) -> tuple[Any, ...]:
    """The components that a plan spreads, as far as the pipeline has them."""
    found = (getattr(pipe, name, None) for name in plan.components)
    return tuple(model for model in found if model is not None)


def spread(model: Any, plan: DiTPlan, group: DiTGroup) -> None:
    """Let a transformer that holds this rank's weights run over its rows of the DiT group.

    Nothing is exchanged yet, and no process group is created.
    """
    split = SequenceSplit(Row.over(group.axis("ulysses")), Row.over(group.axis("ring")))
    stages = {stage.plan.blocks: stage for stage in stages_of(plan, group)}
    chains = {blocks: stage.plan for blocks, stage in stages.items()}
    if plan.sequence is not None and split.size > 1:
        chains |= {chain.blocks: chain for chain in plan.sequence.chains}
    for blocks, chain in chains.items():
        shared = split if split.size > 1 else None
        model.set_submodule(blocks, Chain(model.get_submodule(blocks), chain, shared, stages.get(blocks)))
    row = Row.over(group.axis("cfg"))
    if plan.batch is not None and row.size > 1:
        model.forward = BatchSplit(model.forward, plan.batch, row)
    elif plan.calls is not None and row.size > 1:
        model.forward = CallSplit(model.forward, plan.calls, row)
