"""Splits and folds: what must hold for any rows."""

import datetime
import hashlib
import struct
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.data.engine import Engine, open_engine
from headrace.data.split import PLACED, Placed, SplitParams, place_rows
from headrace.errors import ConfigError, DataError
from headrace.params import parse_section
from headrace.schema import SPLITS

ANY = settings(max_examples=25, deadline=None)
DAY = datetime.timedelta(days=1)


ENGINES: list[Engine] = []  # the one of this module; no fixture's value: hypothesis keeps those


@pytest.fixture(scope="module", autouse=True)
def _one_engine(tmp_path_factory):
    with open_engine(
        tmp_path_factory.mktemp("split"), memory_budget=512 << 20, threads=2, max_spill=1 << 30
    ) as engine:
        ENGINES.append(engine)
        yield
        ENGINES.clear()


def params(**given: object) -> SplitParams:
    return parse_section(SplitParams, given, key="extract.split", path=Path("params.yaml"))


def place(
    columns: dict[str, list[object]],
    split: SplitParams,
    *,
    folds: int = 3,
    features: tuple[str, ...] = ("x",),
    stratum: str | None = None,
) -> tuple[Placed, dict[int, tuple[str, int | None]]]:
    """Place rows whose id is their position; return split and fold by id."""
    num_rows = len(next(iter(columns.values())))
    table = pa.table({"row_id": pa.array(range(num_rows), pa.int64()), **columns})
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches())
    (engine,) = ENGINES
    tables = ("rows", PLACED, "hashed", "folding", "folded", "unplaced", "dated", "groups",
              "group_splits", "group_folds")  # fmt: skip
    for name in tables:  # a refused split leaves some behind
        engine.execute(f"DROP TABLE IF EXISTS {name}")
    engine.load("rows", reader)
    placed = place_rows(engine, "rows", split, num_folds=folds, features=features, stratum=stratum)
    rows = engine.rows(f"SELECT row_id, split, fold FROM {PLACED} ORDER BY row_id")
    assert len(rows) == num_rows
    return placed, {row_id: (SPLITS[split], fold) for row_id, split, fold in rows}


def check_folds(found: dict[int, tuple[str, int | None]], folds: int) -> None:
    """Each train row is in exactly one fold, no other row in any, and no fold is empty."""
    assert {fold for split, fold in found.values() if split == "train"} == set(range(folds))
    assert all((fold is None) == (split != "train") for split, fold in found.values())


# --- random --------------------------------------------------------------------------------------


@ANY
@given(values=st.lists(st.integers(0, 400), min_size=200, max_size=400), seed=st.integers(0, 9))
def test_equal_rows_stay_together_in_split_and_fold(values, seed):
    try:
        _, found = place({"x": values}, params(seed=seed))
    except DataError:
        assume(False)
    check_folds(found, 3)
    by_value = defaultdict(set)
    for row_id, value in enumerate(values):
        by_value[value].add(found[row_id])
    assert all(len(places) == 1 for places in by_value.values())


def test_labels_and_order_decide_nothing():
    values = [i * 7 % 1000 for i in range(1000)]
    _, one = place({"x": values, "y": [0, 1] * 500}, params())
    _, two = place({"x": values[::-1], "y": [1, 0] * 500}, params())
    assert one == {999 - row_id: where for row_id, where in two.items()}


def test_new_rows_do_not_move_old_ones():
    _, one = place({"x": list(range(1000))}, params())
    _, two = place({"x": list(range(1500))}, params())
    assert all(two[row_id][0] == split for row_id, (split, _) in one.items())


def test_shares_and_folds_have_their_size():
    placed, _ = place({"x": list(range(20_000))}, params(valid=0.1, test=0.25), folds=5)
    assert abs(placed.num_rows["valid"] - 2000) < 150
    assert abs(placed.num_rows["test"] - 5000) < 220
    assert max(placed.fold_rows) - min(placed.fold_rows) < 40


def test_the_seed_changes_the_split():
    _, one = place({"x": list(range(500))}, params(seed=0))
    _, two = place({"x": list(range(500))}, params(seed=1))
    assert one != two


def test_the_random_split_is_the_documented_hash():
    """A plain-Python twin: MD5 of the seed and the length-prefixed text of the features."""
    values = [f"v{i}" for i in range(300)]
    _, found = place({"x": values}, params(seed=4))
    for row_id, value in enumerate(values):
        text = f"split 4|{len(value)}:{value}"
        (number,) = struct.unpack("<Q", hashlib.md5(text.encode()).digest()[:8])
        share = number / 2**64
        expected = "test" if share < 0.15 else "valid" if share < 0.3 else "train"
        assert found[row_id][0] == expected


