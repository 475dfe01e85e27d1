"""What binds a step: exact where it is arithmetic, and a stage made slow on purpose is blamed."""

import io
import json
import math
import re
import time
from dataclasses import dataclass, replace

import pytest
import torch
from rich.console import Console
from torch import nn

from headrace.commands.diagnose import diagnose as diagnose_command
from headrace.errors import ConfigError, DataError, IntegrityError
from headrace.project import Project
from headrace.training.ceilings import Disk, cached_share, clock, read_disk
from headrace.training.diagnosis import (
    STAGES,
    Check,
    Costs,
    Diagnosis,
    Line,
    Memory,
    Peak,
    Proposal,
    Setting,
    Stage,
    arithmetic_share,
    batch_sizes,
    binding,
    diagnose,
    fit_line,
    fit_peak,
    proposals,
    split_step,
    with_transfer,
)
from headrace.training.learner import Losses, LossMeans, Validation
from headrace.training.opwatch import OpCounts, watch
from headrace.training.params import TrainingParams
from tests.train_case import make_case

CPU = torch.device("cpu")
CACHED = Disk(cached=1.0, bytes_per_s=1e9, page_s=1e-4)
NOW = Setting(None, 1, 0)
SLOW_S = 0.015  # far above what the rest of a step takes, and what other processes add


@dataclass
class Rows:
    row_id: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor

    def to(self, _):
        return self


class Toy:
    """A learner over rows in memory, each part of which can be slowed down."""

    def __init__(self, network, setting, *, num_inputs=4, num_rows=4096, read_s=0.0, step_s=0.0):
        generator = torch.Generator().manual_seed(7)
        self.network = network
        self.batch_rows = setting.batch_rows or 64
        self.num_rows = num_rows
        self.num_batches = math.ceil(num_rows / self.batch_rows)
        self.x = torch.rand(num_rows, num_inputs, generator=generator)
        self.read_s, self.step_s = read_s, step_s
        self.is_closed = False

    def batches(self, _, *, used):
        for first in range(used * self.batch_rows, self.num_rows, self.batch_rows):
            time.sleep(self.read_s)
            x = self.x[first : first + self.batch_rows].clone()
            yield Rows(torch.arange(first, first + len(x)), x, x[:, 0])

    def weights(self, batch):
        return {"y": torch.tensor(float(len(batch.x)))}

    def losses(self, batch):
        time.sleep(self.step_s)
        z = self.network(batch.x)[:, 0]
        loss = nn.functional.mse_loss(z, batch.y, reduction="none")
        return Losses({"y": loss.sum()}, {"y": torch.tensor(float(len(loss)))}, {"y": 1.0})

    def validate(self):
        return Validation(LossMeans({"y": 1.0}))

    def close(self):
        self.is_closed = True


def examine(make, *, disk=CACHED, check=False, cores=1, seconds=0.02, now=NOW, **options):
    return diagnose(
        make,
        now,
        TrainingParams(device="cpu"),
        device=CPU,
        budget_bytes=8 << 30,
        cores=cores,
        check=check,
        seconds=seconds,
        disk=disk,
        **options,
    )


def small(setting, **slow):
    return Toy(nn.Linear(4, 1), setting, **slow)


def test_a_stream_that_sleeps_is_blamed_on_the_gather():
    found = examine(lambda setting: small(setting, read_s=SLOW_S))
    assert found.binding.name == "host gather"
    assert found.binding.seconds >= SLOW_S


def test_a_fixed_cost_of_every_step_is_launch_overhead_and_a_larger_batch_is_proposed():
    found = examine(lambda setting: small(setting, step_s=SLOW_S))
    assert found.binding.name == "launch overhead"
    assert found.double < 1.3  # twice the rows hardly take longer
    first = found.proposals[0]
    assert first.field == "batch_rows"
    assert first.gain > 1.5


def test_a_large_matrix_product_is_arithmetic():
    wide = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256), nn.Linear(256, 1))

    def make(setting):
        rows = setting.batch_rows or 512
        return Toy(wide, Setting(rows, 1, 0), num_inputs=256)

    found = examine(make)
    assert found.binding.name == "arithmetic"


