"""Kills at random moments: the run resumes to the same weights from the same order of rows."""

import os

import pytest

from tests.resume_case import INTERVAL, drill

KILLS = int(os.environ.get("HEADRACE_DRILL_KILLS", "10"))
SEED = int(os.environ.get("HEADRACE_DRILL_SEED", "0"))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    """Half of the kills strike while a checkpoint is written."""
    found = drill(tmp_path, kills=KILLS, seed=SEED, kinds=("kill", "save"))

    assert found.killed("kill", "save") == KILLS
    assert found.has_same_order
    assert found.is_bit_equal
    assert max(found.lost("kill", "save")) <= INTERVAL
    names = sorted(path.name for path in (tmp_path / "hunted" / "checkpoints").iterdir())
    assert names == ["before.ckpt", "newest.ckpt"]


@pytest.mark.slow
def test_a_run_stopped_by_signals_loses_not_one_batch(tmp_path):
    stops = max(4, KILLS // 3)
    found = drill(tmp_path, kills=stops, seed=SEED, kinds=("term",))

    assert found.lost("term") == [0] * stops
    assert any(len(life) % INTERVAL for life in found.lives[:-1])  # not all where one was due
    assert found.has_same_order
    assert found.is_bit_equal
