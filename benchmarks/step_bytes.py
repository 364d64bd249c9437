"""The bytes that each rank of a dimension sends in one call of a transformer: arithmetic, no tensors.

What is sent depends on the lists of blocks and on the sequences that run through them, not on the model's
family. `benchmarks.step_models` says what those are; a test counts the messages of real ranks against it.
"""

from __future__ import annotations

import attrs

from vaepp_sdk.dit.row import even_parts

__all__ = ["Chain", "Step", "sent"]

_SCALAR = 4
"""Bytes of a float32, in which squares are summed whatever the model's dtype."""


@attrs.frozen(kw_only=True)
class Chain:
    """A list of blocks; all counts are of tokens, of one item of the batch.

    Attributes:
        carried: of each sequence that goes from block to block.
        left: of each sequence that leaves the last block.
        attentions: for each attention to the split sequence, in all blocks: the sequences that it joins.
        sums: for each layer whose outputs, as wide as the model, tensor parallelism sums, in all blocks.
        squares: for each norm over all heads, for which it sums one number a token.
        dealt: whether pipeline parallelism deals the blocks over the ranks.
    """

    carried: tuple[int, ...]
    left: tuple[int, ...]
    attentions: tuple[tuple[int, ...], ...]
    sums: tuple[int, ...]
    squares: tuple[int, ...] = ()
    dealt: bool = True


@attrs.frozen(kw_only=True)
class Step:
    """One call of a transformer.

    Attributes:
        chains: its lists of blocks.
        heads: attention heads.
        width: of the model, a multiple of the heads.
        output: values that it makes of one item of the batch.
        batch: items.
        itemsize: bytes of a value.
        two_calls: whether each guidance branch has a call of its own, as large as this one.
    """

    chains: tuple[Chain, ...]
    heads: int
    width: int
    output: int
    batch: int = 1
    itemsize: int = 2
    two_calls: bool = False

    @property
    def token(self) -> int:
        """Bytes of one token of every item of the batch."""
        return self.batch * self.width * self.itemsize


def sent(step: Step, axis: str, size: int, rank: int) -> int:
    """The bytes that the rank at a place of a row sends, what it sends to several ranks counted once.

    Args:
        step: the call.
        axis: the row's dimension, the only one above 1.
        size: ranks of the row.
        rank: this rank's place.
    """
    if axis == "data":
        return 0
    if axis == "cfg":
        return _guidance(step, size)
    of_chain = {"pipeline": _pipeline, "ring": _ring, "ulysses": _ulysses, "tensor": _tensor}[axis]
    return sum(of_chain(step, chain, size, rank) for chain in step.chains)


def _guidance(step: Step, size: int) -> int:
    """Of one batch the larger half, as parts are gathered at one size; of two calls one."""
    items = step.batch if step.two_calls else max(even_parts(step.batch, size))
    return items * step.output * step.itemsize


def _pipeline(step: Step, chain: Chain, size: int, rank: int) -> int:
    """What is carried, to the next rank; what leaves, from the last rank to all."""
    return chain.dealt * step.token * sum(chain.left if rank == size - 1 else chain.carried)


def _own(sequences: tuple[int, ...], size: int) -> list[int]:
    """How many tokens of joined sequences each rank has."""
    return [sum(parts) for parts in zip(*(even_parts(length, size) for length in sequences), strict=True)]


def _gathered(step: Step, chain: Chain, size: int) -> int:
    """What leaves the last block is gathered at the size of the largest part."""
    return step.token * sum(max(even_parts(length, size)) for length in chain.left)


def _ring(step: Step, chain: Chain, size: int, rank: int) -> int:
    """Keys and values: a rank's own, and those it passes on, which are all but the next rank's."""
    tokens = sum(sum(own) - own[(rank + 1) % size] for own in (_own(s, size) for s in chain.attentions))
    return 2 * step.token * tokens + _gathered(step, chain, size)


def _ulysses(step: Step, chain: Chain, size: int, rank: int) -> int:
    """Queries, keys and values of the others' heads; of its own heads the outputs of the others' tokens."""
    mine = even_parts(step.heads, size)[rank]
    head = step.token // step.heads
    traded = 0
    for own in (_own(sequences, size) for sequences in chain.attentions):
        traded += 3 * own[rank] * (step.heads - mine) + (sum(own) - own[rank]) * mine
    return head * traded + _gathered(step, chain, size)


def _tensor(step: Step, chain: Chain, size: int, rank: int) -> int:
    """Every sum goes over whole outputs."""
    del size, rank
    return step.token * sum(chain.sums) + _SCALAR * step.batch * sum(chain.squares)