def test_a_large_table_of_vectors_is_memory_bandwidth():
    """AdamW goes over every vector at every step, whatever the batch."""

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.vectors = nn.Embedding(200_000, 16)

        def forward(self, x):
            return self.vectors((x[:, 0] * 1000).long())

    network = Lookup()
    found = examine(lambda setting: Toy(network, setting))
    assert found.binding.name == "memory bandwidth"
    assert found.memory.state_bytes == 4 * 200_000 * 16 * 4


def test_a_slow_copy_is_blamed_on_the_copy():
    def copy(batch):
        time.sleep(SLOW_S)
        return batch

    assert examine(small, copy=copy).binding.name == "copy to device"


def test_a_copy_that_the_loop_waits_for_is_not_blamed_on_the_gather():
    def copy(batch):
        time.sleep(SLOW_S)
        return batch

    # What the stream takes is the copy: the batches arrive on the device.
    found = examine(lambda s: small(s, read_s=SLOW_S), copy=copy, arrives=True)
    assert found.binding.name == "copy to device"
    assert found.seconds < 2 * SLOW_S


class Travelling(Toy):
    """A learner whose batches travel; ``auto`` would keep the set on the device."""

    def __init__(self, network, setting, *, auto="resident"):
        self.mode = auto if setting.transfer == "auto" else setting.transfer
        super().__init__(network, setting, read_s=SLOW_S if self.mode == "plain" else 0.0)


def travelling(now, auto="resident", **options):
    def copy(batch):
        time.sleep(SLOW_S)
        return batch

    made = []

    def make(setting):
        made.append(Travelling(nn.Linear(4, 1), setting, auto=auto))
        return made[-1]

    setting = Setting(None, 1, 0, now)
    found = examine(
        make, now=setting, copy=copy, arrives=True, travels=lambda toy: toy.mode, **options
    )
    assert all(toy.is_closed for toy in made)
    return found


def test_where_plain_copies_bind_the_way_that_auto_takes_is_proposed_and_keeps_its_word():
    found = travelling("plain", check=True)
    assert found.binding.name == "copy to device"
    assert found.binding.note == "plain"
    first = found.proposals[0]  # before a larger batch, which would change the weights
    assert (first.field, first.setting) == ("transfer", Setting(64, 1, 0, "resident"))
    assert found.check.rate_then > 3 * found.check.rate_now


@pytest.mark.parametrize(("now", "auto"), [("resident", "resident"), ("plain", "plain")])
def test_where_nothing_better_fits_no_other_transfer_is_proposed(now, auto):
    assert all(one.field != "transfer" for one in travelling(now, auto).proposals)


def test_a_slow_drive_is_blamed_unless_the_set_is_in_memory():
    slow = Disk(fits=0.0, bytes_per_s=1e6, page_s=0.01)
    assert examine(small, disk=slow).binding.name == "disk"
    warm = Disk(fits=1.0, cached=0.0, bytes_per_s=1e6, page_s=0.01)
    assert examine(small, disk=warm).binding.name != "disk"


def test_the_stages_are_all_there_and_the_readers_are_closed():
    made = []

    def make(setting):
        made.append(small(setting))
        return made[-1]

    found = examine(make, check=True)
    assert tuple(stage.name for stage in found.stages) == STAGES
    assert all(stage.seconds >= 0 for stage in found.stages)
    assert all(toy.is_closed for toy in made)


def test_the_proposal_is_run_and_compared():
    found = examine(lambda setting: small(setting, step_s=SLOW_S), check=True)
    check = found.check
    assert check is not None
    assert check.proposal == found.proposals[0]
    # Nine tenths of a step are the pause; 25 % is what is asked of a quiet machine.
    assert abs(check.error) < 0.5
    assert check.rate_then > 1.5 * check.rate_now


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="3 rows to learn from are too few"):
        examine(lambda setting: small(setting, num_rows=3))


def test_a_table_smaller_than_a_batch_is_measured():
    found = examine(lambda setting: small(setting, num_rows=9))
    assert found.proposals == () or found.proposals[0].field != "batch_rows"


