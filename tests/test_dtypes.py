"""The dtype plan: narrow, and never at the cost of a value."""

import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.data.dtypes import ColumnPlan, Dtype, cast_column, plan_dtypes
from headrace.data.frames import reduce_frame
from headrace.data.ranges import ColumnScan, worst_error
from headrace.errors import SchemaError
from headrace.schema import Role


def plan_one(
    values: pa.Array,
    *,
    role: Role = "numeric",
    max_rel_error: float = 0.0,
    override: Dtype | None = None,
    batch_rows: int = 1000,
    max_categories: int = 1000,
) -> ColumnPlan:
    """Scan ``values`` in batches, as the stage does, and plan the one column."""
    measure = ("float16", "float32") if override or max_rel_error else ()
    scan = ColumnScan("x", values.type, measure=measure, max_categories=max_categories)
    for start in range(0, len(values), batch_rows):
        scan.add(values.slice(start, batch_rows))
    overrides = {"x": override} if override else None
    plan = plan_dtypes(
        [scan.result()], {"x": role}, max_rel_error=max_rel_error, overrides=overrides
    )
    return plan[0]


def bits(values: Sequence[float | None]) -> list[bytes | None]:
    """Floats by their bits, NaN and null alike as None: what lossless means."""
    return [None if v is None or math.isnan(v) else np.float64(v).tobytes() for v in values]


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()]
BOUNDS = [(int(np.iinfo(t).min), int(np.iinfo(t).max)) for t in map(str, [*INTEGERS, pa.uint64()])]


# --- what must hold for any input


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.none()
        | st.floats(width=64)
        | st.floats(width=32)
        | st.floats(width=16)
        | st.integers(-300, 300).map(float)
        | st.sampled_from([0.0, -0.0, 2.0**24 + 1, 2.0**53, 2.0**63, 2.0**64, 1e308, 5e-324]),
        max_size=12,
    )
    | st.lists(st.none() | st.integers(-(2**63), 2**64).map(float), max_size=12),
    st.integers(1, 5),
    st.sampled_from(["numeric", "key", "category", "target"]),
)
def test_floats_come_back_bit_for_bit(values, batch_rows, role):
    column = pa.array(values, pa.float64())

    plan = plan_one(column, role=role, batch_rows=batch_rows)
    back = cast_column(column, plan).cast(pa.float64(), safe=False)

    assert bits(back.to_pylist()) == bits(values)
    assert plan.worst_rel_error == 0.0
    assert plan.after.bit_width <= 64


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([*INTEGERS, pa.uint64()]), st.integers(1, 5))
def test_integers_come_back_and_nothing_narrower_would_hold_them(data, dtype, batch_rows):
    limits = np.iinfo(dtype.to_pandas_dtype())
    near = st.sampled_from([b + d for pair in BOUNDS for b in pair for d in (-1, 0, 1)])
    value = (near | st.integers(int(limits.min), int(limits.max))).filter(
        lambda v: limits.min <= v <= limits.max
    )
    values = data.draw(st.lists(st.none() | value, max_size=8))
    column = pa.array(values, dtype)

    plan = plan_one(column, batch_rows=batch_rows)

    assert cast_column(column, plan).to_pylist() == values
    assert pa.types.is_integer(plan.after)
    present = [v for v in values if v is not None]
    for other in [*INTEGERS, pa.uint64()] if present else []:
        narrow = np.iinfo(other.to_pandas_dtype())
        if other.bit_width < plan.after.bit_width:
            assert not (narrow.min <= min(present) and max(present) <= narrow.max)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.none() | st.sampled_from(["", "a", "b", "ä", "long " * 9]) | st.text(max_size=3)),
    st.integers(1, 7),
    st.booleans(),
)
def test_texts_come_back(values, batch_rows, as_codes):
    column = pa.array(values * 5, pa.string())
    if as_codes:
        column = column.dictionary_encode()

    plan = plan_one(column, role="category", batch_rows=batch_rows, max_categories=20)

    assert cast_column(column, plan).to_pylist() == values * 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=64, allow_nan=False), min_size=1, max_size=12),
    st.sampled_from([1e-9, 1e-7, 1e-6, 1e-3]),
)
def test_a_granted_error_is_never_exceeded_and_is_certified(values, bound):
    column = pa.array(values, pa.float64())

    plan = plan_one(column, max_rel_error=bound)
    after = np.asarray(cast_column(column, plan).cast(pa.float64()).to_pylist())

    true = np.asarray(values)
    is_number = np.isfinite(true) & (true != 0)
    errors = np.abs(after[is_number] - true[is_number]) / np.abs(true[is_number])
    assert max(errors, default=0.0) == plan.worst_rel_error <= bound
    assert (after[~is_number] == true[~is_number]).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.none() | st.floats(width=64),
            st.integers(-(2**63), 2**63 - 1),
            st.none() | st.integers(-5, 300),
            st.none() | st.sampled_from(["x", "y", "a longer text"]),
            st.none() | st.booleans(),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_frames_keep_every_value(rows):
    floats, integers, nullables, texts, flags = zip(*rows, strict=True)
    frame = pd.DataFrame(
        {
            "float": pd.Series(floats, dtype="float64"),
            "whole": pd.Series(nullables, dtype="float64"),
            "integer": pd.Series(integers, dtype="int64"),
            "nullable": pd.Series(nullables, dtype="Int64"),
            "arrow": pd.Series(nullables, dtype=pd.ArrowDtype(pa.int64())),
            "str": pd.Series(texts, dtype="str"),
            "string": pd.Series(texts, dtype="string"),
            "object": pd.Series(texts, dtype="object"),
            "flag": pd.Series(flags, dtype="object"),
        }
    )
    before = frame.copy(deep=True)

    small = reduce_frame(frame)

    for name in frame:
        expected = [None if pd.isna(v) else v for v in before[name]]
        found = [None if pd.isna(v) else v for v in small[name]]
        assert found == expected, name
    pd.testing.assert_frame_equal(frame, before)


