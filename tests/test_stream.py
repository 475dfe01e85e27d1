"""The stream: every row once per epoch, restartable anywhere, batches that stay as they are."""

import multiprocessing
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headrace
from headrace.data.order import KINDS, Position
from headrace.data.shards import open_shards
from headrace.data.stream import BatchStream, loader, stream, to_tensors
from headrace.errors import ConfigError, IntegrityError, ResourceError
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.stages.encode import EncodeParams, encode
from tests.encode_tables import ROLES, encode_example, example_columns, write_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    encoded, _, _ = encode_example(tmp_path_factory.mktemp("stream"), num_train=500)
    return encoded


def ids(batches):
    """Return the row ids batch by batch."""
    return [batch.row_id.tolist() for batch in batches]


def flat(lists):
    return [value for values in lists for value in values]


def same(a, b):
    return all(
        torch.equal(torch.nan_to_num(getattr(a, name)), torch.nan_to_num(getattr(b, name)))
        for name in ("row_id", "numeric", "codes", "targets", "weight", "fold")
    )


def test_three_lines_are_enough(folder):
    batches = list(headrace.stream(folder, batch_size=64))

    assert [len(batch) for batch in batches] == [64] * 7 + [52]
    assert batches[0].numeric.shape == (64, 3)
    assert batches[0].numeric.dtype == torch.float32
    assert batches[0].codes.dtype == torch.int32
    assert batches[0].targets.shape == (64, 2)


def test_the_parts_of_a_batch_are_its_rows_in_their_order(folder):
    batch = next(iter(headrace.stream(folder, batch_size=64)))
    parts = batch.split([30, 33, 1])

    assert [len(part) for part in parts] == [30, 33, 1]
    assert flat(ids(parts)) == batch.row_id.tolist()
    assert torch.equal(torch.cat([part.codes for part in parts]), batch.codes)
    assert parts[1].numeric.data_ptr() == batch.numeric[30:].data_ptr()  # no copy


@pytest.mark.parametrize("order", KINDS)
def test_each_pass_is_an_epoch_of_every_row_once(folder, order):
    """Two passes: all rows each time, in another order each time unless sequential."""
    batches = stream(folder, batch_size=33, order=order)
    first, second = flat(ids(batches)), flat(ids(batches))

    assert sorted(first) == sorted(second) == list(range(500))
    assert (first == second) == (order == "sequential")
    assert batches.position == Position(2, 0)


def test_sequential_is_the_order_of_the_table(folder):
    batches = stream(folder, batch_size=33, split="valid", order="sequential")

    assert flat(ids(batches)) == list(range(500, 560))


def test_what_belongs_to_a_row_moves_with_it(folder):
    """Numbers, codes, targets, weight and fold of a row are those of its id."""
    stored = open_shards(folder, "train").slice(0, 500)
    for batch in stream(folder, batch_size=100, order="window", seed=5):
        rows = stored.where(batch.row_id.numpy())
        assert np.array_equal(batch.numeric.numpy(), rows.numeric, equal_nan=True)
        assert np.array_equal(batch.codes.numpy(), rows.codes)
        assert np.array_equal(batch.targets.numpy(), rows.targets, equal_nan=True)
        assert np.array_equal(batch.weight.numpy(), rows.weight)
        assert np.array_equal(batch.fold.numpy(), rows.fold)


def test_a_held_batch_is_never_overwritten(folder):
    held = list(stream(folder, batch_size=50))
    again = stream(folder, batch_size=50)

    assert all(same(a, b) for a, b in zip(held, again, strict=True))
    held[0].numeric.zero_()
    assert not same(held[0], next(iter(stream(folder, batch_size=50))))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    order=st.sampled_from(KINDS),
    batch_size=st.integers(1, 300),
    num_ranks=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
