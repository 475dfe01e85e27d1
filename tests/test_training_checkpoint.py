"""Checkpoints: whole or absent, the one before is kept, foreign and damaged ones are named."""

import pytest
import torch

from headrace.errors import ConfigError, IntegrityError
from headrace.record import MemoryRecorder
from headrace.training.checkpoint import BEFORE, GIVEN, NEWEST, Checkpoints


def open_at(folder, *, signature="a"):
    recorder = MemoryRecorder()
    return Checkpoints(folder, signature=signature, recorder=recorder), recorder


def saved(folder, *values):
    checkpoints, _ = open_at(folder)
    for value in values:
        checkpoints.save({"weights": torch.full((3,), float(value)), "epoch": value})


def test_nothing_there_is_no_state(tmp_path):
    checkpoints, recorder = open_at(tmp_path / "absent")

    assert checkpoints.load() is None
    assert recorder.warnings == []


def test_the_newest_counts_and_nothing_else_lies_around(tmp_path):
    saved(tmp_path, 1, 2, 3)
    state = open_at(tmp_path)[0].load()

    assert state["epoch"] == 3
    assert state["weights"].tolist() == [3, 3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEFORE, NEWEST]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, damage):
    saved(tmp_path, 1, 2)
    path = tmp_path / NEWEST
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    checkpoints, recorder = open_at(tmp_path)

    assert checkpoints.load()["epoch"] == 1
    assert recorder.warnings == [f"checkpoint {path} is damaged and is not used"]


def test_a_kill_between_the_two_renames_leaves_the_one_before(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / NEWEST).replace(tmp_path / BEFORE)

    assert open_at(tmp_path)[0].load()["epoch"] == 1


def test_one_of_other_parameters_is_named_and_not_used(tmp_path):
    saved(tmp_path, 1)
    checkpoints, recorder = open_at(tmp_path, signature="b")

    assert checkpoints.load() is None
    assert recorder.warnings == [
        f"checkpoint {tmp_path / NEWEST} is not used, and training starts fresh: 'a' → 'b'"
    ]


def test_a_damaged_one_does_not_push_out_the_whole_one_before(tmp_path):
    """Else a kill during the next save would leave nothing."""
    saved(tmp_path, 1, 2)
    (tmp_path / NEWEST).write_bytes(b"damaged")
    checkpoints, _ = open_at(tmp_path)
    checkpoints.load()
    checkpoints.save({"epoch": 3})
    (tmp_path / NEWEST).unlink()

    assert open_at(tmp_path)[0].load()["epoch"] == 1


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / f".new-{NEWEST}.999999999").write_bytes(b"half")
    open_at(tmp_path)[0].load()

    assert [path.name for path in tmp_path.iterdir()] == [NEWEST]


def give(folder, source):
    folder.mkdir(exist_ok=True)
    (folder / GIVEN).write_bytes(source.read_bytes())


def test_a_given_one_goes_before_the_own_until_the_first_save(tmp_path):
    saved(tmp_path / "there", 7)
    saved(tmp_path / "here", 1)
    give(tmp_path / "here", tmp_path / "there" / NEWEST)
    checkpoints, recorder = open_at(tmp_path / "here")

    assert checkpoints.load()["epoch"] == 7
    assert open_at(tmp_path / "here")[0].load()["epoch"] == 7  # killed before it saved
    checkpoints.save({"epoch": 8})
    assert open_at(tmp_path / "here")[0].load()["epoch"] == 8
    assert recorder.warnings == []


def test_a_given_one_is_used_or_refused_never_skipped(tmp_path):
    saved(tmp_path / "there", 7)
    saved(tmp_path / "here", 1)
    path = tmp_path / "there" / NEWEST
    give(tmp_path / "here", path)
    with pytest.raises(ConfigError, match=r"--resume is of another training \('a' → 'b'\)"):
        open_at(tmp_path / "here", signature="b")[0].load()
    assert open_at(tmp_path / "here")[0].load()["epoch"] == 1  # asked for once

    path.write_bytes(path.read_bytes()[:-1])
    give(tmp_path / "here", path)
    with pytest.raises(IntegrityError, match="given with --resume is damaged"):
        open_at(tmp_path / "here")[0].load()