# --- stratified ----------------------------------------------------------------------------------


@ANY
@given(data=st.data())
def test_every_class_gets_its_share_of_every_split_and_fold(data):
    sizes = data.draw(st.lists(st.integers(60, 300), min_size=2, max_size=4))
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    columns = {"x": list(range(len(labels))), "y": labels}
    _, found = place(columns, params(kind="stratified"), stratum="y")
    check_folds(found, 3)
    for label, size in enumerate(sizes):
        of_label = [found[i] for i, one in enumerate(labels) if one == label]
        for split, share in (("valid", 0.15), ("test", 0.15), ("train", 0.7)):
            count = sum(where == split for where, _ in of_label)
            assert abs(count - share * size) <= 3
        for fold in range(3):
            train = [f for where, f in of_label if where == "train"]
            assert abs(train.count(fold) - len(train) / 3) <= 3


def test_a_stratified_split_without_classes_asks_for_a_column():
    with pytest.raises(ConfigError, match=r"needs `extract.split.column`"):
        place({"x": list(range(50))}, params(kind="stratified"))


# --- grouped -------------------------------------------------------------------------------------


@ANY
@given(
    groups=st.lists(st.sampled_from([f"g{i}" for i in range(60)]), min_size=300, max_size=500),
    seed=st.integers(0, 5),
)
def test_a_group_is_in_one_split_and_one_fold(groups, seed):
    columns = {"x": list(range(len(groups))), "g": groups}
    try:
        _, found = place(columns, params(kind="grouped", column="g", seed=seed))
    except DataError:  # a few large groups cannot fill three splits and three folds
        assume(False)
    check_folds(found, 3)
    by_group = defaultdict(set)
    for row_id, group in enumerate(groups):
        by_group[group].add(found[row_id])
    assert all(len(places) == 1 for places in by_group.values())


def test_few_groups_and_rows_without_group_are_refused():
    columns = {"x": list(range(40)), "g": ["a", "b"] * 20}
    with pytest.raises(DataError, match=r"leaves no row in .*too few groups in g"):
        place(columns, params(kind="grouped", column="g"))
    with pytest.raises(DataError, match="1 rows have no value in the group column g"):
        place({**columns, "g": [None, *columns["g"][1:]]},
              params(kind="grouped", column="g"))  # fmt: skip


# --- time ----------------------------------------------------------------------------------------

START = datetime.datetime(2024, 1, 1)


@ANY
@given(
    hours=st.lists(st.integers(0, 100 * 24), min_size=300, max_size=500),
    gap=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    folds=st.integers(2, 5),
)
def test_no_row_is_near_a_boundary_and_blocks_are_contiguous(hours, gap, folds):
    when = [START + datetime.timedelta(hours=hour) for hour in hours]
    valid, test = START + 60 * DAY, START + 80 * DAY
    split = params(kind="time", column="t", valid_from="2024-03-01", test_from="2024-03-21",
                   gap_days=gap)  # fmt: skip
    assert (split.valid_from, split.test_from) == (valid, test)
    try:
        _, found = place({"x": hours, "t": when}, split, folds=folds)
    except DataError:
        assume(False)
    check_folds(found, folds)
    of = defaultdict(list)
    for row_id, (name, fold) in found.items():
        of[name].append(when[row_id])
        if fold is not None:
            of[fold].append(when[row_id])
    margin = datetime.timedelta(days=gap)
    assert max(of["train"]) < valid - margin
    assert valid <= min(of["valid"])
    assert max(of["valid"]) < test - margin
    assert test <= min(of["test"])
    for fold in range(folds - 1):  # blocks follow each other, apart by more than the gap
        assert max(of[fold]) + margin < min(of[fold + 1])
    if not gap:
        assert not of["gap"]


def test_folds_in_time_begin_with_whole_days_where_rows_span_enough():
    when = [START + datetime.timedelta(hours=i) for i in range(24 * 250)]
    split = params(kind="time", column="t", valid_from="2024-08-01", test_from="2024-08-15")
    placed, found = place({"x": list(range(len(when))), "t": when}, split, folds=5)
    firsts = {}
    for row_id, (_, fold) in found.items():
        firsts.setdefault(fold, when[row_id])
    assert all(firsts[fold].hour == 0 for fold in range(5))
    assert max(placed.fold_rows) - min(placed.fold_rows) <= 24


