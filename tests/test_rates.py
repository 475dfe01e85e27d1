"""The measuring itself by a clock that the tasks move; the tasks by what they do, not how fast."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
from rich.console import Console

from headrace.commands.bench import bench, print_bench
from headrace.data import rates
from headrace.data.encoder import Encoder
from headrace.data.rates import Task, data_tasks, measure
from headrace.data.shards import open_shards
from headrace.data.table import open_table
from headrace.errors import ConfigError, IntegrityError
from headrace.params import Resources
from headrace.project import Project
from headrace.record import MemoryRecorder
from headrace.stages.encode import EncodeParams, encode
from tests import train_case
from tests.encode_tables import write_table

PARAMS = (
    "version: 1\nresources: {memory_budget: 1GiB, threads: 2}\nmodels: [MODEL]\n"
    "extract: {sources: {a: a.csv}, targets: [late], columns: {late: {role: target}}}\n"
    "train: {MODEL: {}}\n"
)


class Clock:
    """A clock that stands still until a task moves it; half of each second is CPU time."""

    def __init__(self):
        self.now = 0.0

    def task(self, name, *, rows, seconds, log, ceilings=(), warm_rows=1):
        def steps():
            log.append(name)
            while True:
                self.now += seconds
                yield rows

        return Task(name, 8.0, steps, ceilings, warm_rows)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    timers = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: clock.now / 2)
    monkeypatch.setattr(rates, "time", timers)
    return clock


def test_rates_are_rows_by_the_clock_and_shares_are_of_the_named_ceiling(clock):
    log = []
    slow = clock.task("slow", rows=10, seconds=0.25, log=log, ceilings=("fast", "other"))
    fast = clock.task("fast", rows=100, seconds=0.5, log=log)
    other = clock.task("other", rows=10, seconds=1.0, log=log)
    found = {r.name: r for r in measure([slow, fast, other], seconds=3, tell=log.append)}

    assert {name: rate.rows_per_s for name, rate in found.items()} == {
        "slow": 40, "fast": 200, "other": 10,
    }  # fmt: skip
    assert found["slow"].rows_per_cpu_s == 80
    assert found["slow"].bytes_per_s == 320
    assert found["slow"].ceilings == (("fast", 0.2), ("other", 4.0))
    assert found["fast"].ceilings == ()


def test_tasks_take_turns_after_all_are_warm(clock):
    log = []
    tasks = [clock.task(name, rows=1, seconds=0.1, log=log) for name in "ab"]
    measure(tasks, seconds=1, rounds=3, tell=lambda _: None)

    assert "".join(log) == "ab" + "ab" * 3


def test_the_median_round_counts(clock):
    """One disturbed round of five moves nothing."""
    log = []
    durations = itertools.chain([1.0, 1.0, 1.0, 90.0], itertools.repeat(1.0))

    def steps():
        while True:
            clock.now += next(durations)
            yield 7

    quiet = Task("quiet", 1.0, steps)
    assert measure([quiet], seconds=5, tell=log.append)[0].rows_per_s == 7


def test_warming_up_goes_on_until_every_row_was_touched(clock):
    log, seen = [], []

    def steps():
        while True:
            clock.now += 1.0
            seen.append(10)
            yield 10

    measure([Task("t", 1.0, steps, (), warm_rows=95)], seconds=1, rounds=1, tell=log.append)
    assert len(seen) == 10 + 1
    assert log == ["warming up: t", "round 1 of 1"]


def test_warming_up_ends_in_time_and_may_be_other_work(clock):
    log = []
    work = clock.task("work", rows=1, seconds=1.0, log=log)
    other = clock.task("warm", rows=1, seconds=4.0, log=log)
    task = replace(work, warm_rows=100, warm=other.steps)
    measure([task], seconds=1, rounds=1, tell=lambda _: None)

    assert log == ["warm", "work"]
    assert clock.now == 12 + 1  # not the 400 seconds of a hundred rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    (root / "params.yaml").write_text(PARAMS.replace("MODEL", "nn"))
    train_case.make_case(root / "data", num_train=5000, weight=True)
    return Project(root)


def tasks_of(project, *, budget_bytes):
    table = open_table(project.data("reduce"))
    encoder = Encoder.load(project.data("encode"))
    shards = open_shards(project.data("encode"), "train")
    return {
        task.name: task
        for task in data_tasks(table, encoder, shards, threads=2, budget_bytes=budget_bytes)
    }


def rows_of_a_pass(task, least):
    steps = task.steps()
    total = 0
    while total < least:
        total += next(steps)
    steps.close()
    return total


@pytest.mark.parametrize("name", ["decode", "encode what is decoded", "decode and encode"])
def test_parquet_tasks_do_whole_passes_over_the_train_rows(project, name):
    task = tasks_of(project, budget_bytes=1 << 30)[name]
    assert rows_of_a_pass(task, 5000) == 5000
    assert rows_of_a_pass(task, 5001) > 5000


def test_reading_bytes_counts_the_rows_of_the_files(project):
    task = tasks_of(project, budget_bytes=1 << 30)["read Parquet bytes"]
    assert abs(rows_of_a_pass(task, 4999) - 5000) <= 1
    size = sum(path.stat().st_size for path in open_table(project.data("reduce")).files("train"))
    assert task.row_bytes * 5000 == pytest.approx(size)


EPOCHS = ("epoch, exact", "epoch, window", "epoch, block", "epoch, sequential")
COPIES = ("copy rows in a row", "np.take of blocks", "np.take of rows")


@pytest.mark.parametrize("name", [*EPOCHS, *COPIES])
@pytest.mark.parametrize(("budget_bytes", "sample"), [(1 << 30, 5000), (1, 4096)])
def test_epochs_and_copies_take_the_same_sample(project, name, budget_bytes, sample):
    """Of a set beyond an eighth of the budget, its first rows."""
    task = tasks_of(project, budget_bytes=budget_bytes)[name]
    steps = task.steps()
    batches = [next(steps) for _ in range(2)]

    assert task.warm_rows == sample
    assert batches[0] == 4096
    if name != "np.take of blocks":  # whole blocks only
        assert batches[1] == (904 if sample == 5000 else 4096)


def test_every_rate_of_a_project_stands_beside_its_ceiling(project, monkeypatch):
    monkeypatch.chdir(project.root)
    told = []
    found = bench(project, seconds=0.01, tell=told.append)
    by_name = {rate.name: rate for rate in found.rates}
    content = json.loads(json.dumps(found.to_json()))
    console = Console(width=110, record=True, file=None)
    with console.capture() as captured:
        print_bench(found, console)
    text = captured.get()

    assert {rate.name: [name for name, _ in rate.ceilings] for rate in found.rates} == {
        "read Parquet bytes": [],
        "decode": ["read Parquet bytes"],
        "encode what is decoded": ["copy rows in a row"],
        "decode and encode": ["decode"],
        **{name: [] for name in COPIES},
        "epoch, exact": ["np.take of rows"],
        "epoch, window": ["np.take of rows"],
        "epoch, block": ["np.take of blocks"],
        "epoch, sequential": ["copy rows in a row"],
        "matrix products of nn": [],
        "train nn": ["matrix products of nn", "epoch, exact"],
    }
    for rate in found.rates:
        assert min(rate.rows_per_s, rate.rows_per_cpu_s, rate.bytes_per_s) > 0
        for name, share in rate.ceilings:
            assert share == rate.rows_per_s / by_name[name].rows_per_s
            assert f"{share:.1%} of {name}" in text
        assert f"{rate.rows_per_s:,.0f}" in text
    assert [rate["name"] for rate in content["rates"]] == list(by_name)
    assert content["train_rows"] == found.num_rows <= 5000
    assert told[0] == "warming up: read Parquet bytes"


def test_bytes_are_those_of_the_rows_that_lie_on_the_drive(tmp_path, monkeypatch):
    """With float16 a row has fewer of them; what the encoder makes has float32 all the same."""
    (tmp_path / "params.yaml").write_text(PARAMS.replace("MODEL", "nn"))
    roles = train_case.ROLES | {"gate": "numeric", "late": "target"}
    rows = train_case.example_columns(500, targets=(train_case.LATE,))
    reduced, encoded = tmp_path / "data" / "reduce", tmp_path / "data" / "encode"
    splits = dict.fromkeys(("train", "valid", "test"), rows)
    write_table(reduced, splits, roles=roles, targets=(train_case.LATE,))
    encode(
        reduced,
        encoded,
        EncodeParams(numeric="float16"),
        resources=Resources(),
        recorder=MemoryRecorder(),
    )
    monkeypatch.chdir(tmp_path)
    found = bench(Project(tmp_path), seconds=0.01, tell=lambda _: None)
    half = open_shards(encoded, "train").schema.rows.row_bytes
    whole = Encoder.load(encoded).layout.row_bytes

    assert half < whole
    assert {rate.name: rate.row_bytes for rate in found.rates if rate.name != "decode"} == {
        "read Parquet bytes": ANY,
        "encode what is decoded": whole,
        "decode and encode": whole,
        **dict.fromkeys((*COPIES, *EPOCHS, "matrix products of nn", "train nn"), half),
    }


def test_a_project_without_a_network_says_what_is_not_measured(project, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(PARAMS.replace("MODEL", "baseline"))
    (tmp_path / "data").symlink_to(project.root / "data")
    monkeypatch.chdir(tmp_path)
    found = bench(Project(tmp_path), seconds=0.01, tell=lambda _: None)
    console = Console(width=110, file=None)
    with console.capture() as captured:
        print_bench(found, console)

    assert not any("nn" in rate.name for rate in found.rates)
    assert "training is not measured: `models` in params.yaml lists no nn" in captured.get()


def test_what_is_missing_or_wrong_is_one_message(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project.root)
    with pytest.raises(ConfigError, match="--seconds is 0; it must be above 0"):
        bench(project, seconds=0, tell=lambda _: None)
    (tmp_path / "params.yaml").write_text(PARAMS.replace("MODEL", "nn"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError, match="data/reduce does not exist; run `headrace repro`"):
        bench(Project(tmp_path), seconds=1, tell=lambda _: None)
    train_case.make_case(tmp_path / "data", num_train=200, targets=(train_case.LATE,))
    (tmp_path / "data" / "encode").rename(tmp_path / "away")
    with pytest.raises(IntegrityError, match="data/encode does not exist; run `headrace repro`"):
        bench(Project(tmp_path), seconds=1, tell=lambda _: None)
    (tmp_path / "data" / "encode").symlink_to(project.root / "data" / "encode")
    with pytest.raises(IntegrityError, match="was encoded under the contract"):
        bench(Project(tmp_path), seconds=1, tell=lambda _: None)
