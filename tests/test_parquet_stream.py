"""Parquet files streamed without shards: the same encoded rows, a window of spans at a time."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import headrace
from headrace.data import parquet
from headrace.data.encoder import Encoder
from headrace.data.order import Position
from headrace.data.parquet import open_parquet
from headrace.data.stream import BatchStream, loader
from headrace.errors import ConfigError, DataError, SchemaError
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


def test_only_the_spans_of_a_window_or_two_are_held(project, monkeypatch):
    source = open_parquet(project / "reduce", "train", Encoder.load(project / "encode"))
    decoded = []
    decode = source._decode
    monkeypatch.setattr(source, "_decode", lambda place: decoded.append(place) or decode(place))
    batches = BatchStream(source, batch_size=20, order="window", window_rows=200)
    most = 0
    for _ in batches:
        most = max(most, len(source._held))

    assert most <= 4
    assert sorted(decoded) == [0, 1, 2, 3, 4]  # each span once an epoch


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


def test_another_file_is_another_stream(project, tmp_path):
    table = pq.read_table(project / "reduce" / "train" / "part-00000.parquet")
    states = []
    for rows in (400, 401):
        pq.write_table(table.slice(0, rows), tmp_path / "one.parquet")
        batches = headrace.stream(
            tmp_path / "one.parquet", batch_size=64, encoder=project / "encode"
        )
        states.append(batches.state_dict())

    assert states[0]["data"] != states[1]["data"]
    with pytest.raises(ConfigError, match="another stream"):
        batches.load_state_dict(states[0])


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