def test_a_line_is_fitted_exactly_and_never_runs_below_zero():
    assert fit_line({64: 5.0, 128: 9.0, 256: 17.0}) == Line(1.0, 0.0625)
    assert fit_line({64: 2.0, 128: 1.0}).per_row == 0.0
    assert fit_line({100: 1.0, 200: 4.0}).fixed == 0.0
    assert fit_line({50: 2.0}) == Line(0.0, 0.04)


def test_a_peak_is_a_line_or_level_until_the_rows_need_more():
    assert fit_peak({16: 120.0, 32: 140.0, 64: 180.0}).at(128) == pytest.approx(260.0)
    assert fit_peak({16: 500.0, 32: 500.0, 64: 640.0}).at(128) == pytest.approx(1280.0)
    # Where it is level everywhere, more rows are taken to need more, not nothing.
    assert fit_peak({32: 500.0, 64: 500.0}).at(640) == pytest.approx(5000.0)


def test_the_stage_with_most_seconds_binds_and_of_equals_the_first():
    stages = [Stage("disk", 0.2), Stage("host gather", 0.5), Stage("arithmetic", 0.5)]
    assert binding(stages).name == "host gather"
    assert Stage("disk", 0.2, ceiling_s=0.05).reach == pytest.approx(0.25)
    assert Stage("disk", 0.0, ceiling_s=0.0).reach is None


def test_a_step_is_split_into_what_is_fixed_and_what_grows():
    parts = {"least_s": 2.0, "fixed_memory_s": 1.0, "arithmetic_share": 0.75}
    line = Line(6.0, 0.04)
    assert split_step(10.0, line, **parts, least_arithmetic_s=0.0) == (5.0, 3.0, 2.0)
    # Matrix products cannot be quicker than the peak.
    assert split_step(10.0, line, **parts, least_arithmetic_s=3.5) == (5.0, 3.5, 1.5)


def test_a_step_is_split_without_loss():
    """The three parts are the whole, also where the traffic is more than the fixed part."""
    for seconds, line, traffic in [
        (10.0, Line(6.0, 0.04), 1.0),
        (5.0, Line(6.0, 0.0), 9.0),
        (3.0, Line(0.0, 0.03), 0.5),
    ]:
        overhead, arithmetic, memory = split_step(
            seconds,
            line,
            least_s=0.5,
            fixed_memory_s=traffic,
            arithmetic_share=0.25,
            least_arithmetic_s=0.7,
        )
        assert overhead + arithmetic + memory == pytest.approx(seconds)
        assert overhead >= 0.5  # so many operations take that long, whatever the line says
        assert min(arithmetic, memory) >= 0


def test_matrix_products_are_told_by_what_grows_with_the_rows():
    low = OpCounts(arithmetic_s={"mm": 1.0}, other_s={"add": 2.0})
    high = OpCounts(arithmetic_s={"mm": 4.0}, other_s={"add": 3.0})
    assert arithmetic_share(low, high) == pytest.approx(0.75)
    assert arithmetic_share(high, high) == pytest.approx(4 / 7)


NOTHING = Line(0.0, 0.0)
MEMORY = Memory(
    peak_bytes=11_000,
    step=Peak(0.0, Line(1000.0, 100.0)),
    tried_rows=200,
    tried_bytes=20_000,
    row_bytes=50,
    state_bytes=0,
    held_bytes=3_000,
    around_bytes=2_000,
    budget_bytes=26_000,
)


def told(step, wait=NOTHING, workers=0):
    """Return a diagnosis whose loop costs ``step`` and ``wait``, at a batch of 100."""
    costs = Costs(wait, NOTHING, step)
    return Diagnosis(
        Setting(100, 1, workers), "cpu", 10_000, (), costs, 1.0, 1, None, (), MEMORY
    )  # fmt: skip


