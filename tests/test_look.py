"""A decoded batch: labels, numbers and classes come back; what the text and the command show."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.commands.batch import show_batch
from headrace.data.encoder import fit_encoder
from headrace.data.look import MISSING_TEXT, UNKNOWN_TEXT, decode, look_at, number_text
from headrace.data.shards import open_shards
from headrace.data.stream import BatchStream, to_tensors
from headrace.errors import ConfigError, IntegrityError, SchemaError
from headrace.models.nn import NnParams, fit
from headrace.project import Project
from headrace.record import MemoryRecorder
from headrace.schema import Target, label_text
from tests import encode_tables, train_case

FIT = {
    "threads": 1,
    "max_categories": 50_000,
    "min_count": 2,
    "num_quantiles": 10,
    "quantile_rows": 1000,
}


def fitted(folder, columns, **options):
    table = encode_tables.write_table(folder, {"train": columns}, **options)
    return table, fit_encoder(table, seed=0, **FIT)


def changed(batch, **fields):
    """Return a copy of a batch with other values in some of its fields."""
    copy = batch.where(np.arange(len(batch)))
    for name, values in fields.items():
        getattr(copy, name)[...] = values
    return copy


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    table, encoder = fitted(
        tmp_path_factory.mktemp("look") / "reduce", encode_tables.example_columns(300)
    )
    rows = next(table.batches("train", encoder.columns, batch_rows=300))
    return encoder, rows, encoder.transform(rows)


def test_decoding_undoes_encoding(example):
    """Labels and classes to the letter; numbers to float32 of their distance from the mean."""
    encoder, rows, batch = example
    decoded = decode(batch, encoder)

    assert decoded.column_names == list(encoder.columns)
    for name in ("row_id", "fold", "delay"):
        assert decoded[name].combine_chunks().equals(rows.column(name))
    for name in ("carrier", "gate", "late"):
        assert decoded[name].to_pylist() == label_text(rows.column(name)).to_pylist()
    for scale in encoder.scales:
        truth = rows.column(scale.name).cast(pa.float64()).to_numpy(zero_copy_only=False)
        found = decoded[scale.name].to_numpy()
        assert np.array_equal(np.isnan(found), np.isnan(truth))
        error = np.abs(found - truth)[~np.isnan(truth)]
        assert (error <= 2.0**-24 * np.abs(truth - scale.mean)[~np.isnan(truth)] + 1e-9).all()
    assert encoder.transform(decoded).numeric.tobytes() == batch.numeric.tobytes()
    assert np.array_equal(encoder.transform(decoded).codes, batch.codes)


labels = st.one_of(st.none(), st.text(max_size=6), st.integers(-3, 3), st.floats(width=32))


@settings(max_examples=25, deadline=None)  # it writes a table and fits an encoder
@given(st.lists(labels, min_size=1, max_size=30))
def test_any_label_comes_back_as_its_canonical_text_or_as_unknown(tmp_path_factory, values):
    is_text = any(isinstance(value, str) for value in values)
    given_ = [None if v is None else str(v) if is_text else float(v) for v in values]
    column = pa.array(given_, pa.string() if is_text else pa.float64())
    known = pa.concat_arrays([column, column, pa.array(["0", "0", "1", "1"]).cast(column.type)])
    columns = {"c": known, "y": pa.array(np.arange(len(known), dtype=float))}
    _, encoder = fitted(
        tmp_path_factory.mktemp("labels") / "t",
        columns,
        roles={"c": "category", "y": "target"},
        targets=(Target(name="y", task="regression"),),
    )
    rows = pa.table({"c": pa.concat_arrays([column, pa.array(["97"]).cast(column.type)])})
    decoded = decode(encoder.transform(rows), encoder)["c"].to_pylist()

    assert decoded[:-1] == label_text(column).to_pylist()
    assert decoded[-1] == ("97" if "97" in decoded[:-1] else UNKNOWN_TEXT)


def test_tensors_decode_as_arrays_do(example):
    encoder, _, batch = example
    fresh = batch.where(np.arange(len(batch)))
    assert decode(to_tensors(fresh), encoder).equals(decode(batch, encoder))


def test_the_summary_counts_what_is_there(example):
    encoder, _, batch = example
    carrier = [category.name for category in encoder.categories].index("carrier")
    codes = batch.codes.copy()
    codes[:30, carrier] = 0
    codes[30:40, carrier] = 1
    codes[40:, carrier] = np.where(np.arange(60) % 4 == 0, 3, 4)
    look = look_at(changed(batch, codes=codes), encoder, num_rows=2)
    by_name = {column.name: column for column in look.columns}
    found, late = by_name["carrier"], by_name["late"]
    truth = decode(batch, encoder)

    assert [column.name for column in look.columns] == list(encoder.columns[2:])
    assert (found.num_unknown, found.num_missing, found.num_labels) == (30, 10, 2)
    assert found.labels == (("UA", 45), ("B6", 15))
    assert dict(late.labels) == {
        "false": pc.sum(pc.equal(truth["late"], "false")).as_py(),
        "true": pc.sum(pc.equal(truth["late"], "true")).as_py(),
    }
    seats = truth["seats"].to_numpy()
    assert (by_name["seats"].low, by_name["seats"].high) == (seats.min(), seats.max())
    assert by_name["seats"].median == np.median(seats)
    assert by_name["delay"].num_missing == truth["delay"].null_count > 0
    assert by_name["importance"].kind == "weight"
    assert look.rows.equals(decode(changed(batch, codes=codes), encoder).slice(0, 2))


def test_the_text_fits_the_terminal_and_shows_every_column_and_row(example):
    encoder, _, batch = example
    text = look_at(batch, encoder, num_rows=20).text(width=80)
    lines = text.splitlines()

    assert max(map(len, lines)) <= 80
    for name in encoder.columns[2:]:
        assert sum(line.startswith(f"{name} ") for line in lines) >= 2
    shown = [word for line in lines if line.startswith("row_id") for word in line.split()[1:]]
    assert shown == [str(i) for i in range(20)]
    seats = next(c for c in look_at(batch, encoder, num_rows=1).columns if c.name == "seats")
    assert f"{number_text(seats.low, seats.step)} …" in text
    assert all("." not in word for line in lines if line.startswith("seats") for word in line)


def test_a_batch_without_anything_is_shown(example):
    encoder, _, batch = example
    nothing = changed(batch.where(np.arange(1)), numeric=np.nan, codes=1, targets=np.nan)
    look = look_at(nothing, encoder, num_rows=8)

    assert all(c.num_missing == 1 for c in look.columns if c.kind != "weight")
    assert look.text().count(MISSING_TEXT) == len(look.columns) - 1
    assert look_at(batch.where(np.arange(0)), encoder, num_rows=8).rows.num_rows == 0


def test_labels_cannot_move_the_cursor(tmp_path):
    columns = {
        "c": pa.array(["a\x1b[2J\nb", "a\x1b[2J\nb", "", ""]),
        "y": pa.array([1.0, 2.0, 3.0, 4.0]),
    }
    table, encoder = fitted(
        tmp_path / "t",
        columns,
        roles={"c": "category", "y": "target"},
        targets=(Target(name="y", task="regression"),),
    )
    rows = next(table.batches("train"))
    text = look_at(encoder.transform(rows), encoder, num_rows=4).text()

    assert "\x1b" not in text
    assert "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b" in text
    assert '""' in text


def test_a_batch_of_another_encoder_is_refused(example, tmp_path):
    encoder, _, batch = example
    columns = encode_tables.example_columns(300)
    del columns["seats"]
    _, other = fitted(tmp_path / "t", columns)
    with pytest.raises(SchemaError, match="the encoder was fitted on 2, 2 and 2"):
        decode(batch, other)
    with pytest.raises(SchemaError, match="codes without a label"):
        decode(changed(batch, codes=200), encoder)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    encode_tables.encode_example(root / "data")
    return Project(root)


ASKED = {"split": "train", "order": "exact", "seed": 0, "epoch": 0, "batch": 0}
ASKED |= {"batch_size": 64, "num_rows": 3}


def test_the_command_shows_the_batch_it_names(project, monkeypatch):
    monkeypatch.chdir(project.root)
    first = show_batch(project, **ASKED)
    again = show_batch(project, **ASKED)
    later = show_batch(project, **{**ASKED, "epoch": 1, "batch": 7})
    content = json.loads(json.dumps(later.to_json()))

    assert first.look.rows.equals(again.look.rows)
    assert not first.look.rows.equals(later.look.rows)
    assert first.text(width=100).startswith(
        "train: batch 0 of 8 (from 0), 64 of 500 rows; epoch 0, order exact, seed 0\n"
    )
    assert (content["epoch"], content["batch"], content["rows"]) == (1, 7, 52)
    assert len(content["first_rows"]) == 3
    assert isinstance(content["first_rows"][0]["row_id"], str)


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        ({"split": "tset"}, SchemaError, "no split 'tset'; nearest name: test"),
        ({"batch": 8}, ConfigError, "no batch 8 in epoch 0: .* has 8 batches of up to 64 rows"),
        ({"epoch": -1}, ConfigError, "no batch 0 in epoch -1"),
        ({"order": "random"}, ConfigError, "must be one of exact, window, block, sequential"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"num_rows": 0}, ConfigError, "--rows is 0"),
    ],
)
def test_what_is_not_there_is_one_message(project, monkeypatch, change, kind, told):
    monkeypatch.chdir(project.root)
    with pytest.raises(kind, match=told):
        show_batch(project, **{**ASKED, **change})


def test_a_split_smaller_than_the_default_batch_is_one_batch(project, monkeypatch):
    monkeypatch.chdir(project.root)
    shown = show_batch(project, **{**ASKED, "split": "test", "batch_size": None})

    assert (shown.num_batches, shown.look.num_rows, shown.look.rows.num_rows) == (1, 40, 3)


def test_before_encode_the_way_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError, match="data/encode does not exist; run `headrace repro`"):
        show_batch(Project(tmp_path), **ASKED)


class Halt(Exception):
    pass


class HaltingRecorder(MemoryRecorder):
    """Ends the training in its second batch."""

    def progress(self, done, total, *, unit, detail=""):
        super().progress(done, total, unit=unit, detail=detail)
        if detail.startswith("batch 2/"):
            raise Halt


def test_training_records_its_first_batch_once(tmp_path):
    """On a fresh start only: a resumed run has told it before."""
    views = train_case.make_case(tmp_path, num_train=200)
    params = NnParams(
        device="cpu", hidden_sizes=(4,), batch_rows=32, max_epochs=2, checkpoint_minutes=0.0
    )

    def run(recorder):
        folder = tmp_path / "checkpoints"
        fit(
            views,
            params,
            checkpoints=folder,
            resources=train_case.RESOURCES,
            recorder=recorder,
        )

    fresh, resumed = HaltingRecorder(), MemoryRecorder()
    with pytest.raises(Halt):
        run(fresh)
    run(resumed)
    (path, folder), *more = fresh.files
    lines = [line.split() for line in path.read_text().splitlines()]
    learn = open_shards(views.encoded, "train").read("fold") != views.stop.fold
    first = next(iter(BatchStream(views.encoded, batch_size=32, rows=learn)))
    shown = next(line for line in lines if line[:1] == ["row_id"])[1:]

    assert (path.name, folder, more) == ("first_batch.txt", "data", [])
    assert ["late", "binary"] in [line[:2] for line in lines]
    assert shown == [str(i) for i in first.row_id[: len(shown)].tolist()]
    assert resumed.notes[0].startswith("Resumed in epoch 1 after 1 batches")
    assert "first_batch.txt" not in [path.name for path, _ in resumed.files]


def test_a_stream_is_three_lines_in_anyones_loop_from_anywhere_in_the_project(project, monkeypatch):
    """The three lines of the documentation, literally."""
    (project.root / "params.yaml").write_text("version: 1\n")
    (project.root / "notebooks").mkdir()
    monkeypatch.chdir(project.root / "notebooks")
    program = (
        "import headrace\n"
        'for batch in headrace.stream("data/encode", batch_size=64):\n'
        "    step(batch.numeric, batch.codes, batch.targets)\n"
    )
    shapes = []
    names = {"step": lambda *tensors: shapes.append([tuple(t.shape) for t in tensors])}
    exec(program, names)

    assert shapes[0] == [(64, 3), (64, 2), (64, 2)]
    assert sum(shape[0][0] for shape in shapes) == 500
