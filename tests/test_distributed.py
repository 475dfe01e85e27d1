"""Two ranks train what one process trains; one that fails ends both, with its name."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.commands.failure import read_failure
from headrace.commands.stage import run_stage
from headrace.data.order import Cut
from headrace.data.stream import BatchStream
from headrace.errors import ConfigError, DataError, IntegrityError, ResourceError
from headrace.project import Project
from headrace.training.distributed import ALONE, Launch, Ranks, read_launch
from tests.halting import Halt, HaltingRecorder
from tests.rank_case import (
    HALT_AFTER,
    SCENARIOS,
    norm_case,
    norm_result,
    train,
)
from tests.train_case import make_case

ROOT = Path(__file__).parents[1]
LAUNCHED = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


# ---- who am I ------------------------------------------------------------------------------------


def test_torchruns_variables_are_read():
    assert read_launch({}) is None
    assert read_launch({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert read_launch(LAUNCHED) == Launch(3, 4, 1, 2, has_agent=False)
    assert read_launch(LAUNCHED | {"TORCHELASTIC_RUN_ID": "none"}).has_agent


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RANK": ""}, r"WORLD_SIZE is '4', but RANK is not set; start with `torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "4"}, "RANK 4 of WORLD_SIZE 4.* make no sense"),
        ({"LOCAL_RANK": "two"}, "^LOCAL_RANK is 'two', which is no whole number"),
        ({"WORLD_SIZE": "x", "RANK": ""}, "^WORLD_SIZE is 'x', which is no number of processes"),
        ({"WORLD_SIZE": ""}, "^WORLD_SIZE is '', which is no number of processes"),
    ],
)
def test_half_a_launch_is_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        read_launch(LAUNCHED | change)


def test_a_global_batch_that_does_not_divide_is_refused_with_both_numbers():
    assert Ranks(1, 4).share_of(256) == 64
    with pytest.raises(ConfigError, match=r"is 256, which 3 ranks .* such as 255 or 258"):
        Ranks(0, 3).share_of(256)
    with pytest.raises(ConfigError, match=r"is 2, which 3 ranks .* such as 3,"):
        Ranks(0, 3).share_of(2)


def test_a_process_alone_changes_nothing():
    values = torch.tensor([1.0, 2.0])

    assert ALONE.is_first
    assert ALONE.summed(values) is values
    assert ALONE.gathered("x") == ["x"]
    assert ALONE.from_first(lambda: 7) == 7


def test_a_stage_that_ranks_cannot_share_is_refused(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(
        "version: 1\nmodels: [baseline]\ntrain: {baseline: {}}\n"
        "extract: {sources: {a: a.csv}, targets: [y]}\n"
    )
    monkeypatch.setattr("headrace.commands.stage.die_with_parent", lambda: None)
    for name, value in (LAUNCHED | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    for stage in ("train@baseline", "extract"):
        told = f"stage {stage} was started by torchrun as 4 processes, which only train@nn, "
        with pytest.raises(ConfigError, match=told):
            run_stage(Project(tmp_path), stage)

        assert told in read_failure(Project(tmp_path), stage).message


# ---- who reads what ------------------------------------------------------------------------------


@given(
    num_rows=st.integers(0, 900),
    share=st.integers(1, 20),
    num_ranks=st.integers(1, 8),
)
def test_the_global_batches_are_the_same_for_any_number_of_ranks(num_rows, share, num_ranks):
    """Each batch's slices, one after the other, are the batch of one process; steps are equal."""
    one = Cut(num_rows, share * num_ranks, 1, least_tail=2)
    cut = Cut(num_rows, share, num_ranks, least_tail=2)

    assert cut.num_batches == one.num_batches
    for batch in range(one.num_batches):
        slices = [cut.bounds(batch, rank) for rank in range(num_ranks)]
        places = list(chain.from_iterable(range(first, end) for first, end in slices))
        sizes = [end - first for first, end in slices]

        assert places == list(range(*one.bounds(batch)))
        assert max(sizes) - min(sizes) <= 1


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    make_case(folder / "case", weight=True)
    return folder