def test_the_gain_of_a_larger_batch_is_a_plus_b_times_rows():
    found = told(Line(1.0, 0.01))  # 2 s at 100 rows, 3 s at 200, 5 s at 400
    options = [("batch_rows", Setting(rows, 1, 0), found.costs) for rows in (200, 400)]
    first = proposals(options, found)[0]
    assert (first.setting.batch_rows, first.gain) == (400, pytest.approx(400 / 5 / 50))
    # Where four batches bring less than 5 % over two, two are proposed.
    found = told(Line(0.2, 0.01))  # 1.2, 2.2, 4.2 s
    options = [("batch_rows", Setting(rows, 1, 0), found.costs) for rows in (200, 400)]
    assert proposals(options, found)[0].setting.batch_rows == 200


RATES = {"upload_bytes_per_s": 100.0, "host_bytes_per_s": 400.0, "device_bytes_per_s": 2000.0}
PLAIN = Costs(wait=Line(1.0, 0.01), copy=Line(0.0, 0.05), step=Line(2.0, 0.01))


def test_what_travels_beside_the_step_is_waited_for_only_beyond_it():
    def left(row_bytes):
        return with_transfer("prefetch", PLAIN, num_rows=100, row_bytes=row_bytes, **RATES)

    hidden = left(2)  # 200 bytes at 100 a second, beside a step of 3 s
    assert hidden == Costs(Line(1.0, 0.01 + 2 * 2 / 400), Line(0.0, 0.0), PLAIN.step)
    beyond = left(4)  # 4 s: one is left
    assert beyond.copy.at(100) == pytest.approx(1.0)


def test_of_a_resident_set_row_numbers_travel_and_the_device_gathers():
    costs = with_transfer("resident", PLAIN, num_rows=100, row_bytes=5, **RATES)
    assert costs.wait.at(100) == 0.0
    assert costs.copy.at(100) == pytest.approx(100 * (8 / 100 + 2 * 5 / 2000))
    assert costs.step == PLAIN.step


def test_a_transfer_that_gains_nearly_as_much_goes_before_what_changes_the_weights():
    found = replace(told(Line(1.0, 0.01)), costs=Costs(NOTHING, Line(0.0, 0.02), Line(1.0, 0.01)))
    hidden = replace(found.costs, copy=Line(0.0, 0.0157))  # 3.57 s instead of 4
    larger = ("batch_rows", Setting(200, 1, 0), found.costs)  # 200 rows in 7 s: 1.14
    first, _ = proposals([larger, ("transfer", Setting(100, 1, 0, "resident"), hidden)], found)
    assert (first.field, first.gain) == ("transfer", pytest.approx(4 / 3.57))


def test_below_five_per_cent_nothing_is_proposed():
    found = told(Line(0.05, 0.01))
    assert proposals([("batch_rows", Setting(200, 1, 0), found.costs)], found) == ()


def test_what_leaves_the_weights_alone_goes_first_if_it_gains_nearly_as_much():
    found = told(Line(1.0, 0.0), wait=Line(1.0, 0.0))
    hidden = Costs(NOTHING, NOTHING, Line(1.0, 0.0))
    worker = ("workers", Setting(100, 1, 1), hidden)
    for seconds, first in ((0.98, "workers"), (0.8, "threads")):
        faster = Costs(NOTHING, NOTHING, Line(seconds, 0.0))
        options = [("threads", Setting(100, 2, 0), faster), worker]
        assert proposals(options, found)[0].field == first


def test_the_error_of_a_prediction_is_relative_to_the_run():
    check = Check(Proposal("batch_rows", Setting(200, 1, 0), 1.5), rate_now=100.0, rate_then=120.0)
    assert check.predicted == pytest.approx(150.0)
    assert check.error == pytest.approx(0.25)


def test_the_largest_batch_is_what_the_budget_leaves():
    # 26,000 less 2,000 around, 3,000 held and 1,000 of the step: 100 rows of 100 + 2 × 50 bytes.
    assert MEMORY.most_rows == 100
    assert MEMORY.error == pytest.approx(0.05)


def test_sizes_stay_within_the_table():
    assert batch_sizes(256, 10_000) == (64, 128, 256, 512)
    assert batch_sizes(256, 256) == (64, 128, 256)
    assert batch_sizes(4, 4) == (2, 4)


