"""A description of every column, computed in DuckDB without holding a column in memory.

The numbers are the same at any number of threads, though sums of floats are not: a double is
scaled by a power of two and rounded to a whole number first, and whole numbers add up exactly in
128 bits. What that costs in precision is below 2**-52 of the largest value for means and 2**-30 of
the largest deviation for spreads and correlations, less than is printed. The median comes from
counts in bins that narrow down on it, because a sort or a t-digest would cost memory or exactness.

Association with a target: numeric with numeric Pearson's r; category with numeric, or numeric with
classes, the correlation ratio eta; category with classes Cramér's V. Rows without either are out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.data.engine import Engine, identifier, literal
from headrace.schema import Column, Contract, Target

PROFILE = "profile.json"

NUM_BINS = 30  # of a histogram
_FINE = 32  # finer bins per bin, for the median
_TOP = 20  # commonest values named
_SMALL = 1000  # rows in a bin that are sorted outright
_DIGITS = 9
_CHUNK = 12  # columns whose sums go into one query


@dataclass(frozen=True)
class _Scale:
    """A column as whole numbers: ``round((x - centre) * factor)``, below 2**31."""

    centre: float
    factor: float

    def sql(self, value: str) -> str:
        scaled = f"(({value})::DOUBLE - {self.centre!r}::DOUBLE) * {self.factor!r}::DOUBLE"
        return f"CAST(round({scaled}) AS BIGINT)"


def profile_table(
    engine: Engine,
    relation: str,
    contract: Contract,
    *,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    ranges_over: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Describe every column of ``relation``: one JSON object per column.

    Keys: role, dtype, rows, nulls, distinct; numbers and dates: min, max, histogram; numbers: mean,
    median, std; texts and classes: top; features: association by target; where a range is
    declared: outside_range.

    Args:
        engine: The connection that knows ``relation``.
        relation: Quoted name of a table or view with the contract's columns.
        contract: Its columns and targets.
        ranges: Declared lowest and highest value by column.
        ranges_over: Relation whose values are held against the ranges; ``relation`` if not given.
    """
    (num_rows,) = engine.row(f"SELECT count(*) FROM {relation}")
    numbers = {c.name: c for c in contract.columns if _is_number(c.dtype)}
    basics = _basics(engine, relation, contract, list(numbers))
    described: dict[str, dict[str, Any]] = {}
    scales: dict[str, _Scale] = {}
    for column in contract.columns:
        entry: dict[str, Any] = {"role": column.role, "dtype": column.dtype, "rows": num_rows}
        entry |= basics[column.name]
        if column.name in numbers and entry["nulls"] < num_rows:
            entry |= _bins(engine, relation, identifier(column.name), num_rows - entry["nulls"])
            scales[column.name] = _scale(entry)
        elif _is_date(column.dtype) and entry["nulls"] < num_rows:
            entry |= _dates(engine, relation, column, num_rows - entry["nulls"])
        elif column.dtype in ("string", "bool"):
            entry["top"] = _top(engine, relation, column)
        described[column.name] = entry
    for name, spread in _spreads(engine, relation, scales).items():
        described[name]["std"] = spread
    for name, found in _associations(engine, relation, contract, scales).items():
        described[name]["association"] = found
    outside = _outside(engine, ranges_over or relation, ranges or {})
    for name, count in outside.items():
        low, high = (ranges or {})[name]
        described[name]["outside_range"] = {"low": low, "high": high, "count": count}
    return {name: _rounded(entry) for name, entry in described.items()}


# --- one column ----------------------------------------------------------------------------------


