"""The data contract: written once, read back equal, refused when it is of another form."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from headrace import storage
from headrace.errors import IntegrityError, SchemaError
from headrace.schema import Column, Contract, Target, arrow_type, encode_target, read_contract

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


def test_a_class_that_training_never_saw_is_refused():
    late = Target(name="late", task="binary", labels=("no", "yes"))
    with pytest.raises(SchemaError, match=r"\['maybe'\].*known: \['no', 'yes'\]"):
        encode_target(pa.array(["no", "maybe"]), late)