# --- the hazards of the copied loop, one by one


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_a_bound_that_is_hit_exactly_still_fits(low, high):
    column = pa.array([low, high], pa.uint64() if low == 0 else pa.int64())
    after = plan_one(column).after
    assert np.iinfo(after.to_pandas_dtype()).bits == (high - low + 1).bit_length() - 1
    assert cast_column(column, plan_one(column)).to_pylist() == [low, high]


def test_one_past_a_bound_takes_the_next_type():
    assert plan_one(pa.array([-129, 5])).after == pa.int16()
    assert plan_one(pa.array([-1, 128])).after == pa.int16()
    assert plan_one(pa.array([0, 256])).after == pa.uint16()
    assert plan_one(pa.array([0, 2**32])).after == pa.int64()


@pytest.mark.parametrize("values", [[2049.0], [60001.0], [20101.0, 20102.0, 20103.0], [1e-8, 0.1]])
def test_float16_is_never_chosen(values):
    plan = plan_one(pa.array(values), max_rel_error=0.01)
    assert plan.after in (pa.uint16(), pa.float32())
    assert reduce_frame(pd.DataFrame({"x": values}), max_rel_error=0.01)["x"].dtype != "float16"


def test_whole_floats_beside_a_null_become_exact_integers():
    column = pa.array([4097.0, None, 4099.0])
    plan = plan_one(column)
    assert plan.after == pa.uint16()
    assert cast_column(column, plan).to_pylist() == [4097, None, 4099]
    wide = pa.array([16777217.0, None])  # float32 would make it 16777216
    assert plan_one(wide).after == pa.uint32()
    nan = pa.array([3.0, math.nan])
    assert cast_column(nan, plan_one(nan)).to_pylist() == [3, None]


def test_whole_floats_that_float32_holds_as_well_become_integers_only_if_narrower():
    column = pa.array([0.0, 100_000.0])
    assert plan_one(column).after == pa.float32()
    assert plan_one(column, role="key").after == pa.uint32()
    assert plan_one(column, role="category").after == pa.uint32()


def test_unsigned_integers_stay_integers():
    assert plan_one(pa.array([2049, 4099], pa.uint64())).after == pa.uint16()
    assert plan_one(pa.array([0, 255], pa.uint8())).after == pa.uint8()
    assert plan_one(pa.array([2**64 - 1], pa.uint64())).after == pa.uint64()


def test_ids_above_two_to_the_53_stay_exact():
    column = pa.array([9007199254740993, None, -9007199254740993])
    assert plan_one(column, role="key").after == pa.int64()
    assert plan_one(column, role="key").key_collisions == 0
    assert plan_one(column).certificate()["high"] == "9007199254740993"


def test_an_id_that_came_as_float_is_named():
    assert "2^53" in plan_one(pa.array([2.0**60]), role="key").remark
    plan = plan_one(pa.array([1.5]), role="key")
    assert plan.after == pa.float64()
    assert "no whole number" in plan.remark


