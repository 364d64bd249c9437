"""Checks a strategy's options against what its entry declares."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from vaepp_sdk.entries import StrategyEntry
from vaepp_sdk.entry_checks import option_problem
from vaepp_sdk.errors import Fault, PluginError
from vaepp_sdk.text import key_path, shown, told

__all__ = ["nearest", "option_faults"]


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known key, or all of them where none is close."""
    names = sorted(known)
    folded = {other.casefold(): other for other in reversed(names)}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    return f"known here: {', '.join(names)}" if names else "nothing is known here"


def option_faults(entry: StrategyEntry, options: Mapping[str, Any], path: str) -> list[Fault]:
    """Every fault in the options given for one strategy.

    Args:
        entry: the strategy.
        options: names and values, as the user wrote them.
        path: where they stand, as in `$.vae.options`.

    Raises:
        PluginError: the entry's rule `conflict` raised.
    """
    declared = {option.name: option for option in entry.options}
    faults = []
    for name, value in options.items():
        where = key_path(path, name)
        if name not in declared:
            fix = nearest(name, declared) if declared else f"strategy {entry.name!r} takes no options"
            faults.append(Fault(where, f"strategy {entry.name!r} has no such option", fix))
            continue
        problem = option_problem(declared[name], value)
        if problem:
            faults.append(Fault(where, f"found {shown(value)}", problem))
    return faults or _conflict_faults(entry, options, path)


def _conflict_faults(entry: StrategyEntry, options: Mapping[str, Any], path: str) -> list[Fault]:
    """What the entry's own rule says of options that are each fine."""
    if entry.conflict is None:
        return []
    try:
        conflict = entry.conflict(options)
        return [Fault(path, *map(str, conflict))] if conflict is not None else []
    except Exception as error:
        raise PluginError(
            f"for strategy {entry.name}", f"its rule 'conflict' raised {told(error)}"
        ) from error
