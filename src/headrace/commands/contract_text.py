"""The text of a new params.yaml and of a new recipe: written to be read, reviewed and edited.

Only what a person is likely to change is written out; every other setting has its default, which
is in the section's class. Every scalar is written so that all YAML readers take it alike.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from headrace.data.engine import identifier
from headrace.schema import ROW_ID, Contract

_PLAIN = re.compile(r"^[A-Za-z_][A-Za-z0-9_./ *-]*$")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan"}
_SQL_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_MAX_LISTED = 1000  # columns; params.yaml is read with a limit on its size
_MAX_WIDTH = 64  # of a declaration, so that the reasons form a column of their own


@dataclass(frozen=True)
class Draft:
    """What params.yaml is written from; ``sources`` and ``split`` hold only what is set."""

    name: str
    sources: Mapping[str, Mapping[str, Any]]
    recipe: str
    key: Sequence[str]
    contract: Contract
    reasons: Mapping[str, str]
    split: Mapping[str, Any]
    split_reason: str
    memory_budget: str
    threads: int
    models: Sequence[str]


def params_text(draft: Draft) -> str:
    """Return the text of params.yaml."""
    parts = [
        _HEAD,
        "\nversion: 1\n",
        _resources(draft),
        f"\n# The models to train and compare; take one out and its stage goes with it.\n"
        f"models: [{', '.join(draft.models)}]\n",
        _extract(draft),
        _rest(draft),
    ]
    return "".join(parts)


def recipe_text(source: str, columns: Iterable[str], *, has_row_id: bool, dates: set[str]) -> str:
    """Return a recipe that passes on all columns of one source, one to a line."""
    names = [*([ROW_ID] if has_row_id else []), *columns]
    lines = []
    for position, name in enumerate(names):
        comma = "," if position < len(names) - 1 else ""
        shown = sql_name(name)
        note = ""
        if name == ROW_ID and has_row_id:
            note = "  -- the row's identity, given by headrace; keep it"
        elif name in dates:
            note = f"  -- a date; a feature of it: month({shown}) AS {_stem(name)}_month"
        lines.append(f"  {shown}{comma}{note}")
    return (
        "-- The rows of the training table, in DuckDB's SQL. Sources go by their names in\n"
        "-- params.yaml. Leave out, rename, compute or join columns here: one SELECT (WITH is\n"
        "-- fine). What is not known when a prediction is made must not be a column.\n"
        "SELECT\n" + "\n".join(lines) + f"\nFROM {sql_name(source)}\n"
    )


def sql_name(name: str) -> str:
    """Return an SQL name, quoted where it has to be.

    >>> print(sql_name("Hardness"), sql_name("order"), sql_name("a b"))
    Hardness "order" "a b"
    """
    is_plain = _SQL_NAME.match(name) and name.casefold() not in _reserved()
    return name if is_plain else identifier(name)


def scalar(value: Any) -> str:
    """Return ``value`` as one YAML scalar that every reader understands alike.

    >>> scalar("no"), scalar("a: b"), scalar("weather"), scalar(0.5)
    ('"no"', '"a: b"', 'weather', '0.5')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    is_plain = (
        _PLAIN.match(text) and text.casefold() not in _WORDS and text == text.strip() and text
    )
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def flow(value: Any) -> str:
    """Return a value as one line of YAML.

    >>> flow({"role": "numeric", "labels": ["0", "1"]})
    '{role: numeric, labels: ["0", "1"]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(part) for part in value) + "]"
    return scalar(value)


_HEAD = """\
# Written by `headrace init` for you to review; edit it freely. Each section belongs to the stage of
# the same name: a change in it runs that stage again and what depends on it, nothing else.
# `headrace why` tells what would run, `headrace run --dry-run` what it would take.
"""


def _resources(draft: Draft) -> str:
    return (
        "\n# What a run may use, all its processes together. No result depends on it.\n"
        "resources:\n"
        f"  memory_budget: {draft.memory_budget}\n"
        f"  threads: {draft.threads}\n"
        "  workers: 0  # processes that read batches; 0: the training process reads itself\n"
    )


def _extract(draft: Draft) -> str:
    lines = [
        "\n# Where the rows come from, what each column is, and how rows are divided.",
        "extract:",
        "  # The names are those the recipe uses. Files are read strictly, by these settings.",
        "  sources:",
    ]
    for name, settings in draft.sources.items():
        if set(settings) == {"path"}:
            lines.append(f"    {scalar(name)}: {scalar(settings['path'])}")
        else:
            lines.append(f"    {scalar(name)}:")
            lines += [f"      {key}: {flow(value)}" for key, value in settings.items()]
    lines.append(f"  recipe: {scalar(draft.recipe)}  # one SELECT over the sources")
    if draft.key:
        lines.append(f"  key: {flow(list(draft.key))}  # the columns that identify a row")
    else:
        lines.append("  key: []  # the columns that identify a row; none: its place in its file")
    lines.append("  # What is predicted. labels[1] is the positive class.")
    lines.append("  targets:")
    targets = []
    for target in draft.contract.targets:
        entry: dict[str, Any] = {"task": target.task}
        entry |= {"labels": list(target.labels)} if target.labels else {}
        targets.append((f"    {scalar(target.name)}: {flow(entry)}", draft.reasons[target.name]))
    lines += _commented(targets)
    lines += _columns(draft)
    lines.append(f"  # {draft.split_reason}")
    lines.append("  split:")
    lines += [f"    {key}: {flow(value)}" for key, value in draft.split.items()]
    lines.append("  folds: 5  # parts of the train rows: inner validation, out-of-fold predictions")
    lines.append("  rejects_budget: 0  # rows of CSV files that may be unreadable, listed if any")
    return "\n".join(lines) + "\n"


def _columns(draft: Draft) -> list[str]:
    targets = {target.name for target in draft.contract.targets}
    columns = [column for column in draft.contract.columns if column.name not in targets]
    lines = [
        "  # The data contract: role and type of every column, and why. The roles: key, time,",
        "  # group, numeric, category, text, vector, weight, ignore (kept, but no model sees it).",
        "  # A column that comes with another type one day is refused. May be added to a column:",
        "  # range: [low, high] (values outside are counted), note: a unit or a remark.",
    ]
    if len(columns) > _MAX_LISTED:
        lines.append(
            f"  # Of {len(columns)} columns those that are neither numeric nor category are listed."
        )
        columns = [c for c in columns if c.role not in ("numeric", "category")]
    if not columns:
        return [*lines, "  columns: {}"]
    lines.append("  columns:")
    declared = [
        (
            f"    {scalar(column.name)}: {flow({'role': column.role, 'dtype': column.dtype})}",
            draft.reasons.get(column.name, ""),
        )
        for column in columns
    ]
    return [*lines, *_commented(declared)]


def _rest(draft: Draft) -> str:
    trained = {
        "baseline": "    kind: prior  # or linear\n",
        "catboost": (
            f"    threads: {draft.threads}\n"
            "    device: auto  # or cpu, cuda; another one gives slightly other trees\n"
            "    # bag: none  # one fit, not one per fold and one more: quicker, but not stacked\n"
        ),
        "nn": (
            f"    threads: {draft.threads}  # another number gives slightly other weights\n"
            "    device: auto  # or cpu, cuda, mps; another one likewise\n"
            "    # bag: none  # as above; members: 1 is a plain network, several times quicker\n"
        ),
    }
    own = "".join(f"  {name}:\n{trained.get(name, '    {}')}" for name in draft.models)
    return (
        "\n# The same rows in the narrowest types that keep every value.\n"
        "reduce:\n"
        "  max_rel_error: 0.0  # 0: lossless; 1.0e-6 would allow float32 for most numbers\n"
        "\n# Arrays for the networks, fitted on train rows only.\n"
        "encode:\n"
        "  min_count: 2  # train rows that a category's value needs to have its own code\n"
        "\n# How each model is trained; early stopping looks at an inner part of the train rows.\n"
        f"train:\n{own}"
        "\n# The blend: fitted on out-of-fold train rows; the best single model is by valid rows.\n"
        "stack:\n"
        "  rounds: 50\n"
        "\n# Thresholds, calibration, prediction intervals: by valid and out-of-fold train rows.\n"
        "decide:\n"
        "  coverage: 0.9\n"
        "\n# What the predictions hang on, by valid rows: importances, SHAP, partial dependence.\n"
        "interpret:\n"
        "  groups: {}  # of columns to shuffle together, such as {weather: [temp, wind]}\n"
        "\n# Metrics on the test rows with bootstrap intervals, and paired differences.\n"
        "evaluate:\n"
        "  num_resamples: 1000\n"
        "  confidence: 0.95\n"
        "  unit: auto  # resampled: what the split kept together (days, groups), else rows\n"
        "\n# The package that `headrace predict` uses.\n"
        "publish:\n"
        f"  name: {scalar(draft.name)}  # of the registered model and the experiment in MLflow\n"
    )


def _commented(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines with their comments, all of which begin in one column where that is near."""
    width = min(_MAX_WIDTH, max(len(line) for line, _ in lines))
    return [
        f"{line:<{width}}  # {' '.join(reason.split())}" if reason else line
        for line, reason in lines
    ]


@cache
def _reserved() -> frozenset[str]:
    import duckdb

    with duckdb.connect() as connection:
        rows = connection.execute(
            "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category <> 'unreserved'"
        ).fetchall()
    return frozenset(name for (name,) in rows)


def _stem(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower()