def _basics(
    engine: Engine, relation: str, contract: Contract, numbers: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return nulls and distinct values of every column, and mean, min and max of numbers."""
    names = [column.name for column in contract.columns]
    counts = ", ".join(f"count(*) - count({identifier(name)})" for name in names)
    found = {
        name: {"nulls": int(nulls)}
        for name, nulls in zip(names, engine.row(f"SELECT {counts} FROM {relation}"), strict=True)
    }
    for column in contract.columns:
        if column.dtype.startswith("list<"):
            continue
        (distinct,) = engine.row(
            f"SELECT count(*) FROM (SELECT DISTINCT {identifier(column.name)} AS v "
            f"FROM {relation}) WHERE v IS NOT NULL"
        )
        found[column.name]["distinct"] = distinct
    return found | _means(engine, relation, contract, numbers, found)


def _means(
    engine: Engine,
    relation: str,
    contract: Contract,
    numbers: Sequence[str],
    found: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    if not numbers:
        return {}
    ends = ", ".join(f"min({identifier(n)}), max({identifier(n)})" for n in numbers)
    row = engine.row(f"SELECT {ends} FROM {relation}")
    sums, factors = [], []
    for position, name in enumerate(numbers):
        low, high = row[2 * position], row[2 * position + 1]
        column = identifier(name)
        if _is_whole(contract.column(name).dtype):
            factors.append(1.0)
            sums.append(f"sum({column}::HUGEINT)")
        else:
            largest = max(abs(float(low or 0)), abs(float(high or 0)))
            factors.append(_power_below(2.0**52, largest))
            sums.append(f"sum(CAST(round({column}::DOUBLE * {factors[-1]!r}::DOUBLE) AS BIGINT))")
    totals = engine.row(f"SELECT {', '.join(sums)} FROM {relation}")
    (num_rows,) = engine.row(f"SELECT count(*) FROM {relation}")
    result = {}
    for position, name in enumerate(numbers):
        entry = dict(found[name])
        num_values = num_rows - entry["nulls"]
        if num_values:
            entry["min"] = _plain(row[2 * position])
            entry["max"] = _plain(row[2 * position + 1])
            entry["mean"] = int(totals[position]) / num_values / factors[position]
        result[name] = entry
    return result


def _bins(engine: Engine, relation: str, value: str, num_values: int) -> dict[str, Any]:
    """Return histogram and median, from one pass unless the median's bin is crowded."""
    low, high = engine.row(f"SELECT min({value})::DOUBLE, max({value})::DOUBLE FROM {relation}")
    fine = _count_bins(engine, relation, value, low, high, NUM_BINS * _FINE)
    counts = [0] * NUM_BINS
    for position, count, _, _ in fine:
        counts[position // _FINE] += count
    step = (high - low) / NUM_BINS if math.isfinite(high - low) else 0.0
    edges = [low + step * i for i in range(NUM_BINS)] + [high]
    if low == high:
        edges, counts = [low, high], [num_values]
    middle = [
        _ranked(engine, relation, value, fine, rank)
        for rank in sorted({(num_values - 1) // 2, num_values // 2})
    ]
    median = middle[0] + (middle[-1] - middle[0]) / 2
    return {"histogram": {"edges": edges, "counts": counts}, "median": median}


def _count_bins(
    engine: Engine, relation: str, value: str, low: float, high: float, num_bins: int
) -> list[tuple[int, int, float, float]]:
    """Return (bin, rows, lowest, highest) of the values from ``low`` to ``high``."""
    width = high - low
    place = "0"
    if width > 0 and math.isfinite(width):
        share = f"(({value})::DOUBLE - {low!r}::DOUBLE) / {width!r}::DOUBLE"
        place = f"least(floor({share} * {num_bins}), {num_bins - 1})::INTEGER"
    return engine.rows(
        f"SELECT {place} AS bin, count(*), min({value})::DOUBLE, max({value})::DOUBLE "
        f"FROM {relation} WHERE ({value})::DOUBLE BETWEEN {low!r}::DOUBLE AND {high!r}::DOUBLE "
        f"GROUP BY 1 ORDER BY 1"
    )


def _ranked(
    engine: Engine,
    relation: str,
    value: str,
    bins: Sequence[tuple[int, int, float, float]],
    rank: int,
) -> float:
    """Return the value at ``rank`` (from 0) by narrowing down on its bin."""
    while True:
        position = 0
        while rank >= bins[position][1]:
            rank -= bins[position][1]
            position += 1
        _, count, low, high = bins[position]
        if low == high:
            return float(low)
        if count <= _SMALL or len(bins) == 1:
            ((found,),) = engine.rows(
                f"SELECT x FROM (SELECT ({value})::DOUBLE AS x FROM {relation}) WHERE x BETWEEN "
                f"{low!r}::DOUBLE AND {high!r}::DOUBLE ORDER BY x LIMIT 1 OFFSET {rank}"
            )
            return float(found)
        bins = _count_bins(engine, relation, value, low, high, NUM_BINS * _FINE)


def _dates(engine: Engine, relation: str, column: Column, num_values: int) -> dict[str, Any]:
    name = identifier(column.name)
    moment = name if "tz=" in column.dtype else f"{name}::TIMESTAMP"
    low, high = engine.row(f"SELECT min({name})::VARCHAR, max({name})::VARCHAR FROM {relation}")
    found = _bins(engine, relation, f"epoch_us({moment})", num_values)["histogram"]
    return {"min": low, "max": high, "histogram": found | {"unit": "microseconds since 1970"}}


def _top(engine: Engine, relation: str, column: Column) -> list[dict[str, Any]]:
    name = identifier(column.name)
    rows = engine.rows(
        f"SELECT left({name}::VARCHAR, 200), count(*) FROM {relation} WHERE {name} IS NOT NULL "
        f"GROUP BY {name} ORDER BY 2 DESC, {name} LIMIT {_TOP}"
    )
    return [{"value": value, "count": count} for value, count in rows]


def _scale(entry: Mapping[str, Any]) -> _Scale:
    centre = float(entry["mean"])
    largest = max(abs(float(entry["min"]) - centre), abs(float(entry["max"]) - centre))
    return _Scale(centre, _power_below(2.0**31, largest))


def _power_below(limit: float, largest: float) -> float:
    """Return the largest power of two that keeps ``largest`` times it below ``limit``."""
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    exponent = math.floor(math.log2(limit) - math.log2(largest)) - 1
    return 2.0 ** max(min(exponent, 1000), -1000)


def _spreads(engine: Engine, relation: str, scales: Mapping[str, _Scale]) -> dict[str, float]:
    spreads = {}
    names = list(scales)
    for start in range(0, len(names), _CHUNK):
        chunk = names[start : start + _CHUNK]
        inner = ", ".join(f"{scales[n].sql(identifier(n))} AS q{i}" for i, n in enumerate(chunk))
        outer = ", ".join(f"count(q{i}), sum(q{i}), sum(q{i} * q{i})" for i in range(len(chunk)))
        row = engine.row(f"SELECT {outer} FROM (SELECT {inner} FROM {relation})")
        for i, name in enumerate(chunk):
            count, first, second = (int(part or 0) for part in row[3 * i : 3 * i + 3])
            if count > 1:
                variance = (count * second - first * first) / (count * (count - 1))
                spreads[name] = math.sqrt(max(variance, 0.0)) / scales[name].factor
    return spreads


def _outside(
    engine: Engine, relation: str, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, int]:
    if not ranges:
        return {}
    counts = ", ".join(
        f"count(*) FILTER ({identifier(name)} < {low!r} OR {identifier(name)} > {high!r})"
        for name, (low, high) in ranges.items()
    )
    row = engine.row(f"SELECT {counts} FROM {relation}")
    return dict(zip(ranges, map(int, row), strict=True))


# --- association with targets --------------------------------------------------------------------


def _associations(
    engine: Engine, relation: str, contract: Contract, scales: Mapping[str, _Scale]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    features = [c for c in contract.columns if c.role in ("numeric", "category")]
    numeric = [c.name for c in features if c.role == "numeric" and c.name in scales]
    for target in contract.targets:
        is_classes = target.task == "multiclass"
        if not is_classes:
            for name, value in _pearson(engine, relation, contract, target, numeric, scales):
                _put(found, name, target, "pearson", value)
        for column in features:
            group = identifier(column.name)
            label = identifier(target.name)
            if column.name in numeric:
                if is_classes:
                    scaled = scales[column.name].sql(group)
                    value = _eta(engine, relation, label, scaled)
                    _put(found, column.name, target, "eta", value)
            elif is_classes:
                _put(
                    found, column.name, target, "cramers_v", _cramer(engine, relation, group, label)
                )
            else:
                scaled = _scaled_target(contract, target, scales)
                value = _eta(engine, relation, group, scaled)
                _put(found, column.name, target, "eta", value)
    return found


def _put(
    found: dict[str, dict[str, Any]],
    name: str,
    target: Target,
    measure: str,
    value: float | None,
) -> None:
    found.setdefault(name, {})[target.name] = {"measure": measure, "value": value}


def _scaled_target(contract: Contract, target: Target, scales: Mapping[str, _Scale]) -> str:
    """Return SQL of a target as whole numbers: scaled, or 0 and 1 for two classes."""
    column = identifier(target.name)
    if target.task == "regression":
        return scales[target.name].sql(column)
    positive = target.labels[1]
    dtype = contract.column(target.name).dtype
    is_positive = f"{column}::VARCHAR = {literal(positive)}"
    if _is_number(dtype):
        is_positive = f"{column}::DOUBLE = {float(positive)!r}::DOUBLE"
    return f"(CASE WHEN {column} IS NOT NULL THEN ({is_positive})::BIGINT END)"


def _pearson(
    engine: Engine,
    relation: str,
    contract: Contract,
    target: Target,
    names: Sequence[str],
    scales: Mapping[str, _Scale],
) -> list[tuple[str, float | None]]:
    found: list[tuple[str, float | None]] = []
    y = _scaled_target(contract, target, scales)
    for start in range(0, len(names), _CHUNK):
        chunk = names[start : start + _CHUNK]
        inner = ", ".join(f"{scales[n].sql(identifier(n))} AS q{i}" for i, n in enumerate(chunk))
        sums = []
        for i in range(len(chunk)):
            both = f"FILTER (q{i} IS NOT NULL)"
            sums += [f"count(q{i})", f"sum(q{i})", f"sum(y) {both}", f"sum(q{i} * q{i})"]
            sums += [f"sum(y * y) {both}", f"sum(q{i} * y)"]
        row = engine.row(
            f"SELECT {', '.join(sums)} FROM (SELECT {inner}, {y} AS y FROM {relation}) "
            f"WHERE y IS NOT NULL"
        )
        for i, name in enumerate(chunk):
            n, x1, y1, x2, y2, xy = (int(part or 0) for part in row[6 * i : 6 * i + 6])
            spread = (n * x2 - x1 * x1) * (n * y2 - y1 * y1)  # exact, of any size
            found.append((name, (n * xy - x1 * y1) / math.sqrt(spread) if spread > 0 else None))
    return found


def _eta(engine: Engine, relation: str, group: str, scaled: str) -> float | None:
    rows = engine.rows(
        f"SELECT count(*), sum(y), sum(y * y) FROM (SELECT {group} AS g, {scaled} AS y "
        f"FROM {relation}) WHERE g IS NOT NULL AND y IS NOT NULL GROUP BY g"
    )
    count = sum(n for n, _, _ in rows)
    first = sum(int(s) for _, s, _ in rows)
    second = sum(int(q) for _, _, q in rows)
    spread = count * second - first * first
    if count == 0 or spread <= 0:
        return None
    between = math.fsum(int(s) ** 2 / n for n, s, _ in rows) - first**2 / count
    return math.sqrt(min(max(between / (spread / count), 0.0), 1.0))


def _cramer(engine: Engine, relation: str, one: str, other: str) -> float | None:
    rows = engine.rows(
        f"SELECT dense_rank() OVER (ORDER BY a), dense_rank() OVER (ORDER BY b), n FROM ("
        f"SELECT {one} AS a, {other} AS b, count(*) AS n FROM {relation} "
        f"WHERE {one} IS NOT NULL AND {other} IS NOT NULL GROUP BY 1, 2)"
    )
    of_a: dict[int, int] = {}
    of_b: dict[int, int] = {}
    for a, b, n in rows:
        of_a[a] = of_a.get(a, 0) + n
        of_b[b] = of_b.get(b, 0) + n
    size = min(len(of_a), len(of_b)) - 1
    if size < 1:
        return None
    phi = math.fsum(n * n / (of_a[a] * of_b[b]) for a, b, n in rows) - 1
    return math.sqrt(min(max(phi / size, 0.0), 1.0))


# --- values --------------------------------------------------------------------------------------


def _is_whole(dtype: str) -> bool:
    return dtype.startswith(("int", "uint"))


def _is_number(dtype: str) -> bool:
    return _is_whole(dtype) or dtype in ("float", "double") or dtype.startswith("decimal")


def _is_date(dtype: str) -> bool:
    return dtype.startswith(("date", "timestamp"))


def _plain(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)


def _rounded(value: Any) -> Any:
    """Return ``value`` with every float cut to the digits that are exact at any thread count."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