def test_ranks_share_an_epoch_in_equal_steps(folder, order, batch_size, num_ranks, epoch):
    per_rank = []
    for rank in range(num_ranks):
        batches = BatchStream(
            folder,
            batch_size=min(batch_size, 500 // num_ranks),
            order=order,
            rank=rank,
            num_ranks=num_ranks,
        )
        batches.set_position(epoch)
        per_rank.append(ids(batches))

    assert len({len(batches) for batches in per_rank}) == 1
    assert sorted(flat(flat(per_rank))) == list(range(500))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(order=st.sampled_from(KINDS), used=st.integers(0, 20), epoch=st.integers(0, 2))
def test_a_stopped_stream_goes_on_with_the_same_rows(folder, order, used, epoch):
    """Stop after some batches, save, load into a new stream: the rest of the epoch is equal."""
    first = stream(folder, batch_size=24, order=order)
    first.set_position(epoch)
    rest = iter(first)
    for _ in range(used):
        next(rest)
    state = first.state_dict()

    resumed = stream(folder, batch_size=24, order=order)
    resumed.load_state_dict(state)

    assert resumed.position == Position(epoch, used)
    assert ids(resumed) == ids(rest)


def test_a_batch_counts_when_it_is_handed_out(folder):
    batches = stream(folder, batch_size=100)
    running = iter(batches)
    assert batches.position == Position(0, 0)
    next(running)
    assert batches.position == Position(0, 1)
    for _ in range(4):
        next(running)
    assert batches.position == Position(1, 0)


def test_a_pass_that_was_broken_off_is_continued(folder):
    batches = stream(folder, batch_size=100)
    seen = ids([next(iter(batches)), next(iter(batches))])

    assert sorted(flat(seen + ids(batches))) == list(range(500))


@pytest.mark.parametrize("order", KINDS)
def test_chosen_rows_are_all_that_comes(folder, order):
    """By mask or by number; the inner part of train for early stopping, for example."""
    fold = open_shards(folder, "train").read("fold")
    by_mask = stream(folder, batch_size=30, order=order, rows=fold != 4)
    by_number = stream(folder, batch_size=30, order=order, rows=np.flatnonzero(fold != 4))
    rows = ids(by_mask)

    assert by_mask.num_rows == 400
    assert sorted(flat(rows)) == np.flatnonzero(fold != 4).tolist()
    assert rows == ids(by_number)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([True, False], "a mask has one entry per row"),
        ([3, 2], "rows must be ascending row numbers of the split, each once"),
        ([3, 3], "must be ascending"),
        ([499, 500], "must be ascending"),
        ([-1], "must be ascending"),
        ([0.5], "is float64; give a mask or row numbers"),
    ],
)
def test_rows_that_do_not_fit_are_refused(folder, rows, message):
    with pytest.raises(ConfigError, match=message):
        stream(folder, batch_size=30, rows=rows)


def test_no_rows_are_no_batches(folder):
    assert list(stream(folder, batch_size=30, rows=[])) == []


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 5, "seed": -1}, "seed is -1; it must be at least 0"),
        ({"batch_size": 5, "rank": 2, "num_ranks": 2}, "rank is 2; it must be from 0 to .* 1"),
        ({"batch_size": 5, "order": "sorted"}, "order is 'sorted'.*exact, window, block"),
    ],
)
def test_settings_out_of_range_are_refused(folder, settings_, message):
    with pytest.raises(ConfigError, match=message):
        BatchStream(folder, **settings_)


def test_a_position_of_another_stream_is_refused(folder):
    state = stream(folder, batch_size=50).state_dict()

    with pytest.raises(ConfigError, match="'global_batch': '50 there, 25 here'"):
        stream(folder, batch_size=25).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"another stream: {'rows': 'all there"):
        stream(folder, batch_size=50, rows=np.arange(60)).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"epoch 0, 11 batches used\) is not in this stream"):
        stream(folder, batch_size=50).set_position(0, 11)
    halved = BatchStream(folder, batch_size=25, num_ranks=2)
    halved.load_state_dict(state)


def test_shards_of_another_contract_are_refused(folder):
    with pytest.raises(IntegrityError, match="the reader was made for"):
        BatchStream(folder, batch_size=5, contract_digest="0" * 64)