def test_booleans_and_dates_stay_what_they_are():
    for column in (
        pa.array([True, None]),
        pa.array([10, 20], pa.date32()),
        pa.array([10, None], pa.timestamp("us")),
        pa.array([10, None], pa.timestamp("ns", tz="UTC")),
        pa.array([10], pa.time64("us")),
        pa.array([b"x"], pa.binary()),
    ):
        assert plan_one(column).after == column.type
    assert plan_one(pa.array([86_400_000], pa.date64())).after == pa.date32()


def test_an_infinity_is_kept_and_named():
    column = pa.array([1.0, math.inf])
    plan = plan_one(column)
    assert plan.after == pa.float32()
    assert cast_column(column, plan).to_pylist() == [1.0, math.inf]
    assert plan.remark == "holds infinite values"
    assert plan.certificate()["high"] == "inf"


def test_negative_zero_is_no_integer():
    column = pa.array([-0.0, 1.0])
    plan = plan_one(column)
    assert plan.after == pa.float32()
    assert math.copysign(1, cast_column(column, plan)[0].as_py()) == -1


@pytest.mark.parametrize(
    ("dtype", "after"),
    [
        (pa.float64(), pa.float32()),
        (pa.int64(), pa.int8()),
        (pa.string(), pa.string()),
        (pa.bool_(), pa.bool_()),
        (pa.decimal128(9, 2), pa.int8()),
    ],
)
def test_a_column_without_a_value_narrows_within_its_kind_and_is_named(dtype, after):
    column = pa.nulls(3, dtype)
    plan = plan_one(column)
    assert plan.after == after
    assert plan.remark == "has no value"
    assert cast_column(column, plan).null_count == 3


def test_a_constant_column_is_named():
    assert plan_one(pa.array([7, 7])).remark == "is constant"
    assert plan_one(pa.array(["a", "a"])).remark == "is constant"
    assert plan_one(pa.array([7, None])).remark == ""


def test_decimals_stay_exact():
    whole = pa.array([Decimal("3.00"), None, Decimal("-400.00")])
    assert plan_one(whole).after == pa.int16()
    assert cast_column(whole, plan_one(whole)).to_pylist() == [3, None, -400]
    fraction = pa.array([Decimal("0.10"), Decimal("12.34")])
    assert plan_one(fraction).after == fraction.type
    lossy = plan_one(fraction, max_rel_error=1e-6)
    assert lossy.after == pa.float32()
    assert 0 < lossy.worst_rel_error < 1e-6
    assert plan_one(fraction, max_rel_error=1e-12).after == pa.float64()


def test_vectors_narrow_by_their_items():
    exact = pa.array([[0.5, 2.0], None, []], pa.list_(pa.float64()))
    plan = plan_one(exact, role="vector")
    assert plan.after == pa.list_(pa.float32())
    assert cast_column(exact, plan).to_pylist() == [[0.5, 2.0], None, []]
    # validity of 3 rows, their offsets, 2 items
    assert (plan.bytes_before, plan.bytes_after) == (1 + 12 + 16, 1 + 12 + 8)
    assert plan_one(pa.array([[0.1]]), role="vector").after == pa.list_(pa.float64())


def test_near_unique_texts_stay_texts():
    unique = pa.array([f"id{i:08d}" for i in range(500)])
    assert plan_one(unique, role="category").after == pa.string()
    assert plan_one(pa.array(["a", "b"] * 500), role="text").after == pa.string()


def test_codes_do_not_depend_on_the_order_of_rows():
    values = ["b", "a", None, "c"] * 100
    one, other = plan_one(pa.array(values)), plan_one(pa.array(values[::-1]), batch_rows=7)
    assert one.categories.equals(other.categories)
    assert one.categories.to_pylist() == ["a", "b", "c"]
    assert str(one.after) == "dictionary<values=string, indices=int8, ordered=0>"


@pytest.mark.parametrize(("count", "index"), [(128, pa.int8()), (129, pa.int16())])
def test_codes_take_the_narrowest_signed_type(count, index):
    texts = [f"a text of some length {i}" for i in range(count)] * 20
    assert plan_one(pa.array(texts)).after.index_type == index


def test_a_text_the_plan_has_not_seen_is_refused():
    plan = plan_one(pa.array(["a", "b"] * 50))
    with pytest.raises(pa.ArrowInvalid, match="not seen"):
        cast_column(pa.array(["z"]), plan)


