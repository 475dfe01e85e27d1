"""Parquet files streamed without shards: the same encoded rows, a window of spans at a time."""

import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import headrace
from headrace.data import parquet
from headrace.data.encoder import Encoder
from headrace.data.layout import RowLayout
from headrace.data.order import Position
from headrace.data.parquet import open_parquet
from headrace.data.stream import BatchStream, loader
from headrace.errors import ConfigError, DataError, IntegrityError, SchemaError
from tests.encode_tables import encode_example

FIELDS = ("row_id", "numeric", "codes", "targets", "weight", "fold")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    encode_example(folder, num_train=500)
    return folder


@pytest.fixture(autouse=True)
def small_spans(monkeypatch):
    monkeypatch.setattr(parquet, "SPAN_ROWS", 100)  # a span per row group


def columns(batches):
    rows = [torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS]
    order = torch.argsort(rows[0])
    return [torch.nan_to_num(column[order]) for column in rows]


def from_table(project, **settings):
    return headrace.stream(
        project / "reduce", batch_size=64, encoder=project / "encode", **settings
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", ["window", "sequential"])
def test_a_table_gives_the_rows_that_its_shards_hold(project, order, threads):
    from_shards = headrace.stream(project / "encode", batch_size=64)
    batches = list(from_table(project, order=order, threads=threads))

    assert [len(batch) for batch in batches] == [64] * 7 + [52]
    for ours, stored in zip(columns(batches), columns(list(from_shards)), strict=True):
        assert torch.equal(ours, stored)


def test_it_stops_and_goes_on_like_any_stream(project):
    """In mid-epoch, with a thread reading ahead, in another order each epoch."""
    batches = from_table(project)
    epochs = [[b.row_id.tolist() for b in batches] for _ in range(2)]
    running = iter(batches)
    seen = [next(running).row_id.tolist() for _ in range(3)]
    resumed = from_table(project)
    resumed.load_state_dict(batches.state_dict())
    rest = [b.row_id.tolist() for b in loader(resumed)]

    assert epochs[0] != epochs[1]
    assert resumed.position == Position(3, 0)
    assert seen + rest == [b.row_id.tolist() for b in _third_epoch(project)]


def _third_epoch(project):
    batches = from_table(project)
    batches.set_position(2)
    return batches


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_one_window_is_in_memory_and_decoded_once(project, monkeypatch, batch_size, threads):
    """Also where a batch has rows of two windows, and where it has only some spans of one."""
    source = open_parquet(
        project / "reduce", "train", Encoder.load(project / "encode"), threads=threads
    )
    source.hold(2)
    spans, decoded, alive = [], [], []
    empty, decode = RowLayout.empty, source._decode

    def counted_empty(layout, num_rows):
        buffer = empty(layout, num_rows)
        if num_rows == 100:  # a span, not a batch
            spans.append(weakref.ref(buffer))
        return buffer

    def counted_decode(place, *rest):
        decoded.append(place)
        alive.append(sum(span() is not None for span in spans))
        return decode(place, *rest)

    monkeypatch.setattr(RowLayout, "empty", counted_empty)
    monkeypatch.setattr(source, "_decode", counted_decode)
    batches = BatchStream(source, batch_size=batch_size, order="window", window_rows=200)
    epochs, decoded_by = [], []
    for _ in range(3):
        epochs.append(torch.cat([batch.row_id for batch in batches]).tolist())
        decoded_by.append(list(decoded))
        decoded.clear()

    assert sorted(decoded_by[0]) == [0, 1, 2, 3, 4]
    assert all(len(set(places)) == len(places) for places in decoded_by)  # some are still held
    assert max(alive) == 2
    assert [sorted(rows) for rows in epochs] == [list(range(500))] * 3


def test_what_a_default_stream_mixes_is_held_without_being_told(project, monkeypatch):
    source = open_parquet(project / "reduce", "train", Encoder.load(project / "encode"))
    decoded = []
    decode = source._decode
    monkeypatch.setattr(
        source, "_decode", lambda place, *rest: decoded.append(place) or decode(place, *rest)
    )
    list(BatchStream(source, batch_size=1, order="window"))

    assert sorted(decoded) == [0, 1, 2, 3, 4]


def test_several_decoding_threads_give_the_rows_of_one(project):
    """Over windows and epochs, so that the memory of old spans is used again."""
    encoder = Encoder.load(project / "encode")
    epochs = []
    for threads in (1, 4):
        source = open_parquet(project / "reduce", "train", encoder, threads=threads)
        source.hold(3)
        batches = BatchStream(source, batch_size=70, order="window", window_rows=300)
        epochs.append([[batch.to("cpu") for batch in batches] for _ in range(4)])

    for one, four in zip(*epochs, strict=True):
        assert [b.row_id.tolist() for b in one] == [b.row_id.tolist() for b in four]
        for ours, theirs in zip(columns(one), columns(four), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_threads_may_read_one_source(project, threads):
    encoder = Encoder.load(project / "encode")
    source = open_parquet(project / "reduce", "train", encoder, threads=threads)
    source.hold(2)
    expected = columns(list(headrace.stream(project / "encode", batch_size=64)))

    def read(seed):
        batches = BatchStream(source, batch_size=20, order="window", window_rows=200, seed=seed)
        return [columns(list(batches)) for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        found = [epoch for epochs in pool.map(read, range(4)) for epoch in epochs]
    assert len(found) == 32
    for epoch in found:
        for ours, stored in zip(epoch, expected, strict=True):
            assert torch.equal(ours, stored)


def test_a_source_goes_to_another_process_without_what_it_holds(project):
    source = open_parquet(project / "reduce", "train", Encoder.load(project / "encode"))
    rows = np.array([7, 450, 3])
    here, there = (source.schema.rows.empty(3) for _ in range(2))
    source.gather(rows, here)
    sent = pickle.loads(pickle.dumps(source))
    assert not sent._held
    sent.gather(rows, there)

    assert np.array_equal(here, there)
    assert sent.digest == source.digest


def test_files_of_ones_own_are_numbered_through(project, tmp_path):
    table = pq.read_table(project / "reduce" / "train" / "part-00000.parquet")
    for number, first in enumerate(range(0, 500, 250)):
        part = table.slice(first, 250).drop_columns(["row_id", "fold"])
        pq.write_table(part, tmp_path / f"part-{number}.parquet", row_group_size=100)
    for source in (tmp_path, tmp_path / "part-*.parquet"):
        batches = headrace.stream(
            source, batch_size=64, order="sequential", encoder=project / "encode"
        )
        rows = torch.cat([batch.row_id for batch in batches])
        assert rows.tolist() == list(range(500))
    numeric = torch.cat([batch.numeric for batch in batches])
    stored = headrace.stream(project / "encode", batch_size=64, order="sequential")
    expected = torch.cat([batch.numeric for batch in stored])
    assert torch.equal(torch.nan_to_num(numeric), torch.nan_to_num(expected))


def test_what_cannot_be_streamed_is_refused(project, tmp_path):
    with pytest.raises(ConfigError, match="encoded while it is streamed, which the order 'exact'"):
        from_table(project, order="exact")
    with pytest.raises(ConfigError, match="the order 'weighted'"):
        from_table(project, sampling="weighted")
    with pytest.raises(DataError, match="names no Parquet file; give a file"):
        headrace.stream(tmp_path / "*.parquet", batch_size=4, encoder=project / "encode")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"torn\.parquet is not a whole Parquet file"):
        headrace.stream(tmp_path / "torn.parquet", batch_size=4, encoder=project / "encode")
    table = pq.read_table(project / "reduce" / "train" / "part-00000.parquet")
    pq.write_table(table.drop_columns(["gate"]), tmp_path / "narrow.parquet")
    narrow = headrace.stream(tmp_path / "narrow.parquet", batch_size=4, encoder=project / "encode")
    with pytest.raises(SchemaError, match=r"lack the columns \['gate'\]"):
        next(iter(narrow))


def own_file(project, path, change=lambda table: table):
    """Write the train rows, changed, as a file of one's own; return its stream."""
    table = pq.read_table(project / "reduce" / "train" / "part-00000.parquet")
    pq.write_table(change(table), path, row_group_size=100, compression="none")
    return headrace.stream(path, batch_size=64, order="sequential", encoder=project / "encode")


def swapped(table):
    rows = np.arange(len(table))
    rows[[3, 4]] = 4, 3
    return table.take(rows)


def with_value(name, value):
    def change(table):
        values = table.column(name).to_pylist()
        values[3] = value
        place = table.schema.get_field_index(name)
        return table.set_column(place, name, pa.array(values, pa.float64()))

    return change


@pytest.mark.parametrize("change", [swapped, lambda table: table.slice(1)])
def test_other_rows_are_another_stream(project, tmp_path, change):
    """Also two rows that changed places, of which the footer knows nothing."""
    state = own_file(project, tmp_path / "one.parquet").state_dict()
    same = own_file(project, tmp_path / "two.parquet")
    other = own_file(project, tmp_path / "one.parquet", change)

    same.load_state_dict(state)
    with pytest.raises(ConfigError, match="another stream"):
        other.load_state_dict(state)


def test_the_bytes_of_files_are_digested_once_and_only_for_a_state(project, tmp_path, monkeypatch):
    digested = []
    digest_file = parquet.digest_file
    monkeypatch.setattr(
        parquet, "digest_file", lambda path: digested.append(path) or digest_file(path)
    )
    batches = own_file(project, tmp_path / "one.parquet")
    list(batches)
    assert digested == []
    states = [batches.state_dict(), batches.state_dict()]

    assert digested == [tmp_path / "one.parquet"]
    assert states[0] == states[1]


def test_a_file_that_changes_while_it_is_streamed_is_refused(project, tmp_path):
    path = tmp_path / "one.parquet"
    batches = own_file(project, path)
    next(iter(batches))
    own_file(project, path, swapped)  # of the same length
    os.utime(path, ns=(0, 0))

    with pytest.raises(IntegrityError, match=r"one\.parquet was changed after it was opened"):
        list(batches)
    with pytest.raises(IntegrityError, match=r"one\.parquet was changed after it was opened"):
        batches.state_dict()
    path.unlink()
    with pytest.raises(IntegrityError, match=r"one\.parquet was opened and cannot be reached"):
        list(batches)


def test_damaged_pages_are_refused_with_the_file(project, tmp_path):
    path = tmp_path / "one.parquet"
    own_file(project, path)
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 400)  # pages of the first row group; the footer is whole
    batches = headrace.stream(path, batch_size=64, encoder=project / "encode")

    with pytest.raises(
        IntegrityError, match=r"(?s)one\.parquet cannot be decoded .* write the file"
    ):
        list(batches)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("importance", -1.0, "have the weight 'importance' null, negative or infinite"),
        ("importance", None, "have the weight 'importance' null, negative or infinite"),
        ("delay", np.inf, "have the target 'delay' infinite or beyond float32"),
    ],
)
def test_unusable_weights_and_targets_are_refused_as_by_the_stage(
    project, tmp_path, name, value, message
):
    batches = own_file(project, tmp_path / "one.parquet", with_value(name, value))

    with pytest.raises(DataError, match=rf"1 rows of .*one\.parquet {message}.*ids: \['3'\]"):
        list(batches)


