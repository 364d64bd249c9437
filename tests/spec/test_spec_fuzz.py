"""Random specs: no wrong type is ever accepted, and nothing but the spec error comes out."""

from __future__ import annotations

import os
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaepp_sdk.errors import SpecError
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.spec.calls import COMMON
from vaepp_sdk.spec.structure import keys, table_class
from vaepp_sdk.spec.values import value_type

EXAMPLES = int(os.environ.get("VAEPP_FUZZ", "400"))
"""`make fuzz` sets more."""

_SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(),
    "integer": st.integers(),
    "number": st.floats(),
    "string": st.text(),
}
_CONTAINERS = st.one_of(
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(), st.integers(), max_size=3),
    st.just(None),
    st.binary(),
    st.dates(),
    st.builds(object),
)


def _fields() -> dict[tuple[str, str], set[str]]:
    """Every scalar key of the spec, and the kinds it takes."""
    found: dict[tuple[str, str], set[str]] = {}
    for name, field in keys(PipelineSpec).items():
        table = table_class(field)
        for key, inner in keys(table).items() if table else ():
            if key not in ("options", "lora"):
                found[name, key] = set(value_type(inner.type).scalars)
    found |= {("call", name): set(key.kind.scalars) for name, key in COMMON.items()}
    return found


FIELDS = _fields()


def _wrong(kinds: set[str]) -> st.SearchStrategy[Any]:
    """Values that a key of these kinds must not take; what Python may leave as None is left out."""
    fits = kinds | ({"integer"} if "number" in kinds else set())
    wrong = [strategy for kind, strategy in _SCALARS.items() if kind not in fits]
    return st.one_of(*wrong, _CONTAINERS.filter(lambda value: value is not None))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_no_wrong_type_is_accepted(data: st.DataObject) -> None:
    table, key = data.draw(st.sampled_from(sorted(FIELDS)))
    value = data.draw(_wrong(FIELDS[table, key]))
    if key.endswith("prompt") and isinstance(value, list):
        value = [*value, 1]  # an empty list is refused too, as a list without prompts
    tables: dict[str, dict[str, Any]] = {"model": {"id": "org/name"}}
    tables.setdefault(table, {})[key] = value
    with pytest.raises(SpecError) as caught:
        PipelineSpec.load(tables)
    assert [fault.path for fault in caught.value.faults] == [f"$.{table}.{key}"]


_ANY = st.recursive(
    st.one_of(*_SCALARS.values(), _CONTAINERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYS = sorted({key for _, key in FIELDS} | {"options", "trust_remote_code"})


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*sorted(keys(PipelineSpec)), "source", "base"])
        | st.text(max_size=8)
        | st.integers(),
        st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=8), _ANY, max_size=4) | _ANY,
        max_size=5,
    )
)
def test_random_tables_give_a_sound_spec_or_the_spec_error(tables: dict[Any, Any]) -> None:
    try:
        spec = PipelineSpec.load(tables)
    except SpecError as error:
        spec, message = None, str(error)
    else:
        message = ""
    assert all(char.isprintable() or char == "\n" for char in message)
    assert spec is None or PipelineSpec.load(spec.to_dict()) == spec


@settings(max_examples=EXAMPLES // 3, deadline=None)
@given(
    st.lists(st.text(max_size=40) | st.sampled_from(["vae.strategy=", "call.x=1", "model.id=b"]), max_size=3)
)
def test_random_overrides_give_a_spec_or_the_spec_error(overrides: list[str]) -> None:
    try:
        spec = PipelineSpec.load({"model": {"id": "org/name"}}, overrides)
    except SpecError:
        return
    assert attrs.has(type(spec))