def test_only_features_may_lose():
    column = pa.array([0.1, 0.2])
    assert plan_one(column, max_rel_error=1e-3).after == pa.float32()
    for role in ("target", "key", "time", "group"):
        assert plan_one(column, role=role, max_rel_error=1e-3).after == pa.float64()


def test_the_error_of_an_override_is_certified():
    column = pa.array([2049.0, 0.1])
    plan = plan_one(column, override="float16")
    assert plan.after == pa.float16()
    assert plan.worst_rel_error == worst_error(np.array([2049.0, 0.1]), "float16") > 0
    assert cast_column(column, plan).to_pylist()[0] == 2048.0


def test_keep_and_wider_overrides_are_followed():
    assert plan_one(pa.array([1, 2]), override="keep").after == pa.int64()
    assert plan_one(pa.array([1, 2]), override="int32").after == pa.int32()
    assert plan_one(pa.array([1, 2]), override="float32").after == pa.float32()
    assert plan_one(pa.array(["a"] * 99), override="string").after == pa.string()
    assert pa.types.is_dictionary(plan_one(pa.array(["a", "b"]), override="category").after)


@pytest.mark.parametrize(
    ("values", "override", "role", "words"),
    [
        ([-3, 5], "uint8", "numeric", ["-3", "0 to 255", "ask for int8"]),
        ([1.5], "int8", "numeric", ["no whole numbers"]),
        ([1, 2], "float32", "key", ["key", "kept exactly"]),
        ([2**24 + 1], "float32", "numeric", ["16777217", "exact up to 16777216"]),
        ([70000.0], "float16", "numeric", ["infinite or 0"]),
        ([1e-9], "float16", "numeric", ["infinite or 0"]),
        (["a"], "int8", "numeric", ["the column is string"]),
        ([1], "category", "numeric", ["the column is int64"]),
        ([True], "int8", "numeric", ["the column is bool"]),
    ],
)
def test_an_override_that_cannot_hold_the_column_is_refused(values, override, role, words):
    with pytest.raises(SchemaError) as error:
        plan_one(pa.array(values), override=override, role=role)
    for word in [f"`reduce.overrides.x: {override}`", *words]:
        assert word in str(error.value)


def test_a_category_override_beyond_the_cap_is_refused():
    column = pa.array([str(i) for i in range(50)])
    with pytest.raises(SchemaError, match="max_categories"):
        plan_one(column, override="category", max_categories=10)


def test_an_override_of_no_column_names_the_nearest():
    scan = ColumnScan("distance", pa.int64())
    with pytest.raises(SchemaError, match="nearest name: distance"):
        plan_dtypes([scan.result()], {"distance": "numeric"}, overrides={"distanse": "keep"})


def test_a_float_scan_agrees_with_plain_numpy():
    rng = np.random.default_rng(3)
    values = rng.normal(size=200_000) * 10.0 ** rng.integers(-300, 300, 200_000)
    values[::7] = np.nan
    scan = ColumnScan("x", pa.float64(), measure=("float32",))
    scan.add_numpy(values)
    seen = scan.result()

    assert (seen.low, seen.high) == (np.nanmin(values), np.nanmax(values))
    assert seen.num_nans == np.isnan(values).sum()
    x = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        errors = np.abs(x.astype(np.float32).astype(np.float64) - x) / np.abs(x)
    assert seen.error("float32") == errors.max()
    assert worst_error(x[np.abs(x) < 1e30], "float32") == errors[np.abs(x) < 1e30].max()


# --- frames: what is pandas' own