def test_dates_and_zoned_timestamps_split_in_time_too():
    days = [(START + i * DAY).date() for i in range(100)]
    split = params(kind="time", column="t", valid_from="2024-03-01", test_from="2024-03-21")
    _, by_date = place({"x": days, "t": days}, split)
    zoned = [(START + i * DAY).replace(tzinfo=datetime.UTC) for i in range(100)]
    _, by_zone = place({"x": days, "t": zoned}, split)
    assert by_date == by_zone
    assert by_date[59][0] == "train"
    assert by_date[60][0] == "valid"


def test_a_time_split_that_does_not_fit_the_rows_says_what_they_span():
    when = [START + i * DAY for i in range(30)]
    columns = {"x": list(range(30)), "t": when}
    split = {"kind": "time", "column": "t", "valid_from": "2024-01-20"}
    with pytest.raises(DataError, match=r"no row in test.*t runs from 2024-01-01.*to 2024-01-30"):
        place(columns, params(**split, test_from="2025-01-01"))
    with pytest.raises(DataError, match=r"fill only \d folds .*lower `extract.split.gap_days`"):
        place(columns, params(**split, test_from="2024-01-25", gap_days=4.0), folds=4)
    with pytest.raises(DataError, match="1 rows have no date in t"):
        place({**columns, "t": [None, *when[1:]]}, params(**split, test_from="2024-01-25"))
    with pytest.raises(ConfigError, match="names t, which is BIGINT; a time split needs a date"):
        place({**columns, "t": columns["x"]}, params(**split, test_from="2024-01-25"))


# --- given ---------------------------------------------------------------------------------------


def test_a_given_split_is_followed():
    names = ["train", "train", "valid", "test", "gap"] * 40
    placed, found = place({"x": list(range(200)), "s": names},
                          params(kind="given", column="s"))  # fmt: skip
    assert [found[i][0] for i in range(200)] == names
    assert not placed.is_valid_cut
    check_folds(found, 3)


def test_a_given_split_without_valid_rows_cuts_a_fifth_of_train_by_the_hash():
    names = ["train", "train", "test"] * 400
    columns = {"x": list(range(1200)), "s": names}
    placed, found = place(columns, params(kind="given", column="s"))
    assert placed.is_valid_cut
    assert {i for i in range(1200) if names[i] == "test"} == {
        i for i in range(1200) if found[i][0] == "test"
    }
    assert abs(placed.num_rows["valid"] - 160) < 40


def test_unknown_and_lacking_names_in_a_given_split_are_refused():
    columns = {"x": list(range(30)), "s": ["train", "tset", "valid"] * 10}
    with pytest.raises(DataError, match=r"holds \['tset'\].*nearest name: test"):
        place(columns, params(kind="given", column="s"))
    with pytest.raises(DataError, match="leaves no row in test"):
        place({**columns, "s": ["train", "train", "valid"] * 10},
              params(kind="given", column="s"))  # fmt: skip
    with pytest.raises(DataError, match=r"holds \[None\]"):
        place({**columns, "s": ["train", "test", None] * 10},
              params(kind="given", column="s"))  # fmt: skip


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"kind": "random", "gap_days": 1.0}, "gap_days cannot take effect in a random split"),
        ({"kind": "time", "column": "t", "valid": 0.2}, "valid cannot take effect in a time"),
        ({"kind": "time", "column": "t"}, "needs `valid_from` and `test_from`"),
        ({"kind": "grouped"}, "a grouped split needs `column`"),
        ({"kind": "time", "column": "t", "valid_from": "2024-02-01", "test_from": "2024-01-01"},
         "must lie before"),
        ({"kind": "time", "column": "t", "valid_from": "soon", "test_from": "2024-01-01"},
         "not a date; write for example 2013-09-01"),
        ({"valid": 0.5, "test": 0.5}, "leave no share for train"),
        ({"kind": "randm"}, "randm"),
        ({"sed": 1}, "nearest name: seed"),
    ],
)  # fmt: skip
def test_settings_that_cannot_take_effect_or_contradict_are_refused(given_settings, message):
    with pytest.raises(ConfigError, match=message):
        params(**given_settings)


def test_dates_are_read_as_yaml_gives_them():
    day = datetime.date(2024, 3, 1)
    one = params(kind="time", column="t", valid_from=day, test_from="2024-03-21")
    assert one.valid_from == datetime.datetime(2024, 3, 1)


def test_too_few_different_rows_for_the_folds_are_refused():
    columns = {"x": [i % 3 for i in range(90)], "s": (["train"] * 8 + ["valid", "test"]) * 9}
    with pytest.raises(DataError, match=r"`extract.folds` is 5, but the train rows fill only"):
        place(columns, params(kind="given", column="s"), folds=5)
    with pytest.raises(ConfigError, match="contract has no feature"):
        place(columns, params(), features=())