def test_a_loader_of_ones_own_takes_whole_batches(folder):
    own = torch.utils.data.DataLoader(stream(folder, batch_size=50), batch_size=None)

    assert len(own) == 10
    assert ids(own) == ids(stream(folder, batch_size=50))


def test_a_loader_without_workers_is_the_stream(folder):
    batches = loader(stream(folder, batch_size=50), num_workers=0)

    assert len(batches) == 10
    assert ids(batches) == ids(stream(folder, batch_size=50))
    assert batches.state_dict()["epoch"] == 1
    with pytest.raises(ConfigError, match="num_workers is -1"):
        loader(stream(folder, batch_size=50), num_workers=-1)


def test_workers_give_the_same_batches_each_epoch_and_after_a_stop(folder):
    """Two epochs with workers that stay, a stop in the third, the rest without workers."""
    plain = stream(folder, batch_size=24)
    expected = [list(plain) for _ in range(3)]
    batches = loader(stream(folder, batch_size=24), num_workers=2)
    try:
        for epoch in range(2):
            assert all(same(a, b) for a, b in zip(batches, expected[epoch], strict=True))
        running = iter(batches)
        seen = [next(running) for _ in range(7)]
        state = batches.state_dict()
        running.close()
        assert all(same(a, b) for a, b in zip(seen, expected[2], strict=False))
        assert (state["epoch"], state["batches"]) == (2, 7)
        rest = list(batches)  # the same workers, from where it stopped
    finally:
        batches.close()
    resumed = stream(folder, batch_size=24)
    resumed.load_state_dict(state)

    assert ids(rest) == ids(expected[2][7:])
    assert ids(resumed) == ids(expected[2][7:])


def test_dead_workers_are_started_again_once_and_then_an_error(folder):
    """One death is told and mended, with the same batches; a second ends with the position."""
    told = []
    batches = loader(stream(folder, batch_size=1), num_workers=1, timeout_s=60, warn=told.append)
    running = iter(batches)
    try:
        seen = [next(running)]
        multiprocessing.active_children()[0].kill()
        seen += [next(running) for _ in range(20)]
        assert ids(seen) == ids(stream(folder, batch_size=1))[:21]
        (text,) = told
        assert "a worker process that reads" in text
        assert "are started again" in text
        multiprocessing.active_children()[0].kill()
        with pytest.raises(ResourceError, match=r"a worker process .* failed.*after \(0, \d+\)"):
            list(running)
    finally:
        batches.close()


def test_a_hung_worker_is_an_error_within_its_time(folder, monkeypatch):
    """A stopped process neither dies nor answers, and it does not hear that it should end."""
    batches = loader(stream(folder, batch_size=100), num_workers=1, timeout_s=100)
    try:
        assert len(list(batches)) == 5
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGSTOP)
        monkeypatch.setattr(batches, "_timeout_s", 2.0)  # starting a process may take longer
        with pytest.raises(ResourceError, match=r"no answer within 2 seconds\) after \(1, 0\)"):
            list(batches)
    finally:
        batches.close()
    assert not multiprocessing.active_children()


def test_what_a_worker_refuses_is_said_as_it_is(folder, tmp_path):
    """Damage found in another process is the same one message, and nothing is started again."""
    damaged = tmp_path / "encode"
    shutil.copytree(folder, damaged)
    path = damaged / "train" / "shard-00000" / "rows.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    batches = loader(stream(damaged, batch_size=50), num_workers=1, warn=pytest.fail)
    try:
        with pytest.raises(IntegrityError, match=r"^\S+rows\.bin is damaged: block 0"):
            list(batches)
    finally:
        batches.close()


def test_an_error_of_the_transfer_is_not_blamed_on_a_worker(folder):
    """A device that is out of memory, say: raised as it is, at once."""

    def transfer(packed):
        next(packed)
        raise RuntimeError("the device is out of memory")
        yield

    batches = loader(stream(folder, batch_size=50), num_workers=1, warn=pytest.fail)
    try:
        with pytest.raises(RuntimeError, match=r"^the device is out of memory"):
            list(batches.through(transfer))
    finally:
        batches.close()


