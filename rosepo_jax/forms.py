"""What JSON from a file must look like. A form is checked before anything is read out of a value.

A form is a type (`int` means at most 64 bits and no truth value, `float` any such number that leaves room to calculate,
`object` anything), None, a tuple of forms of which one must fit, `[form]` for a list, `[form, n]` for one of n entries,
or an object's keys with their forms: "key" must be there, "key?" may, `str` stands for all others (`str: ()`: none).
"""

import dataclasses
import os
import types
import typing
from typing import Any

from rosepo_jax.errors import UserError

Form = Any
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES |= {dict: "an object", list: "a list"}


def check(value: Any, form: Form, path: str | os.PathLike, remedy: str) -> Any:
    """`value`, which has this form; otherwise UserError with the file, the place in it, and what to do."""
    if reason := misfit(value, form):
        raise UserError(f"{path}: {reason}; {remedy}")
    return value


def of(kind: Any) -> Form:
    """The form of a dataclass, or of the type of one of its fields, in the JSON of `dataclasses.asdict`."""
    if dataclasses.is_dataclass(kind):
        required = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(kind)}
        known = {f.name + ("" if required[f.name] else "?"): of(f.type) for f in dataclasses.fields(kind)}
        return {**known, str: ()}
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return tuple(map(of, arguments))
    if typing.get_origin(kind) is tuple:
        return [of(arguments[0])] if arguments[-1] is ... else [object, len(arguments)]
    return {Any: object, types.NoneType: None}.get(kind, kind)


def misfit(value: Any, form: Form, place: str = "") -> str:
    """Where and why a value has not this form, "" if it has."""
    match form:
        case tuple():
            found = [misfit(value, each, place) for each in form]
            if not form:
                return f"{place} is not known"
            return "" if "" in found else max(found, key=len)  # the longest place: what was nearly right
        case list():
            each, *size = form
            if not isinstance(value, list) or (size and len(value) != size[0]):
                return _is_not(place, f"a list of {size[0]}" if size else "a list")
            return next(filter(None, (misfit(v, each, f"{place}[{i}]") for i, v in enumerate(value))), "")
        case dict():
            return _object(value, form, place)
        case None:
            return "" if value is None else _is_not(place, "null")
    if form is object:
        return ""
    if type(value) is int and form is float:
        form = int
    fits = type(value) is form
    if form is int:
        fits = fits and value.bit_length() < 64
    if form is float:
        fits = fits and abs(value) < 1e100
    return "" if fits else _is_not(place, _NAMES[form])


def _object(value: Any, form: dict, place: str) -> str:
    if not isinstance(value, dict):
        return _is_not(place, "an object")
    forms = {key.removesuffix("?"): each for key, each in form.items() if key is not str}
    for key in forms:
        if key not in value and f"{key}?" not in form:
            return f"{_join(place, key)} is missing"
    others = form.get(str, object)
    for key, inner in value.items():
        each = forms.get(key, others)
        if each is not object and (reason := misfit(inner, each, _join(place, key))):
            return reason
    return ""


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _is_not(place: str, kind: str) -> str:
    return f"{place or 'it'} is not {kind}"
