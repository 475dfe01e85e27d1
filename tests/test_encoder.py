"""The encoder: fitted on train rows, exact about missing and unseen, one code per label."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from headrace.data.encoder import (
    ENCODER,
    MISSING,
    UNKNOWN,
    Encoder,
    _LabelCounts,
    fit_encoder,
)
from headrace.errors import DataError, IntegrityError, SchemaError
from headrace.schema import Target, label_text
from tests.encode_tables import ROLES, example_columns, write_table

SETTINGS = {
    "max_categories": 1000,
    "min_count": 1,
    "num_quantiles": 11,
    "quantile_rows": 10_000,
    "seed": 0,
}


def fit(folder, splits, *, roles=ROLES, targets=None, **changed):
    more = {} if targets is None else {"targets": targets}
    table = write_table(folder / "reduce", splits, roles=roles, **more)
    return fit_encoder(table, **(SETTINGS | changed))


def fit_columns(folder, columns, *, roles, **changed):
    """Fit on given features beside one regression target."""
    num_rows = len(next(iter(columns.values())))
    columns = {**columns, "y": pa.array(np.arange(num_rows) * 1.0)}
    targets = (Target(name="y", task="regression"),)
    return fit(
        folder, {"train": columns}, roles={**roles, "y": "target"}, targets=targets, **changed
    )


def codes_of(encoder, values):
    (name,) = [category.name for category in encoder.categories]
    return encoder.transform(pa.table({name: values})).codes[:, 0].tolist()


def test_numbers_are_standardised_by_train_rows_and_nan_is_kept(tmp_path):
    """A large mean costs no digits: the difference is taken in float64."""
    columns = example_columns(1000)
    encoder = fit(tmp_path, {"train": columns})
    x = columns["distance"].to_numpy(zero_copy_only=False)
    expected = (x - np.nanmean(x)) / np.nanstd(x)

    out = encoder.transform(pa.table(columns))

    assert encoder.numeric == ("distance", "seats", "is_weekend")
    assert out.numeric.dtype == np.float32
    assert np.array_equal(np.isnan(out.numeric[:, 0]), np.isnan(x))
    np.testing.assert_allclose(out.numeric[:, 0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.nanmean(out.numeric, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(out.numeric, axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("num_columns", [1, 16, 37])
@pytest.mark.parametrize(("first", "num_rows"), [(0, 1100), (5, 1024), (11, 7)])
def test_columns_of_every_type_are_scaled_to_the_bit(tmp_path, num_columns, first, num_rows):
    """Groups of columns and tiles of rows, whole and not; infinity counts where it is no null."""
    rng = np.random.default_rng(0)
    columns, dtypes = {}, ["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
    for j in range(num_columns):
        x = rng.integers(0, 120, 1200).astype(dtypes[j % 10])
        if x.dtype.kind == "f":
            x[rng.random(1200) < 0.1] = np.inf
        is_null = rng.random(1200) < 0.1 if j % 3 else np.zeros(1200, bool)
        columns[f"x{j}"] = pa.array(x, mask=is_null)
    encoder = fit_columns(tmp_path, columns, roles=dict.fromkeys(columns, "numeric"))
    rows = pa.table(columns).slice(first, num_rows)

    out, num_infinite = encoder.fill(rows, encoder.layout.empty(num_rows))

    for j, scale in enumerate(encoder.scales):
        x = rows[f"x{j}"].cast(pa.float64()).to_numpy()
        assert num_infinite[j] == np.isinf(x).sum()
        z = (x - scale.mean) * (1 / scale.std)
        expected = np.where(np.isinf(x), np.nan, z).astype(np.float32)
        assert np.array_equal(out.numeric[:, j], expected, equal_nan=True)


def test_moments_merged_over_batches_equal_one_pass(tmp_path):
    """Many batches of a column with a drift: mean and spread as numpy has them on the whole."""
    x = np.linspace(1e6, 1e6 + 1, 200_000) ** 2
    encoder = fit_columns(tmp_path, {"x": pa.array(x)}, roles={"x": "numeric"})

    assert encoder.scales[0].mean == pytest.approx(x.mean(), rel=1e-14)
    assert encoder.scales[0].std == pytest.approx(x.std(), rel=1e-9)
    assert (encoder.scales[0].low, encoder.scales[0].high) == (x.min(), x.max())


def test_the_number_of_cores_changes_no_bit(tmp_path):
    """BLAS divides a dot product by its threads, and rounds by how it was divided."""
    rng = np.random.default_rng(0)
    columns = {name: pa.array(rng.normal(3, 1, 60_000)) for name in "abcdefgh"}
    digests = set()
    for num_threads in (1, 2):
        with threadpool_limits(num_threads):
            folder = tmp_path / str(num_threads)
            digests.add(
                fit_columns(folder, columns, roles=dict.fromkeys(columns, "numeric")).digest
            )

    assert len(digests) == 1


def test_only_train_rows_teach(tmp_path):
    """Another value in valid or test leaves the encoder as it was; one in train does not."""
    train, other = example_columns(300), example_columns(50, seed=1)
    moved = {**other, "seats": pc.add(other["seats"], pa.scalar(1000, pa.int16()))}
    first = fit(tmp_path / "a", {"train": train, "valid": other, "test": other})
    same = fit(tmp_path / "b", {"train": train, "valid": moved, "test": moved})
    changed = fit(tmp_path / "c", {"train": {**train, "seats": pc.negate(train["seats"])}})

    assert first.digest == same.digest
    assert first.digest != changed.digest


def test_unseen_and_missing_have_codes_of_their_own(tmp_path):
    encoder = fit_columns(tmp_path, {"c": pa.array(["b", "a", None, "b"])}, roles={"c": "category"})

    assert encoder.categories[0].labels == ("a", "b")
    assert encoder.cardinalities == (4,)
    assert codes_of(encoder, pa.array(["a", "b", None, "z"])) == [2, 3, MISSING, UNKNOWN]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([3, 12, None]),
        pa.array([3, 12, None], pa.uint8()),
        pa.array([3.0, 12.0, None]),
        pa.array([3.0, 12.0, float("nan")], pa.float32()),
        pa.array(["3", "12", None]),
        pa.array(["3", "12", None], pa.large_string()),
        pa.array(["3", "12", None], pa.string_view()),
        pa.array(["3", "12", None]).dictionary_encode(),
        pa.array([3.0, 12.0, None]).dictionary_encode(),
        pa.array([3, 12, None], pa.int16()).cast(pa.decimal128(9, 2)),
    ],
    ids=lambda values: str(values.type),
)
def test_3_and_3_0_and_text_3_are_one_label(tmp_path, values):
    """Whatever type a file gives a category, at the fit or later, a label has one code."""
    roles = {"c": "category"}
    fitted_on_ints = fit_columns(tmp_path / "a", {"c": pa.array([12, 3, 3])}, roles=roles)
    fitted_on_these = fit_columns(tmp_path / "b", {"c": values}, roles=roles)

    assert codes_of(fitted_on_ints, values) == [3, 2, MISSING]
    assert fitted_on_these.categories[0].labels == ("12", "3")


@given(st.lists(st.integers(-(2**53), 2**53) | st.none(), min_size=1, max_size=20))
def test_whole_numbers_have_the_same_text_as_floats(values):
    as_ints = label_text(pa.array(values, pa.int64())).to_pylist()

    assert label_text(pa.array(values, pa.float64())).to_pylist() == as_ints
    assert as_ints == [None if value is None else str(value) for value in values]


FLOATS = pa.array([0.1, 2.5, 0.1])


@pytest.mark.parametrize(
    "values",
    [
        FLOATS.cast(pa.float32(), safe=False),
        FLOATS.cast(pa.float16(), safe=False),
        FLOATS.cast(pa.float32(), safe=False).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_floats_narrowed_by_reduce_match_wide_ones_later(tmp_path, values):
    """0.1 in a narrow type and as float64 is one label."""
    encoder = fit_columns(tmp_path, {"c": values}, roles={"c": "category"})

    assert codes_of(encoder, pa.array([0.1, 2.5, 9.0])) == [2, 3, UNKNOWN]
    assert codes_of(encoder, pa.array([0.1, 2.5]).dictionary_encode()) == [2, 3]


def test_a_boolean_is_what_its_role_says(tmp_path):
    values = pa.array([True, False, None, True])
    encoder = fit_columns(
        tmp_path, {"n": values, "c": values}, roles={"n": "numeric", "c": "category"}
    )
    out = encoder.transform(pa.table({"n": values, "c": values}))

    assert encoder.categories[0].labels == ("false", "true")
    assert out.codes[:, 0].tolist() == [3, 2, MISSING, 3]
    assert encoder.scales[0].mean == pytest.approx(2 / 3)
    assert np.isnan(out.numeric[2, 0])


def test_rare_labels_and_those_beyond_the_cap_share_code_0(tmp_path):
    """The most frequent stay; among equals the first by text."""
    values = pa.array(["d"] * 5 + ["c"] * 3 + ["b"] * 3 + ["a"] * 3 + ["e", None])
    roles = {"c": "category"}
    frequent = fit_columns(tmp_path / "a", {"c": values}, roles=roles, min_count=2)
    capped = fit_columns(tmp_path / "b", {"c": values}, roles=roles, max_categories=3)

    assert frequent.categories[0].labels == ("a", "b", "c", "d")
    assert capped.categories[0].labels == ("a", "b", "d")
    assert (capped.categories[0].num_rare_labels, capped.categories[0].num_rare_rows) == (2, 4)
    assert codes_of(capped, pa.array(["c", "e", "d"])) == [UNKNOWN, UNKNOWN, 4]


def test_counting_forgets_the_rarest_beyond_its_limit():
    """Memory stays bounded by the limit, the frequent labels survive."""
    counts = _LabelCounts(limit=2000)
    for start in range(0, 400_000, 40_000):
        rare = [str(i) for i in range(start, start + 40_000)]
        counts.add(40_050, pa.array([*rare, "often"]), np.array([1] * 40_000 + [50]))
        assert counts.num_pending + len(counts.labels) < 150_000
    codes = counts.codes("c", "string", max_categories=10, min_count=100)

    assert codes.labels == ("often",)
    assert codes.counts == (500,)
    assert codes.num_rare_rows == 400_000


@pytest.mark.parametrize(("num_labels", "dtype"), [(254, "u1"), (255, "u2"), (70_000, "u4")])
def test_codes_have_the_narrowest_type(tmp_path, num_labels, dtype):
    values = pa.array(np.arange(num_labels))
    encoder = fit_columns(tmp_path, {"c": values}, roles={"c": "category"}, max_categories=100_000)
    out = encoder.transform(pa.table({"c": values}))

    assert out.codes.dtype == np.dtype(dtype)
    assert sorted(out.codes[:, 0].tolist()) == list(range(2, num_labels + 2))


def test_columns_that_carry_nothing_are_left_out_and_named(tmp_path):
    null, nulls = None, pa.nulls(4, pa.float64())
    columns = {
        "ok": pa.array([1.0, 2.0, 3.0, null]),
        "constant": pa.array([0.1] * 4),
        "null": nulls,
        "infinite": pa.array([np.inf, -np.inf, null, np.nan]),
        "huge": pa.array([1e308, -1e308, 1e308, 5.0]),
        "flag": pa.array([1.0, null, 1.0, null]),
        "one_label": pa.array(["a"] * 4),
        "no_label": pa.nulls(4, pa.string()),
        "all_rare": pa.array(["a", "b", "c", "d"]),
        "rare_or_null": pa.array(["a", "b", "c", null]),
    }
    numeric = ("ok", "constant", "null", "infinite", "huge", "flag")
    roles = {name: "numeric" if name in numeric else "category" for name in columns}

    encoder = fit_columns(tmp_path, columns, roles=roles, min_count=2)

    assert encoder.numeric == ("ok", "flag")
    assert [category.name for category in encoder.categories] == ["rare_or_null"]
    assert encoder.dropped == {
        "constant": "constant: all train rows are 0.1",
        "null": "no value in the train rows is a finite number",
        "infinite": "no value in the train rows is a finite number",
        "huge": "values from -1e+308 to 1e+308 are beyond float64 arithmetic",
        "one_label": "constant: all train rows are 'a'",
        "no_label": "all train rows are null",
        "all_rare": "every label is rare: none comes in 2 train rows or more",
    }
    out = encoder.transform(pa.table(columns))
    assert out.numeric[:, 1].tolist()[::2] == [0.0, 0.0]
    assert np.isnan(out.numeric[1::2, 1]).all()


def test_infinite_values_count_as_missing(tmp_path):
    encoder = fit_columns(
        tmp_path, {"x": pa.array([1.0, 2.0, np.inf, 3.0])}, roles={"x": "numeric"}
    )
    rows = pa.table({"x": [np.inf, -np.inf, 1e300, 2.0]})
    out, num_infinite = encoder.fill(rows, encoder.layout.empty(4))

    assert (encoder.scales[0].mean, encoder.scales[0].num_infinite) == (2.0, 1)
    assert num_infinite.tolist() == [3]
    assert np.isnan(out.numeric[:3, 0]).all()
    assert out.numeric[3, 0] == 0


def test_quantiles_run_from_the_smallest_to_the_largest(tmp_path):
    x = np.arange(2001.0) ** 2
    encoder = fit_columns(tmp_path, {"x": pa.array(x)}, roles={"x": "numeric"}, quantile_rows=500)
    z = (x - x.mean()) / x.std()

    knots = encoder.quantiles[0]

    assert encoder.quantiles.shape == (1, 11)
    assert (np.diff(knots) > 0).all()
    np.testing.assert_allclose(knots[[0, -1]], z[[0, -1]], rtol=1e-6)
    np.testing.assert_allclose(knots, np.quantile(z, np.linspace(0, 1, 11)), atol=0.25)


def test_rows_at_prediction_may_lack_what_is_to_be_predicted(tmp_path):
    """Plain strings, wider numbers, another column order, no target, weight, fold or id."""
    columns = example_columns(200)
    encoder = fit(tmp_path, {"train": columns})
    full = encoder.transform(pa.table(columns))
    bare = pa.table(
        {
            "gate": columns["gate"].cast(pa.float64()),
            "carrier": columns["carrier"].cast(pa.string()),
            "is_weekend": columns["is_weekend"].cast(pa.int64()),
            "seats": columns["seats"].cast(pa.float64()),
            "distance": columns["distance"],
        }
    )
    out = encoder.transform(bare)

    assert np.array_equal(out.codes, full.codes)
    assert np.array_equal(out.numeric, full.numeric, equal_nan=True)
    assert np.isnan(out.targets).all()
    assert out.targets.shape == (200, 2)
    assert (out.weight == 1).all()
    assert (out.fold == -1).all()
    assert out.row_id.tolist() == list(range(200))


def test_rows_may_come_in_chunks_with_dictionaries_of_their_own(tmp_path):
    columns = example_columns(200)
    encoder = fit(tmp_path, {"train": columns})
    parts = [pa.table(columns).slice(first, 50) for first in range(0, 200, 50)]
    parts[1] = parts[1].set_column(
        3, "carrier", parts[1]["carrier"].cast(pa.string()).dictionary_encode()
    )

    chunked = encoder.transform(pa.concat_tables(parts))

    whole = encoder.transform(pa.table(columns))
    assert np.array_equal(chunked.codes, whole.codes)
    assert np.array_equal(chunked.numeric, whole.numeric, equal_nan=True)
    assert np.array_equal(chunked.weight, whole.weight)


@pytest.mark.parametrize(
    "index",
    [pa.type_for_alias(f"{sign}int{bits}") for sign in ("u", "") for bits in (8, 16, 32, 64)],
    ids=str,
)
def test_every_index_type_of_a_dictionary_gives_the_codes_of_plain_text(tmp_path, index):
    """More rows than a tile, a slice that begins within a byte of validity, null labels too."""
    rng = np.random.default_rng(0)
    labels = pa.array(["b", "new", None, "a", "c"])
    chosen = pa.array(rng.integers(0, 5, 1000), mask=rng.random(1000) < 0.2)
    values = pa.DictionaryArray.from_arrays(chosen.cast(index), labels)
    encoder = fit_columns(tmp_path, {"c": pa.array(["a", "b", "c"])}, roles={"c": "category"})

    for first, stop in ((0, 1000), (3, 777), (13, 14)):
        part = values.slice(first, stop - first)
        expected = codes_of(encoder, part.cast(pa.string()))
        assert codes_of(encoder, part) == expected
        known = {"a": 2, "b": 3, "c": 4, None: MISSING}
        assert expected == [known.get(label, UNKNOWN) for label in part.to_pylist()]


def test_dictionaries_that_share_memory_are_told_apart(tmp_path):
    """Offset, length, validity and type of a dictionary belong to what its labels are."""
    fitted = {"c": pa.array(["0", "1", "2", "3", "64", "65", "66", "67"])}
    encoder = fit_columns(tmp_path, fitted, roles={"c": "category"})
    text = pa.array(["0", "1", "2", "3"])
    _, offsets, letters = text.buffers()
    with_null = pa.Array.from_buffers(
        pa.string(), 4, [pa.py_buffer(bytes([0b1101])), offsets, letters]
    )
    numbers = pa.array([0, 1, 2, 3])
    as_int32 = pa.Array.from_buffers(pa.int32(), 4, [None, numbers.buffers()[1]])
    small = pa.array([0, 1, 2, 3, 64, 65, 66, 67], pa.int8())
    as_uint8 = small.view(pa.uint8())
    dictionaries = [text, text.slice(1), text[:3], with_null, text]
    dictionaries += [numbers, as_int32, numbers, small, small.slice(4), as_uint8, small[:4]]

    for dictionary in dictionaries:
        rows = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int8()), dictionary)
        known = dict(zip(fitted["c"].to_pylist(), range(2, 10), strict=True)) | {"None": MISSING}
        expected = [known[str(label)] for label in dictionary.to_pylist()[:3]]
        assert codes_of(encoder, rows) == expected, dictionary


def test_a_failed_batch_leaves_no_table_behind(tmp_path, monkeypatch):
    """One dictionary of the failed batch was looked up; the next batch has the one before it."""
    columns = {"a": pa.array(["u", "v"] * 2), "b": pa.array(["u", "v"] * 2)}
    encoder = fit_columns(tmp_path, columns, roles=dict.fromkeys(columns, "category"))
    straight, turned = pa.array(["u", "v"]), pa.array(["v", "u"])

    def rows(*dictionaries):
        indices = pa.array([0, 1], pa.int32())
        values = [pa.DictionaryArray.from_arrays(indices, labels) for labels in dictionaries]
        return pa.RecordBatch.from_arrays(values, names=["a", "b"])

    assert encoder.transform(rows(straight, straight)).codes.tolist() == [[2, 2], [3, 3]]
    with monkeypatch.context() as patch:
        look_up = Encoder._lut

        def fail_at_second(self, j, dictionary):
            if j == 1:
                raise MemoryError
            return look_up(self, j, dictionary)

        patch.setattr(Encoder, "_lut", fail_at_second)
        with pytest.raises(MemoryError):
            encoder.transform(rows(turned, turned))

    assert encoder.transform(rows(straight, turned)).codes.tolist() == [[2, 3], [3, 2]]


def test_no_rows_give_empty_arrays_and_null_columns_are_missing(tmp_path):
    columns = example_columns(50)
    encoder = fit(tmp_path, {"train": columns})
    nulls = {name: pa.nulls(3) for name in encoder.inputs}

    empty = encoder.transform(pa.table(columns).slice(0, 0))
    missing = encoder.transform(pa.table(nulls))

    assert (empty.numeric.shape, empty.codes.shape, len(empty)) == ((0, 3), (0, 2), 0)
    assert np.isnan(missing.numeric).all()
    assert (missing.codes == MISSING).all()


def test_targets_are_values_or_class_codes(tmp_path):
    columns = example_columns(100)
    encoder = fit(tmp_path, {"train": columns})
    out = encoder.transform(pa.RecordBatch.from_pydict(columns))
    delay = columns["delay"].to_numpy(zero_copy_only=False)

    assert np.array_equal(out.targets[:, 0], delay, equal_nan=True)  # every bit
    assert out.targets[:, 1].tolist() == columns["late"].cast(pa.float64()).to_pylist()


def test_a_missing_column_is_named_with_the_nearest_name(tmp_path):
    columns = example_columns(50)
    encoder = fit(tmp_path, {"train": columns})
    renamed = pa.table(columns).rename_columns(
        ["Seats" if name == "seats" else name for name in columns]
    )

    with pytest.raises(SchemaError, match=r"lack the columns \['seats'\].*nearest name: Seats"):
        encoder.transform(renamed)


@pytest.mark.parametrize("name", ["seats", "carrier", "delay", "row_id"])
def test_a_column_that_comes_twice_is_refused(tmp_path, name):
    columns = example_columns(50)
    encoder = fit(tmp_path, {"train": columns})
    rows = pa.table({"row_id": pa.array(np.arange(50)), **columns})
    rows = rows.append_column(name, rows[name])

    with pytest.raises(SchemaError, match=rf"\['{name}'\] more than once; keep one"):
        encoder.transform(rows)


@pytest.mark.parametrize(
    ("row_id", "message"),
    [
        (pa.array([5, None, 2**53 + 1]), "row_id has no value in row 1,"),
        (pa.array([5, 2**63 + 1, 3], pa.uint64()), f"row_id has the value {2**63 + 1},"),
        (pa.array([5.0, 6.0, 7.0]), "row_id has type double,"),
        (pa.array(["5", "6", "7"]), "row_id has type string,"),
    ],
    ids=["null", "uint64", "float", "text"],
)
def test_a_row_id_that_int64_cannot_hold_is_refused(tmp_path, row_id, message):
    """Ids name rows in predictions: one that is altered names another row."""
    encoder = fit_columns(tmp_path, {"x": pa.array([1.0, 2.0, 3.0])}, roles={"x": "numeric"})

    with pytest.raises(SchemaError, match=message):
        encoder.transform(pa.table({"row_id": row_id, "x": [1.0, 2.0, 3.0]}))


@pytest.mark.parametrize("dtype", [pa.uint8(), pa.int64(), pa.uint64()], ids=str)
def test_whole_row_ids_of_any_width_are_kept(tmp_path, dtype):
    encoder = fit_columns(tmp_path, {"x": pa.array([1.0, 2.0, 3.0])}, roles={"x": "numeric"})
    largest = min(2**63 - 1, 2**dtype.bit_width - 1)
    rows = pa.table({"row_id": pa.array([7, 0, largest], dtype), "x": [1.0, 2.0, 3.0]})

    assert encoder.transform(rows).row_id.tolist() == [7, 0, largest]
    assert encoder.transform(rows.slice(1)).row_id.tolist() == [0, largest]


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (pa.array([0, 300, -1]), "fold has the value 300,"),
        (pa.array([0.0, None, 1.5]), "fold has the value 1.5,"),
        (pa.array([0.0, np.nan, 1.0]), "fold has the value nan,"),
        (pa.array(["0", "1", None]), "fold has type string,"),
    ],
    ids=["wide", "fraction", "nan", "text"],
)
def test_a_fold_that_int8_cannot_hold_is_refused(tmp_path, fold, message):
    encoder = fit_columns(tmp_path, {"x": pa.array([1.0, 2.0, 3.0])}, roles={"x": "numeric"})

    with pytest.raises(SchemaError, match=message):
        encoder.transform(pa.table({"fold": fold, "x": [1.0, 2.0, 3.0]}))


@pytest.mark.parametrize("dtype", [pa.int8(), pa.int64(), pa.float64()], ids=str)
def test_folds_keep_their_number_and_are_minus_1_where_null(tmp_path, dtype):
    encoder = fit_columns(tmp_path, {"x": pa.array([1.0, 2.0, 3.0])}, roles={"x": "numeric"})
    rows = pa.table({"fold": pa.array([4, None, 127], dtype), "x": [1.0, 2.0, 3.0]})

    assert encoder.transform(rows).fold.tolist() == [4, -1, 127]


def test_a_type_that_does_not_fit_the_role_is_refused(tmp_path):
    columns = example_columns(50)
    encoder = fit(tmp_path, {"train": columns})
    text = pa.table({**columns, "seats": pa.array(["many"] * 50)})

    with pytest.raises(SchemaError, match="seats has type string but role numeric"):
        encoder.transform(text)
    when = pa.array(np.arange(4), pa.timestamp("us"))
    with pytest.raises(SchemaError, match=r"t has type timestamp\[us\] but role numeric"):
        fit_columns(tmp_path / "b", {"t": when}, roles={"t": "numeric"})
    lists = pa.array([[1], [2], [3], [4]])
    with pytest.raises(SchemaError, match=r"has type list.* but role category"):
        fit_columns(tmp_path / "c", {"t": lists}, roles={"t": "category"})


def test_nothing_to_learn_from_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no column .* is left to learn from.*'x': 'constant"):
        fit_columns(tmp_path, {"x": pa.array([1.0, 1.0])}, roles={"x": "numeric"})


def test_saved_and_loaded_it_encodes_the_same(tmp_path):
    columns = example_columns(300)
    encoder = fit(tmp_path, {"train": columns})
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")

    loaded = Encoder.load(tmp_path / "saved")

    assert loaded.digest == encoder.digest
    assert loaded.dropped == encoder.dropped
    a, b = encoder.transform(pa.table(columns)), loaded.transform(pa.table(columns))
    assert np.array_equal(a.numeric, b.numeric, equal_nan=True)
    assert np.array_equal(a.codes, b.codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "encoder format 2; this headrace reads format 1"),
        ({"contract": "0" * 64}, "was fitted for the contract 000000000000"),
        ({"numeric": 3}, "is not a fitted encoder"),
    ],
)
def test_a_foreign_encoder_is_refused(tmp_path, change, message):
    fit(tmp_path, {"train": example_columns(50)}).save(tmp_path)
    content = json.loads((tmp_path / ENCODER).read_text())
    (tmp_path / ENCODER).write_text(json.dumps(content | change))

    with pytest.raises(IntegrityError, match=message):
        Encoder.load(tmp_path)


def test_half_of_the_quantiles_is_refused(tmp_path):
    fit(tmp_path, {"train": example_columns(50)}).save(tmp_path)
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-40])

    with pytest.raises(IntegrityError, match="is missing or not whole"):
        Encoder.load(tmp_path)
