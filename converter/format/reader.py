"""Values of JSON as frozen dataclasses: each key is a field, and each value has the field's type, or it is refused.

A field is a str, a bool, a float, an int (a size or a count: 0 to 2**63 - 1), a dataclass, a `Mapping[str, X]`, a
list as `tuple[X, ...]` or as a tuple of a fixed length, or any of these `| None`. A field `class_` is the key `class`.
A field with a default may be missing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


def read_value(kind: Any, value: Any, where: str) -> Any:
    """The value as a `kind`. Raises ValueError with a clause that says where it is something else."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is UnionType:
        return None if value is None else read_value(next(a for a in args if a is not NoneType), value, where)
    if is_dataclass(origin) and isinstance(value, dict):
        return _read_fields(kind, value, where)
    if origin is Mapping and isinstance(value, dict):
        return {key: read_value(args[1], item, f"{key!r:.80} of {where}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list) and (args[-1] is ... or len(value) == len(args)):
        return tuple(read_value(args[0], item, f"an item of {where}") for item in value)
    if type(value) is kind and (kind is not int or 0 <= value < 2**63):
        return value
    raise ValueError(f"{where} is {value!r:.40}")


def as_json(value: Any) -> Any:
    """What `read_value` reads: the dataclasses in a value as dicts, keys in the order of their fields."""
    if is_dataclass(value):
        return {f.name.rstrip("_"): as_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, tuple | list) else value


def _read_fields(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    types, by_key = _fields_of(kind)
    found = {}
    if unknown := next((key for key in value if key not in by_key), None):
        raise ValueError(f"{where} has the unknown key {unknown!r:.80}")
    for key, field in by_key.items():
        if key in value:
            found[field.name] = read_value(types[field.name], value[key], f"{key!r:.80} of {where}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where} lacks {key}")
    return kind(**found)


@functools.cache
def _fields_of(kind: Any) -> tuple[dict[str, Any], dict[str, Field[Any]]]:
    """The types of a dataclass's fields by name, and the fields by key."""
    return get_type_hints(kind), {f.name.rstrip("_"): f for f in fields(kind)}
