"""The data profile as the report shows it: a row per column, whatever the profile says of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

# What a profile usually says first; other keys follow in their own order.
_ORDER = (
    "role", "dtype", "rows", "nulls", "distinct", "histogram", "min", "mean", "median", "max",
    "std",
)  # fmt: skip
_LISTED = 4  # of a column's commonest values


def profile_table(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a profile of any form into a table: scalars as columns, counts as small bars."""
    columns = {name: _flat(said) for name, said in profile.items() if isinstance(said, Mapping)}
    counts = {said.get("rows") for said in columns.values()}
    num_rows = counts.pop() if len(counts) == 1 else None
    if num_rows is not None:  # the same for all columns: said once, above the table
        columns = {
            name: {key: value for key, value in said.items() if key != "rows"}
            for name, said in columns.items()
        }
    keys = list(dict.fromkeys(key for said in columns.values() for key in said))
    first = [key for key in _ORDER if key in keys]
    keys = first + [key for key in keys if key not in first]
    rows = [
        {"name": name, "cells": [said.get(key, "") for key in keys]}
        for name, said in columns.items()
    ]
    headings = [key.replace("_", " ") for key in keys]
    return {"headings": headings, "rows": rows, "num_rows": num_rows}


def _flat(said: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in said.items():
        name = f"{prefix}{key}"
        counts = _counts(value)
        if counts:
            flat[name] = _bars(counts)
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{name} ")
        elif isinstance(value, list | tuple):
            more = ["…"] if len(value) > _LISTED else []
            flat[name] = ", ".join([_item(item) for item in value[:_LISTED]] + more)
        else:
            flat[name] = _plain(value)
    return flat


def _counts(value: Any) -> list[float]:
    """The bar heights in ``value``, if it is a histogram: a list of counts, or one under a key."""
    if isinstance(value, Mapping):
        value = value.get("counts")
    is_list = isinstance(value, list) and len(value) > 1 and any(value)
    if is_list and all(isinstance(item, int | float) and item >= 0 for item in value):
        return [float(item) for item in value]
    return []


def _bars(counts: Sequence[float]) -> Markup:
    width, top = 96 / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{20 - 20 * count / top:.1f}" '
        f'width="{max(width - 0.5, 0.5):.1f}" height="{20 * count / top:.1f}"/>'
        for i, count in enumerate(counts)
        if count
    )
    return Markup(
        f'<svg class="bars" viewBox="0 0 96 20" role="img" aria-label="histogram">{bars}</svg>'
    )


def _item(item: Any) -> str:
    if isinstance(item, Mapping) and "value" in item and "count" in item:
        return f"{item['value']} ({item['count']:,})"
    return _plain(item)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)  # a year stays a year
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
