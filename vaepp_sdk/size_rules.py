"""Which sizes a pipeline itself can make, read from its model's files: told before a rank starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from vaepp_sdk.entries import PipelineEntry, SizeRule
from vaepp_sdk.errors import Fault, UnsupportedError, VaeppError
from vaepp_sdk.model_folder import ModelFolder

__all__ = ["CallSize", "read_sizes", "size_faults"]


@attrs.frozen
class CallSize:
    """The values that one argument of a pipeline's call can have: `first`, and every `step` from there on."""

    argument: str
    first: int
    step: int

    def fits(self, value: int) -> bool:
        """Whether a value is one of them."""
        return value >= self.first and (value - self.first) % self.step == 0

    def nearest(self, value: int) -> list[int]:
        """The one below a value that is not one of them, and the one above it."""
        if value < self.first:
            return [self.first]
        below = value - (value - self.first) % self.step
        return [below, below + self.step]

    def __str__(self) -> str:
        """The rule in words."""
        if self.first == self.step:
            return f"multiples of {self.step} work"
        return f"{self.first}, {self.first + self.step}, {self.first + 2 * self.step} and so on work"


def read_sizes(entry: PipelineEntry | None, folder: ModelFolder) -> tuple[CallSize, ...]:
    """What an entry's rules come to for one model.

    Raises:
        SpecError: a component's `config.json` cannot be read.
        UnsupportedError: it does not give what a rule asks for.
    """
    rules = entry.sizes if entry is not None else ()
    return tuple(_read(rule, folder) for rule in rules)


def size_faults(call: Mapping[str, Any], sizes: Sequence[CallSize], path: str = "$.call") -> list[Fault]:
    """Every size in a call that its pipeline would refuse, or make another one of; of other types nothing."""
    faults = []
    for size in sizes:
        value = call.get(size.argument)
        if isinstance(value, int) and not isinstance(value, bool) and not size.fits(value):
            nearest = " and ".join(map(str, size.nearest(value)))
            verb = "is" if value < size.first else "are"
            faults.append(
                Fault(f"{path}.{size.argument}", f"found {value}", f"{size}; {nearest} {verb} nearest")
            )
    return faults


def _read(rule: SizeRule, folder: ModelFolder) -> CallSize:
    try:
        step = rule.step(folder.config)
    except VaeppError:
        raise
    except Exception as error:
        # The rule is a plugin's and the file a model's: whichever is wrong, the pair does not fit.
        problem = f"{type(error).__name__}: {error}"
        raise UnsupportedError(
            f"the model's config.json files do not say which {rule.argument} works ({problem})"
        ) from error
    return CallSize(rule.argument, rule.first or step, step)
