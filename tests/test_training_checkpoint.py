"""Checkpoints: whole or absent, the one before is kept, foreign and damaged ones are named."""

import pytest
import torch

from headrace.record import MemoryRecorder
from headrace.training.checkpoint import Checkpoints

NEWEST, BEFORE = "newest.ckpt", "before.ckpt"


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