def test_a_death_does_not_strike_the_loop(folder):
    """It is noticed where the next batch is asked for, not in the middle of the loop's work."""
    told = []
    batches = loader(stream(folder, batch_size=1), num_workers=1, warn=told.append)
    running = iter(batches)
    try:
        next(running)
        (child,) = multiprocessing.active_children()
        child.kill()
        child.join()
        time.sleep(0.3)  # a signal would be here by now
        assert not told
        assert len(list(running)) == 499
        assert len(told) == 1
    finally:
        batches.close()


@pytest.mark.parametrize("read_ahead", [1, 3])
def test_a_thread_reads_the_same_batches(folder, read_ahead):
    """Over two epochs, with a stop in the second: what was read ahead does not count."""
    expected = stream(folder, batch_size=24)
    batches = loader(stream(folder, batch_size=24), read_ahead=read_ahead)

    assert all(same(a, b) for a, b in zip(batches, expected, strict=True))
    running = iter(batches)
    seen = ids(next(running) for _ in range(5))
    running.close()
    assert batches.stream.position == Position(1, 5)
    assert seen + ids(batches) == ids(expected)
    assert not [t for t in threading.enumerate() if t.name == "read-ahead"]


def test_an_error_of_the_reading_thread_arrives_at_the_loop(folder, monkeypatch):
    batches = loader(stream(folder, batch_size=24))
    monkeypatch.setattr(batches.stream.source, "gather", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        list(batches)


def test_buffers_are_used_again_only_when_nobody_holds_their_batch(folder):
    """Few buffers for many batches; a view that is kept keeps its batch as it was."""
    batches = stream(folder, batch_size=10)
    seen, kept = set(), []
    for number, batch in enumerate(batches):
        seen.add(batch.numeric.data_ptr())
        if number == 3:
            kept.append((batch.row_id, batch.row_id.clone()))
        del batch
    assert len(seen) < 6
    assert torch.equal(*kept[0])


def test_a_batch_larger_than_the_set_is_refused(folder):
    with pytest.raises(ConfigError, match=r"a batch of 501 rows .* set, which has 500 rows"):
        stream(folder, batch_size=501)
    assert [len(b) for b in stream(folder, batch_size=501, order="sequential")] == [500]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_are_the_rows_one_by_one(folder, num_workers):
    """For a loader that collates by itself."""
    samples = stream(folder, batch_size=50).samples()
    rows = torch.utils.data.DataLoader(
        samples,
        batch_size=20,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )
    batches = list(rows)
    expected = list(stream(folder, batch_size=50))

    assert len(samples) == 500
    assert [len(batch["row_id"]) for batch in batches] == [20] * 25
    for name in ("row_id", "numeric", "codes", "targets"):
        whole = torch.cat([batch[name] for batch in batches])
        assert torch.equal(
            torch.nan_to_num(whole),
            torch.nan_to_num(torch.cat([getattr(batch, name) for batch in expected])),
        )


@pytest.mark.parametrize("left", ["numeric", "category"])
def test_a_set_may_have_numbers_alone_or_categories_alone(tmp_path, left):
    """The other tensor has no column, in a batch with rows and in one without."""
    columns = example_columns(120)
    names = [name for name in columns if ROLES[name] in (left, "target")]
    roles = {name: ROLES[name] for name in names}
    write_table(tmp_path / "reduce", {"train": {n: columns[n] for n in names}}, roles=roles)
    encode(
        tmp_path / "reduce",
        tmp_path / "encode",
        EncodeParams(),
        resources=Resources(),
        recorder=MemoryRecorder(),
    )
    batches = stream(tmp_path / "encode", batch_size=50)
    shapes = {(batch.numeric.shape[1], batch.codes.shape[1]) for batch in batches}
    none = to_tensors(open_shards(tmp_path / "encode", "train").slice(0, 0))

    assert shapes == {(3, 0) if left == "numeric" else (0, 2)}
    assert (none.numeric.shape[1], none.codes.shape[1]) in shapes