@settings(max_examples=20, deadline=None)
@given(
    order=st.sampled_from(["exact", "window", "block", "sequential"]),
    num_ranks=st.sampled_from([2, 3, 4, 6]),
    used=st.integers(0, 9),
    data=st.data(),
)
def test_ranks_share_every_batch_also_after_a_resume(case, order, num_ranks, used, data):
    """Together the ranks read the batches of one process, from any position, nothing twice."""
    num_train = BatchStream(case / "case/encode", batch_size=1).num_rows
    keep = data.draw(st.integers(60, num_train))
    rows = np.arange(num_train) < keep
    options = {"order": order, "seed": 5, "rows": rows, "least_tail": 2}
    one = BatchStream(case / "case/encode", batch_size=60, **options)
    one.set_position(1, min(used, len(one)))
    state = one.state_dict()
    streams = [
        BatchStream(
            case / "case/encode",
            batch_size=60 // num_ranks,
            rank=rank,
            num_ranks=num_ranks,
            **options,
        )
        for rank in range(num_ranks)
    ]
    for stream in streams:
        stream.load_state_dict(state)
    whole = [batch.row_id.tolist() for batch in one] if len(one) else []
    parts = [[batch.row_id.tolist() for batch in stream] for stream in streams]

    assert [len(part) for part in parts] == [len(whole)] * num_ranks
    assert [list(chain.from_iterable(slices)) for slices in zip(*parts, strict=True)] == whole
    assert len(set(chain.from_iterable(whole))) == len(list(chain.from_iterable(whole)))


def test_a_position_of_another_cut_is_refused(case):
    """Three rows more than a whole batch: one rank gives them a batch, two would not."""
    rows = np.arange(600) < 63
    one = BatchStream(case / "case/encode", batch_size=60, rows=rows)
    two = BatchStream(case / "case/encode", batch_size=30, rows=rows, num_ranks=2)

    with pytest.raises(ConfigError, match=r"epoch_batches': '2 there, 1 here"):
        two.load_state_dict(one.state_dict())


# ---- two processes, started once -----------------------------------------------------------------


def _free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@pytest.fixture(scope="module")
def seen(case):
    """What two ranks saw in each scenario of rank_case, as {name: (rank 0, rank 1)}."""
    with pytest.raises(Halt):  # what one process leaves, for two to go on
        train(case / "case", case / "from-one", recorder=HaltingRecorder(HALT_AFTER))
    ports = _free_ports(len(SCENARIOS))
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "GLOO_SOCKET_IFNAME": _loopback()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rank_case", str(case), *ports],
            cwd=ROOT,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL], said
    found: dict[str, list[Any]] = {}
    for scenario in SCENARIOS:
        name = scenario.__name__.strip("_")
        paths = [case / f"{name}-{rank}.pt" for rank in range(2)]
        found[name] = [torch.load(p, weights_only=True) if p.is_file() else None for p in paths]
    return found


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next(name for name in ("lo", "lo0") if name in names)


@pytest.fixture(scope="module")
def alone(case):
    """The same training by one process."""
    return train(case / "case", case / "one")


def _are_close(found, expected, *, rtol=1e-4, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=name)


def _curve(found, wanted):
    return [value for name, value, _ in found["metrics"] if name == wanted]


@pytest.mark.parametrize("split", ["uneven", "empty"])
def test_gradients_and_norms_are_those_of_one_process(seen, split):
    """Also with 4 rows on one rank and 7 on the other, or all rows on one; to the last bits."""
    network, x = norm_case()
    expected = norm_result(network, x, num_rows=len(x))
    for found in seen["norm"]:
        for part in ("gradients", "state"):
            assert found[split][part].keys() == expected[part].keys()
            for name, value in expected[part].items():
                if value is None:
                    assert found[split][part][name] is None, name
                else:
                    torch.testing.assert_close(
                        found[split][part][name], value, rtol=1e-9, atol=1e-12
                    )
    outputs = torch.cat([found[split]["outputs"] for found in seen["norm"]])
    torch.testing.assert_close(outputs, expected["outputs"], rtol=1e-9, atol=1e-12)


def test_two_ranks_learn_what_one_process_learns(seen, alone):
    """Weights, the curve that stops training, and its mean losses; weights in missing labels."""
    first, second = seen["train"]
    _are_close(first["weights"], alone["weights"])
    assert all(torch.equal(first["weights"][k], v) for k, v in second["weights"].items())
    curves = [one for one in first["metrics"] if not one[0].startswith("health/")]
    assert curves == second["metrics"]  # health is checked by the first rank alone
    assert [(name, step) for name, _, step in first["metrics"]] == [
        (name, step) for name, _, step in alone["metrics"]
    ]
    assert [value for _, value, _ in first["metrics"]] == pytest.approx(
        [value for _, value, _ in alone["metrics"]], rel=1e-5
    )
    assert first["summary"]["best_epoch"] == alone["summary"]["best_epoch"]
    assert first["params"] == alone["params"] | {"ranks": 2}