def test_a_frame_of_every_kind_keeps_its_values_and_its_owner():
    frame = pd.DataFrame(
        {
            "bool": [True, False, True],
            "int": [1, 2, 300],
            "uint": np.array([2049, 4099, 0], np.uint64),
            "nan": [4097.0, np.nan, 4099.0],
            "inf": [1.0, np.inf, 2.5],
            "float": [0.1, 0.2, 0.3],
            "exact": [0.5, 0.25, -0.0],
            "empty": [np.nan] * 3,
            "complex": [1 + 2j, 0j, 1j],
            "when": pd.to_datetime(["2020-01-01", None, "2021-01-01"]),
            "zone": pd.to_datetime(["2020-01-01"] * 3, utc=True),
            "span": pd.to_timedelta([1, 2, None], unit="D"),
            "category": pd.Categorical(["b", "a", None]),
            "boolean": pd.array([True, None, False], dtype="boolean"),
            "Int64": pd.array([1, None, 3], dtype="Int64"),
            "Float64": pd.array([1.5, None, 3.0], dtype="Float64"),
            "no Int64": pd.array([None] * 3, dtype="Int64"),
            "arrow": pd.array([1, None, 3], dtype=pd.ArrowDtype(pa.int64())),
            "mixed": [1, "a", None],
            "unhashable": [[1], {}, None],
            "flags": pd.Series([True, None, False], dtype=object),
            "big": pd.Series([2**70, 1, 2], dtype=object),
            "period": pd.period_range("2020", periods=3, freq="D"),
            "surrogate": pd.Series(["\ud800", "a", "b"], dtype=object),
        }
    )
    frame.index = [7, 7, 9]
    before = frame.copy(deep=True)

    small = reduce_frame(frame)

    assert small.index.equals(frame.index)
    expected = {
        "bool": "bool", "int": "uint16", "uint": "uint16", "nan": "UInt16", "inf": "float32",
        "float": "float64", "exact": "float32", "empty": "float32", "complex": "complex128",
        "when": str(frame["when"].dtype), "zone": str(frame["zone"].dtype),
        "span": str(frame["span"].dtype), "category": "category", "boolean": "boolean",
        "Int64": "UInt8", "Float64": "Float32", "no Int64": "Int8", "arrow": "uint8[pyarrow]",
        "mixed": "object", "unhashable": "object", "flags": "boolean", "big": "object",
        "period": "period[D]", "surrogate": "object",
    }  # fmt: skip
    assert {name: str(dtype) for name, dtype in small.dtypes.items()} == expected
    pd.testing.assert_frame_equal(frame, before)
    for name in frame.columns.drop("unhashable"):
        pairs = zip(frame[name], small[name], strict=True)
        assert all((pd.isna(a) and pd.isna(b)) or a == b for a, b in pairs), name


def test_changing_the_result_does_not_reach_the_callers_frame():
    frame = pd.DataFrame({"kept": [0.1, 0.2], "narrowed": [1, 2], "text": ["a", "b"]})
    small = reduce_frame(frame)
    small.iloc[0, 0] = 9.0
    small.iloc[0, 1] = 9
    assert frame.iloc[0].tolist() == [0.1, 1, "a"]


def test_repeated_names_and_strided_columns_are_reduced_by_position():
    matrix = np.arange(12.0).reshape(4, 3)  # one block, every column strided
    frame = pd.DataFrame(matrix, columns=["a", "a", "b"])
    small = reduce_frame(frame)
    assert list(small.columns) == ["a", "a", "b"]
    assert (small.dtypes == "uint8").all()
    assert (small.to_numpy() == matrix).all()


@pytest.mark.parametrize("dtype", ["str", "string", "object"])
def test_texts_with_few_values_become_categories_of_the_same_kind(dtype):
    frame = pd.DataFrame({"x": pd.Series(["b", "a", None] * 200, dtype=dtype)})
    small = reduce_frame(frame)["x"]
    assert isinstance(small.dtype, pd.CategoricalDtype)
    assert small.cat.categories.tolist() == ["a", "b"]
    assert small.isna().sum() == 200
    before, after = (f.memory_usage(deep=True) for f in (frame["x"], small))
    assert after < before


def test_near_unique_objects_stay_objects():
    frame = pd.DataFrame({"x": pd.Series([f"id{i}" for i in range(300)], dtype=object)})
    assert reduce_frame(frame)["x"].dtype == object


def test_nan_and_missing_are_told_apart_where_pandas_does():
    arrow = pd.array(pa.array([1.0, math.nan, None]), dtype=pd.ArrowDtype(pa.float64()))
    small = reduce_frame(pd.DataFrame({"x": arrow}))["x"]
    assert str(small.dtype) == "float[pyarrow]"
    values = pa.array(small.array)
    assert values.null_count == 1
    assert pc.sum(pc.is_nan(values)).as_py() == 1


def test_an_empty_frame_and_threads():
    assert reduce_frame(pd.DataFrame(index=[1, 2])).shape == (2, 0)
    assert reduce_frame(pd.DataFrame({"x": pd.Series([], dtype="int64")})).shape == (0, 1)
    frame = pd.DataFrame({f"x{i}": np.arange(100.0) + i for i in range(9)})
    pd.testing.assert_frame_equal(reduce_frame(frame), reduce_frame(frame, threads=3))


def test_sums_of_a_reduced_frame_stay_finite():
    """The copied loop's float16 overflows: the sum of 1000 times 70 is inf there."""
    small = reduce_frame(pd.DataFrame({"x": np.full(1000, 70.5)}))
    assert small["x"].to_numpy().sum() == 70_500
