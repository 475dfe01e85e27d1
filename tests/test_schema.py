"""The data contract: written once, read back equal, refused when it is of another form."""

import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from headrace import storage
from headrace.errors import IntegrityError, SchemaError
from headrace.schema import (
    Column,
    Contract,
    Split,
    Target,
    arrow_type,
    encode_target,
    file_stem,
    label_text,
    read_contract,
)
from tests import extract_case

CONTRACT = Contract(
    columns=(
        Column(name="id", role="key", dtype="int64"),
        Column(name="age", role="numeric", dtype="double", low=0.0, high=99.0),
        Column(name="job", role="category", dtype="string", cardinality=3),
        Column(name="late", role="target", dtype="bool"),
    ),
    targets=(Target(name="late", task="binary", labels=("false", "true")),),
)


def test_a_contract_survives_its_file(tmp_path: Path):
    storage.write_file(tmp_path / "contract.json", CONTRACT.to_json())
    assert read_contract(tmp_path) == CONTRACT
    assert CONTRACT.features == ("age", "job")
    assert CONTRACT.weight is None


def test_the_split_is_recorded_and_its_absence_changes_no_digest(tmp_path: Path):
    assert CONTRACT.split is None
    assert "split" not in CONTRACT.to_json()
    by_time = CONTRACT.model_copy(update={"split": Split(kind="time", column="age")})
    storage.write_file(tmp_path / "contract.json", by_time.to_json())
    assert read_contract(tmp_path) == by_time
    assert by_time.digest != CONTRACT.digest


def test_extract_records_the_split(tmp_path: Path):
    case = extract_case.Case(tmp_path)
    case.table()
    case.run(split={"kind": "grouped", "column": "id"}, key=[])
    assert read_contract(case.out).split == Split(kind="grouped", column="id")


def test_a_file_stem_is_one_plain_name_for_any_text():
    names = [
        "late",
        "km/h",
        "..",
        ".",
        "",
        "%",
        "%2E",
        "a b",
        "a_b",
        "ä",
        "~",
        "\\x",
        "v1.5-x",
        ".",
    ]
    stems = {name: file_stem(name) for name in names}
    assert stems["late"] == "late"
    assert stems["v1.5-x"] == "v1.5-x"
    assert len(set(stems.values())) == len(stems)
    assert all(re.fullmatch(r"[A-Za-z0-9_%-][A-Za-z0-9._%-]*", stem) for stem in stems.values())


def test_another_format_is_refused_with_the_way_out(tmp_path: Path):
    storage.write_json(tmp_path / "contract.json", {"format": 2})
    with pytest.raises(IntegrityError, match=r"format 2.*headrace upgrade"):
        read_contract(tmp_path)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(SchemaError, match="nearest name: age"):
        CONTRACT.column("agee")
    with pytest.raises(SchemaError, match="nearest name: late"):
        CONTRACT.target("lat")


def test_labels_must_fit_the_task():
    for task, labels in [("regression", ("a",)), ("binary", ("a",)), ("multiclass", ("a", "b"))]:
        with pytest.raises(ValidationError, match=f"a {task} target cannot have"):
            Target(name="y", task=task, labels=labels)


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.float32(),
        pa.float64(),
        pa.bool_(),
        pa.string(),
        pa.large_string(),
        pa.date32(),
        pa.timestamp("us"),
        pa.timestamp("ms", tz="UTC"),
        pa.time64("us"),
        pa.decimal128(18, 3),
        pa.list_(pa.float32()),
        pa.dictionary(pa.int16(), pa.string()),
    ],
)
def test_arrow_types_are_read_back_from_their_text(kind: pa.DataType):
    assert arrow_type(str(kind)) == kind


def test_targets_become_codes_and_missing_stays_missing():
    late = Target(name="late", task="binary", labels=("false", "true"))
    assert encode_target(pa.array([True, None, False]), late).tolist()[::2] == [1.0, 0.0]
    assert np.isnan(encode_target(pa.array([True, None, False]), late)[1])
    numbers = Target(name="n", task="multiclass", labels=("1", "2", "3"))
    for kind in (pa.int8(), pa.float64()):
        codes = encode_target(pa.array([3, 1, 2]).cast(kind), numbers)
        assert codes.tolist() == [2.0, 0.0, 1.0]
    words = pa.array(["b", "a"]).dictionary_encode()
    assert encode_target(words, Target(name="w", task="binary", labels=("a", "b"))).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    "kind",
    [pa.uint8(), pa.int64(), pa.float32(), pa.float64(), pa.decimal128(2, 1), pa.decimal128(18, 3)],
    ids=str,
)
def test_a_whole_label_is_one_text_in_every_type(kind: pa.DataType):
    one, zero = (Decimal(1), Decimal(0)) if pa.types.is_decimal(kind) else (1, 0)
    values = pa.array([one, zero, None], kind)

    assert label_text(values).to_pylist() == ["1", "0", None]
    assert label_text(values.dictionary_encode()).to_pylist() == ["1", "0", None]


def test_other_numbers_are_the_shortest_decimal_whatever_stands_beside_them():
    numbers = ["2.50", "1", "-0.1", "0.0000001", "-3.00", "1500.25"]
    expected = ["2.5", "1", "-0.1", "1e-7", "-3", "1500.25"]
    decimals = pa.array([Decimal(number) for number in numbers], pa.decimal128(30, 9))

    assert label_text(decimals).to_pylist() == expected
    assert label_text(pa.array([float(number) for number in numbers])).to_pylist() == expected
    long = pa.array([Decimal("0.12345678901234567890"), Decimal("0.12345678901234567891")])
    assert len(set(label_text(long).to_pylist())) == 2


def test_a_class_that_training_never_saw_is_refused():
    late = Target(name="late", task="binary", labels=("no", "yes"))
    with pytest.raises(SchemaError, match=r"'maybe' \(rows here: 1\).*known: \['no', 'yes'\]"):
        encode_target(pa.array(["no", "maybe"]), late)


def test_classes_are_looked_up_by_what_rows_have():
    """A dictionary may hold labels that no row has; a null may lie in it or beside it."""
    target = Target(name="t", task="binary", labels=("a", "b"))
    unused = pa.array(["a", "x", "b"]).dictionary_encode().take(pa.array([2, 0, None, 2]))
    within = pa.DictionaryArray.from_arrays(
        pa.array([0, 1, 2, None], pa.int8()), pa.array(["b", None, "a"])
    )

    assert encode_target(unused, target).tolist()[:2] == [1.0, 0.0]
    assert np.isnan(encode_target(unused, target)).tolist() == [False, False, True, False]
    assert np.isnan(encode_target(within, target)).tolist() == [False, True, False, True]
    assert np.isnan(encode_target(pa.nulls(2), target)).all()
    with pytest.raises(SchemaError, match=r"do not have: 'x' \(rows here: 1\)"):
        encode_target(pa.array(["a", "x", "b"]).dictionary_encode(), target)