def test_two_ranks_learn_the_same_in_parts_also_where_one_has_less_memory(seen, alone):
    first, second = seen["parts"]
    _are_close(first["weights"], alone["weights"])
    assert all(torch.equal(first["weights"][k], v) for k, v in second["weights"].items())
    assert first["warnings"] == []
    assert [text[:62] for text in second["warnings"]] == [
        "the device ran out of memory in epoch 1, batch 1 with 11 rows "
    ]


def test_two_ranks_with_batch_norm_learn_what_one_process_learns(seen, case):
    """But for the bias before a norm: its gradient is rounding alone, which Adam enlarges.

    It does nothing in training; held-back losses feel it, for the running mean lags behind it.
    """
    expected = train(case / "case", case / "one-normed", batch_norm=True)
    no_effect = ("trunk.0.bias", "trunk.1.running_mean")
    first, second = (found["weights"] for found in seen["normed"])
    assert all(torch.equal(first[name], value) for name, value in second.items())
    _are_close(
        {name: value for name, value in first.items() if name not in no_effect},
        {name: value for name, value in expected["weights"].items() if name not in no_effect},
    )
    learnt = [_curve(metrics, "train_loss") for metrics in (seen["normed"][0], expected)]
    assert learnt[0] == pytest.approx(learnt[1], rel=1e-5)


def test_with_dropout_a_resumed_pair_of_ranks_ends_with_the_very_same_bits(seen, alone):
    """Masks are a function of seed, rank and step, so no rank's generator needs to be kept."""
    for found in seen["dropout"]:
        assert "Resumed in epoch 2" in found["resumed"]["notes"][0]
        for name, value in found["whole"]["weights"].items():
            assert torch.equal(found["resumed"]["weights"][name], value), name
    first = seen["dropout"][0]["whole"]["weights"]
    assert not torch.equal(first["trunk.0.weight"], alone["weights"]["trunk.0.weight"])


def test_every_rank_and_step_has_random_numbers_of_its_own(seen):
    first, second = (found["draws"] for found in seen["draws"])

    assert len(set(first + second)) == len(first) + len(second) == 12


def test_one_process_goes_on_from_the_checkpoint_of_two(seen, case, alone):
    assert seen["half"] != [None, None]
    resumed = train(case / "case", case / "from-two")

    _are_close(resumed["weights"], alone["weights"])
    assert "Resumed in epoch 2 after" in resumed["notes"][0]
    assert "written by 2 ranks and goes on with 1" in resumed["notes"][1]


def test_two_ranks_go_on_from_the_checkpoint_of_one_process(seen, alone):
    for found in seen["go_on"]:
        _are_close(found["weights"], alone["weights"])
        assert "written by 1 ranks and goes on with 2" in found["notes"][1]


def test_a_batch_that_does_not_divide_stops_all(seen):
    for found in seen["uneven"]:
        assert "is 63, which 2 ranks cannot divide evenly" in found["error"]
        assert found["exit_code"] == ConfigError.exit_code


def test_a_loss_that_is_not_finite_names_the_same_rows_on_all_ranks(seen):
    first, second = seen["diverge"]

    assert first["error"] == second["error"]
    assert re.search(r"training loss is .*first row ids: \['\d+'", first["error"])


def test_ranks_with_other_data_are_refused(seen):
    for found in seen["differ"]:
        assert "the data on rank 1 is not that of rank 0" in found["error"]
        assert found["exit_code"] == IntegrityError.exit_code


@pytest.mark.parametrize(("scenario", "row"), [("fail", 7), ("stop", 8)])
def test_a_rank_that_fails_ends_the_other_with_its_message(seen, scenario, row):
    """Whether the other one finds the connection closed or is stopped by torchrun."""
    first, second = seen[scenario]

    assert second["error"] == f"row {row} is bad"
    assert first["error"] == f"rank 1 of 2 failed: row {row} is bad"
    assert first["exit_code"] == second["exit_code"] == DataError.exit_code
    assert first["seconds"] < 10


def test_a_rank_that_hangs_is_named_after_the_time_out(seen):
    first, _ = seen["hang"]

    assert re.match("rank 1 of 2 did not answer within 1 s: it hangs", first["error"])
    assert "gloo" not in first["error"]
    assert first["exit_code"] == ResourceError.exit_code


def test_a_rank_that_is_killed_is_named(seen):
    first, second = seen["die"]

    assert second is None
    assert first["error"].startswith("rank 1 of 2 ended without a word: killed")
    assert first["exit_code"] == ResourceError.exit_code