def test_rows_without_any_label_come_with_nan(project, tmp_path):
    """Unlike shards, which leave them out of train; no loss counts them."""

    def unlabelled(table):
        for name in ("delay", "late"):
            place = table.schema.get_field_index(name)
            values = table.column(name).to_pylist()
            values[3] = None
            table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
        return table

    batches = list(own_file(project, tmp_path / "one.parquet", unlabelled))

    assert sum(map(len, batches)) == 500
    assert torch.isnan(batches[0].targets[3]).all()


def test_sampling_is_an_order_of_the_stream(project):
    """Balanced classes in every batch; the same rows after a stop, and on two ranks."""

    def drawn(**settings):
        return BatchStream(
            project / "encode", batch_size=40, sampling="balanced:late", seed=3, **settings
        )

    batches = drawn()
    whole = list(batches)
    shares = [float((batch.targets[:, 1] == 1).float().mean()) for batch in whole]
    assert np.abs(np.array(shares[:-1]) - 0.5).max() <= 0.03
    stopped = drawn()
    running = iter(stopped)
    for _ in range(4):
        next(running)
    resumed = drawn()
    resumed.load_state_dict(stopped.state_dict())
    assert [b.row_id.tolist() for b in resumed] == [b.row_id.tolist() for b in whole[4:]]
    with pytest.raises(ConfigError, match="'sampling': 'balanced:late there, None here'"):
        BatchStream(project / "encode", batch_size=40, seed=3).load_state_dict(stopped.state_dict())


def test_sampled_rows_come_from_the_chosen_ones(project):
    chosen = np.arange(0, 500, 3)
    for sampling in ("weighted", "balanced:late"):
        batches = headrace.stream(project / "encode", batch_size=30, sampling=sampling, rows=chosen)
        rows = torch.cat([batch.row_id for batch in batches])
        assert set(rows.tolist()) <= set(chosen.tolist())
        assert len(set(rows.tolist())) > 20