def test_a_watched_step_counts_operations_flops_bytes_and_the_peak():
    x_BN = torch.ones(64, 100)
    weight_NH = torch.ones(100, 50)

    def work():
        h_BH = x_BN @ weight_NH  # 12,800 bytes
        return torch.relu(h_BH)  # as many again, then the first is freed

    counts, result = watch(work)
    assert torch.equal(result, torch.full((64, 50), 100.0))
    assert counts.num_ops == 2
    assert counts.flops == 2 * 64 * 100 * 50
    product = 4 * (64 * 100 + 100 * 50 + 64 * 50)
    assert counts.moved_bytes == product + 4 * 2 * 64 * 50
    assert counts.peak_bytes == 2 * 4 * 64 * 50
    assert set(counts.arithmetic_s) == {"mm"}
    assert set(counts.other_s) == {"relu"}


def test_what_is_freed_and_changed_in_place_is_not_held():
    x = torch.zeros(1000)

    def work():
        for _ in range(5):
            x.add_(1)
            y = x * 2
            del y

    assert watch(work)[0].peak_bytes == 4000


def test_the_peak_of_small_batches_foretells_that_of_a_larger_one():
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))

    def make(setting):
        return Toy(network, Setting(setting.batch_rows or 512, 1, 0), num_inputs=64)

    memory = examine(make).memory
    assert memory.tried_rows == 2048
    assert memory.step.line.per_row > 2 * 4 * 256  # two layers of activations at least
    assert abs(memory.error) < 0.02


def test_the_clock_goes_on_while_a_thread_waits_and_never_back():
    began = clock()
    time.sleep(0.02)
    assert clock() - began >= 0.019
    ticks = [clock() for _ in range(2000)]
    assert ticks == sorted(ticks)


def test_a_file_that_was_just_written_is_in_memory_and_can_be_read_anew(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(256)) * 4096)
    cached = cached_share([path])
    disk = read_disk([path])
    if disk.bytes_per_s is None:
        pytest.skip("this system does not let a file out of the page cache")
    assert cached in (1.0, None)
    assert disk.bytes_per_s > 0
    assert disk.page_s is not None


def test_without_files_nothing_is_claimed_of_the_drive(tmp_path):
    assert read_disk([]) == Disk()
    (tmp_path / "empty").touch()
    assert read_disk([tmp_path / "empty"]) == Disk()


PARAMS = """\
version: 1
models: [nn]
extract: {sources: {a: a.csv}, targets: [late]}
train: {nn: {device: cpu, hidden_sizes: [16], batch_rows: 64}}
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS)
    return Project(tmp_path)


def run_command(project, model="nn", **options):
    told = {"check": False, "steps": False, "json": None, "seconds": 0.02, **options}
    console = Console(record=True, width=120, file=io.StringIO())
    diagnose_command(project, model, **told, console=console)
    return console.export_text()


def test_the_command_says_what_binds_and_writes_the_figures(project):
    make_case(project.root / "data")
    path = project.root / "figures.json"
    text = run_command(project, json=path, check=True, steps=True)
    assert text.startswith("nn on cpu: 480 rows in batches of 64, 1 thread, 0 workers")
    assert all(f"\n{name} " in text for name in STAGES)
    assert "largest batch that fits `resources.memory_budget` of 2.0 GiB" in text
    figures = json.loads(path.read_text())
    assert f"binding: {figures['binding']}, " in text
    assert sum(stage["share"] for stage in figures["stages"]) == pytest.approx(1)
    eager, again = figures["variants"]
    assert (eager["name"], again["name"]) == ("eager", "recomputing")
    assert again["is_equal"] is True
    assert re.search(r"\nrecomputing step: [\d,]+ rows/s, .* at its peak; .* the same bits\n", text)
    assert not (project.root / ".headrace").exists()


def test_a_model_of_another_kind_is_refused(project):
    with pytest.raises(ConfigError, match="'nm' is not a kind of model; nearest name: nn"):
        run_command(project, "nm")
    with pytest.raises(ConfigError, match="catboost does not train from encoded shards"):
        run_command(project, "catboost")


def test_before_encode_the_way_to_the_shards_is_named(project):
    with pytest.raises(IntegrityError, match=r"data/encode does not exist; run `headrace repro`"):
        run_command(project)
