"""The network: masks, weights, unseen codes, resume, and the very same bytes twice."""

import math
import multiprocessing
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from scipy.special import ndtri

from headrace.errors import ConfigError, DataError, DependencyError, IntegrityError, SchemaError
from headrace.evaluation.metrics import Sample, score
from headrace.models import network as network_module
from headrace.models.mlp import (
    Mlp,
    MlpDesign,
    NormalCurves,
    capped_quantiles,
    embedding_sizes,
    normal_curve,
)
from headrace.models.network import (
    Inputs,
    InputSample,
    TargetScale,
    mean_losses,
    member_losses,
)
from headrace.models.nn import NnParams, fit, load
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.storage import digest_bytes
from headrace.training import loop as loop_module
from headrace.training.device import RandomStream
from headrace.training.learner import EPOCH_METRICS
from headrace.training.update import Updater
from tests.encode_tables import changed
from tests.halting import Halt, HaltingRecorder
from tests.train_case import (
    CLASS,
    DELAY,
    LATE,
    RESOURCES,
    encoded_rows,
    example_columns,
    make_case,
    make_far_case,
    table_rows,
    tree_bytes,
)

QUICK = {
    "device": "cpu",
    "hidden_sizes": [16],
    "batch_rows": 64,
    "max_epochs": 3,
    "warmup_steps": 0,
    "learning_rate": 0.01,
    "members": 1,
}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"), weight=True)


def fitted(views, folder, *, recorder=None, resources=RESOURCES, **params):
    recorder = recorder or MemoryRecorder()
    model = fit(
        views,
        NnParams.model_validate({**QUICK, **params}),
        checkpoints=folder / "checkpoints",
        resources=resources,
        recorder=recorder,
    )
    return model, recorder


def saved(model, folder):
    folder.mkdir()
    model.save(folder)
    return tree_bytes(folder)


def test_all_three_tasks_are_learnt_by_one_network(views, tmp_path):
    model, recorder = fitted(views, tmp_path, max_epochs=40, patience=40)
    rows = encoded_rows(views, "test")
    values = model.predict(rows)
    delay, late, group = rows.targets.T.astype(np.float64)
    known = ~np.isnan(delay)
    error = np.sqrt(np.mean((values["delay"][known] - delay[known]) ** 2))
    known_late = ~np.isnan(late)

    assert error < 0.5 * np.nanstd(delay)
    assert np.mean((values["late"] > 0.5)[known_late] == (late > 0.5)[known_late]) > 0.85
    assert np.mean(values["class"].argmax(axis=1) == group) > 0.75
    assert np.allclose(values["class"].sum(axis=1), 1, atol=1e-12)
    assert {"inner_loss_delay", "inner_loss_late", "inner_loss_class", "train_loss"} <= {
        name for name, _, _ in recorder.recorded_metrics
    }
    assert (
        recorder.recorded_params["rows_learnt_from"]
        == np.isin(encoded_rows(views, "train").fold, (0, 1, 2, 3)).sum()
    )


def test_two_fits_have_the_same_bytes_and_leave_the_global_generator(views, tmp_path):
    before = torch.get_rng_state()
    first = saved(fitted(views, tmp_path / "1")[0], tmp_path / "a")
    second = saved(fitted(views, tmp_path / "2")[0], tmp_path / "b")
    other = saved(fitted(views, tmp_path / "3", seed=1)[0], tmp_path / "c")

    assert first == second
    assert first["weights.safetensors"] != other["weights.safetensors"]
    assert sorted(first) == ["network.json", "weights.safetensors"]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_network_predicts_the_same(views, tmp_path):
    model, _ = fitted(views, tmp_path, batch_norm=True)
    saved(model, tmp_path / "model")
    back = load(tmp_path / "model", {"summary": {"best_epoch": 1}})
    rows = encoded_rows(views, "test")
    for name, values in model.predict(rows).items():
        assert np.array_equal(values, back.predict(rows)[name])
    assert back.summary == {"best_epoch": 1}


def test_the_predictions_of_a_row_do_not_depend_on_its_neighbours(views, tmp_path):
    model, _ = fitted(views, tmp_path, batch_norm=True)
    rows = encoded_rows(views, "test")
    whole = model.predict(rows)
    for row in (0, 77):
        alone = model.predict(rows.where(np.array([row])))
        for name, values in whole.items():
            assert alone[name] == pytest.approx(values[[row]], rel=1e-6, abs=1e-6)


def test_averaged_predictions_are_those_of_the_draws_and_of_the_row_alone(views, tmp_path):
    settings = {"input_noise": 0.3, "column_mask": 0.1}
    plain, _ = fitted(views, tmp_path / "plain", **settings)
    model, _ = fitted(views, tmp_path / "averaged", predict_draws=5, **settings)
    rows = encoded_rows(views, "test")
    values = model.predict(rows)
    alone = model.predict(rows.where(np.arange(7, 8)))
    assert (
        saved(model, tmp_path / "model")["weights.safetensors"]
        == saved(plain, tmp_path / "other")["weights.safetensors"]
    )  # learning is the same
    read = load(tmp_path / "model", {}).predict(rows)

    for name, value in plain.predict(rows).items():
        assert not np.allclose(values[name], value), name
        assert np.corrcoef(values[name].ravel(), value.ravel())[0, 1] > 0.8
        np.testing.assert_allclose(alone[name][0], values[name][7], rtol=1e-5)
        np.testing.assert_allclose(read[name], values[name], rtol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"mixup": 0.4, "micro_rows": 20}, {"input_noise": 0.2}, {"column_mask": 0.2}],
    ids=["mixup in parts", "noise", "mask"],
)
def test_rows_changed_while_learning_still_teach(views, tmp_path, settings):
    model, _ = fitted(views, tmp_path, max_epochs=25, patience=25, **settings)
    rows = encoded_rows(views, "test")
    delay = rows.targets[:, 0].astype(np.float64)
    known = ~np.isnan(delay)
    error = (model.predict(rows)["delay"][known] - delay[known]) ** 2

    assert np.mean(error) < 0.5 * np.var(delay[known])


def test_a_fit_begins_from_the_weights_of_a_saved_model(views, tmp_path):
    earlier, _ = fitted(views, tmp_path / "earlier", max_epochs=10)
    saved(earlier, tmp_path / "model")
    path = tmp_path / "model" / "weights.safetensors"
    warm_start = {"path": str(path), "digest": digest_bytes(path.read_bytes())}
    model, _ = fitted(
        views, tmp_path / "warm", max_epochs=1, learning_rate=1e-9, warm_start=warm_start
    )
    rows = encoded_rows(views, "test")
    expected = earlier.predict(rows)["delay"]

    np.testing.assert_allclose(model.predict(rows)["delay"], expected, atol=1e-3)


def test_every_fit_begins_with_a_fresh_network(views, tmp_path, monkeypatch):
    """Parameters, buffers and optimiser as a new one of that seed has them."""
    begins = []

    class Spied(Updater):
        def __init__(self, learner, *args, **settings):
            super().__init__(learner, *args, **settings)
            weights = {name: value.clone() for name, value in learner.network.state_dict().items()}
            begins.append((weights, self.state()))

    monkeypatch.setattr(loop_module, "Updater", Spied)
    other_rows = replace(views, folds=(0, 1, 2, 4))
    for name, these in (("a", views), ("b", other_rows), ("c", views)):
        fitted(these, tmp_path / name, batch_norm=True, max_epochs=2)

    (first, state), _, (again, state_again) = begins  # of other rows in between
    assert any("running_mean" in name for name in first)
    assert state["optimiser"]["state"] == {}
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert state_again == state


def test_no_rows_give_no_predictions(views, tmp_path):
    values = fitted(views, tmp_path)[0].predict(encoded_rows(views, "test").where(np.arange(0)))

    assert {name: v.shape for name, v in values.items()} == {
        "delay": (0,), "late": (0,), "class": (0, 3),
    }  # fmt: skip


def test_missing_numbers_and_unknown_codes_are_predicted_and_bounded(views, tmp_path):
    model, _ = fitted(views, tmp_path)
    rows = encoded_rows(views, "test")
    unknown = changed(
        rows,
        numeric=np.full_like(rows.numeric, np.nan),
        codes=np.zeros_like(rows.codes),
    )
    extreme = changed(rows, numeric=np.full_like(rows.numeric, 1e30))

    assert all(np.isfinite(values).all() for values in model.predict(unknown).values())
    assert np.abs(model.predict(extreme)["delay"]).max() < 1e4


@pytest.mark.parametrize("halt_after", [1, 5, 8, 9, 17])
def test_a_halted_fit_resumes_to_the_very_same_bytes(views, tmp_path, halt_after):
    params = {"dropout": 0.3, "checkpoint_minutes": 0.0, "seed": 4}
    whole = saved(fitted(views, tmp_path / "whole", **params)[0], tmp_path / "a")
    with pytest.raises(Halt):
        fitted(views, tmp_path / "halted", recorder=HaltingRecorder(halt_after), **params)
    model, recorder = fitted(views, tmp_path / "halted", **params)

    assert saved(model, tmp_path / "b") == whole
    assert any(note.startswith("Resumed in epoch") for note in recorder.notes)


def test_how_batches_travel_does_not_change_a_byte(views, tmp_path):
    """Not in one run, nor in one that goes on from a checkpoint of the other mode."""
    params = {"dropout": 0.3, "checkpoint_minutes": 0.0, "seed": 4}
    whole = saved(fitted(views, tmp_path / "whole", **params)[0], tmp_path / "a")
    with pytest.raises(Halt):
        fitted(views, tmp_path / "halted", recorder=HaltingRecorder(5), **params)
    model, recorder = fitted(views, tmp_path / "halted", **params, transfer="resident")

    assert saved(model, tmp_path / "b") == whole
    assert any(note.startswith("Resumed in epoch") for note in recorder.notes)
    assert recorder.recorded_params["transfer"] == "resident"


def test_prefetching_to_a_cpu_is_refused(views, tmp_path):
    with pytest.raises(ConfigError, match="transfer is 'prefetch', but the device is cpu"):
        fitted(views, tmp_path, transfer="prefetch")


def test_a_checkpoint_of_other_parameters_is_not_used(views, tmp_path):
    fitted(views, tmp_path, seed=1)
    model, recorder = fitted(views, tmp_path, seed=2)
    fresh, _ = fitted(views, tmp_path / "fresh", seed=2)

    assert recorder.warnings[0].endswith(
        "is not used, and training starts fresh: training.seed 1 → 2"
    )
    assert saved(model, tmp_path / "a") == saved(fresh, tmp_path / "b")


def test_labels_of_other_splits_change_nothing(tmp_path):
    """Early stopping and the best weights look at train rows only."""
    files = []
    for name, seed in (("a", 1), ("b", 50)):
        other = example_columns(150, seed=seed)
        change = {"valid": {t: other[t] for t in ("delay", "late", "class")}}
        views = make_case(tmp_path / name, change=change)
        files.append(saved(fitted(views, tmp_path / name)[0], tmp_path / name / "model"))

    assert files[0] == files[1]


def test_a_missing_label_is_masked_in_its_head_alone(tmp_path):
    """A network of two heads learns the one target as if the other's labels were of no effect."""
    num_rows = 300
    columns = example_columns(num_rows, targets=(DELAY, LATE))
    few = pa.array([v if i < 20 else None for i, v in enumerate(columns["late"].to_pylist())])
    views = make_case(
        tmp_path, num_train=num_rows, targets=(DELAY, LATE), change={"train": {"late": few}}
    )
    model, _ = fitted(views, tmp_path, max_epochs=30, patience=30)
    rows = encoded_rows(views, "test")
    known = ~np.isnan(rows.targets[:, 0])
    y, found = rows.targets[known, 0], model.predict(rows)["delay"][known]

    assert np.sqrt(np.mean((found - y) ** 2)) < 0.6 * np.std(y)


def test_a_target_far_from_zero_is_learnt_as_well(tmp_path):
    """Seconds since 1970: in float32 all of them are one number."""
    near, far = make_far_case(tmp_path / "a", 0.0), make_far_case(tmp_path / "b", 1.7e9)
    expected = fitted(near, tmp_path / "near")[0].predict(encoded_rows(near, "test"))["delay"]
    found = fitted(far, tmp_path / "far")[0].predict(encoded_rows(far, "test"))["delay"]

    assert np.std(expected) > 5
    assert found - 1.7e9 == pytest.approx(expected, abs=0.05)


def test_a_row_of_weight_zero_teaches_nothing(tmp_path):
    """Spoiling the labels of rows with weight 0 changes no byte of the model."""
    files = []
    for name, spoilt in (("a", 0.0), ("b", 1e4)):
        columns = example_columns(600, weight=True, targets=(DELAY,))
        weight = np.where(np.arange(600) % 3 == 0, 0.0, 1.0)
        delay = columns["delay"].to_numpy(zero_copy_only=False).copy()
        delay[weight == 0] = delay[weight == 0] + spoilt
        change = {"importance": pa.array(weight), "delay": pa.array(delay, from_pandas=True)}
        views = make_case(tmp_path / name, targets=(DELAY,), weight=True, change={"train": change})
        files.append(saved(fitted(views, tmp_path / name)[0], tmp_path / name / "model"))

    assert files[0]["weights.safetensors"] == files[1]["weights.safetensors"]


def test_target_weights_and_stop_on_have_an_effect(views, tmp_path):
    plain = saved(fitted(views, tmp_path / "1")[0], tmp_path / "a")
    heavy = saved(fitted(views, tmp_path / "2", target_weights={"late": 9.0})[0], tmp_path / "b")
    model, recorder = fitted(views, tmp_path / "3", stop_on="late")
    curve = [value for name, value, _ in recorder.recorded_metrics if name == "inner_loss_late"]

    assert plain["weights.safetensors"] != heavy["weights.safetensors"]
    assert model.summary["inner_loss"] == min(curve)
    kept = {one["title"]: one for one in model.summary["curves"]}["loss of late"]
    assert kept["held_back"] == pytest.approx(curve, rel=1e-5)
    assert kept["kept"] == kept["at"][int(np.argmin(curve))] == model.summary["best_epoch"]


def test_metrics_of_an_epoch_are_those_that_evaluate_finds(views, tmp_path):
    """On the rows held back, by the weights that were kept; early stopping can look at them."""
    model, recorder = fitted(views, tmp_path, max_epochs=6, stop_on="roc_auc_late")
    rows = encoded_rows(views, "train")
    rows = rows.where(np.flatnonzero(rows.fold == 4))
    values = model.predict(rows)
    best = model.summary["best_epoch"]
    recorded = {name: value for name, value, step in recorder.recorded_metrics if step == best}
    for place, target in enumerate(views.contract.targets):
        truth = rows.targets[:, place].astype(np.float64)
        known = ~np.isnan(truth)
        weight = rows.weight[known].astype(np.float64)
        sample = Sample(target.task, truth[known], values[target.name][known], weight)
        for name in EPOCH_METRICS[target.task]:
            expected = pytest.approx(score(name, sample), abs=1e-6)
            assert recorded[f"inner_{name}_{target.name}"] == expected

    curve = [value for name, value, _ in recorder.recorded_metrics if name == "inner_roc_auc_late"]
    assert model.summary["inner_roc_auc_late"] == max(curve)


def test_health_checks_change_no_byte_and_can_be_off(views, tmp_path):
    files, told = [], []
    for health in ("warn", "error", "off"):
        model, recorder = fitted(views, tmp_path / health, health=health, dropout=0.2)
        files.append(saved(model, tmp_path / f"model-{health}"))
        told.append({name for name, *_ in recorder.recorded_metrics if name.startswith("health/")})

    assert files[0] == files[1] == files[2]
    assert told[0] == told[1] > {"health/first_loss_class", "health/gap"}
    assert told[2] == set()


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"stop_on": "lat"}, "`train.nn.stop_on` is 'lat'.*nearest name: late"),
        ({"stop_on": "rmse_late"}, "one of the metrics .*nearest name: rmse_delay"),
        ({"target_weights": {"dela": 1.0}}, "target_weights` names 'dela'.*nearest name: delay"),
    ],
)
def test_settings_that_name_no_target_are_refused(views, tmp_path, params, told):
    with pytest.raises(ConfigError, match=told):
        fitted(views, tmp_path, **params)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(views, tmp_path):
    with pytest.raises(DependencyError, match=r"`train\.nn\.device` is 'cuda'"):
        fitted(views, tmp_path, device="cuda")


@pytest.mark.parametrize("name", ["encoder.json", "encoder.safetensors", "contract.json"])
def test_a_damaged_encoder_is_refused(views, tmp_path, name):
    shutil.copytree(views.encoded, tmp_path / "encode")
    path = tmp_path / "encode" / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))

    with pytest.raises(IntegrityError, match=f"is damaged: .*{name}"):
        fitted(replace(views, encoded=tmp_path / "encode"), tmp_path)


def test_diverging_training_names_rows(views, tmp_path):
    with pytest.raises(DataError, match=r"training loss is .*first row ids: \["):
        fitted(views, tmp_path, learning_rate=1e30, max_epochs=9)


def test_rows_that_are_not_of_its_encoder_are_refused(views, tmp_path):
    model, _ = fitted(views, tmp_path)
    rows = encoded_rows(views, "test")
    with pytest.raises(SchemaError, match="reads encoded rows"):
        model.predict(table_rows(views, "test"))
    with pytest.raises(SchemaError, match="trained on 2 and 2"):
        model.predict(changed(rows, numeric=rows.numeric[:, :1]))
    with pytest.raises(SchemaError, match="codes that the network has not"):
        model.predict(changed(rows, codes=rows.codes + 100))


@pytest.mark.parametrize("damage", ["weights.safetensors", "network.json"])
def test_half_a_network_is_refused(views, tmp_path, damage):
    saved(fitted(views, tmp_path)[0], tmp_path / "model")
    (tmp_path / "model" / damage).write_text("{}")
    with pytest.raises(IntegrityError, match="does not hold a whole network"):
        load(tmp_path / "model", {})
    (tmp_path / "model" / damage).unlink()
    with pytest.raises(IntegrityError):
        load(tmp_path / "model", {})


def design_of(**changes):
    shape = {
        "members": 1,
        "hidden_sizes": (8, 4),
        "activation": "relu",
        "dropout": 0.0,
        "batch_norm": False,
        "numbers": "plain",
        "bins": 4,
        "number_size": 5,
        "one_hot_labels": 2,
        "embedding_size": 3,
    }
    return MlpDesign(**(shape | changes))


def network(outputs=(1, 1, 3), *, members=1, numbers="plain"):
    inputs = Inputs(
        numeric=("a", "b"),
        has_missing=(1,),
        categories=("c",),
        cardinalities=(5,),
    )
    sample = InputSample(
        np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32),
        np.zeros((300, 1), np.int32),
    )
    design = design_of(members=members, numbers=numbers)
    with RandomStream(0, device=torch.device("cpu")).lent():
        return Mlp(inputs, design, outputs, design.statistics(sample, inputs, seed=0))


PLAIN = TargetScale(mean=0.0, std=1.0)


def row_losses(z_BKO, y_B, target):
    return member_losses(z_BKO, y_B, target, PLAIN)[:, 0]


def test_the_number_of_parameters_by_hand():
    expected = 5 * 3 + (2 + 1 + 3 + 1) * 8 + (8 + 1) * 4 + (4 + 1) * (1 + 1 + 3)

    assert sum(p.numel() for p in network().parameters()) == expected


def test_the_number_of_parameters_of_an_ensemble_by_hand():
    """Piecewise-linear vectors of 5 numbers; three members share weights, each has scalings."""
    vectors = 2 * 5 * 2 + 2 * 4 * 5  # a line each (slope, start), then 4 bins each
    width = 2 * 5 + 1 + 3
    first = width * 8 + 3 * (width + 8 + 8)  # shared weights; in, out and bias of each member
    second = 8 * 4 + 3 * (8 + 4 + 4)
    heads = 3 * (4 + 1) * (1 + 1 + 3)
    found = network(members=3, numbers="piecewise")

    assert sum(p.numel() for p in found.parameters()) == 5 * 3 + vectors + first + second + heads


def test_a_new_network_knows_nothing():
    """Small heads: the first loss is near ln 2 and ln C, and near the spread of a regression."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator)
    codes = torch.randint(0, 5, (400, 1), generator=generator, dtype=torch.int32)
    z = [head.detach() for head in network()(x, codes)]
    y = torch.randn(400, generator=generator)

    assert float(row_losses(z[0], y, DELAY).mean()) == pytest.approx(float(y.var()), rel=0.1)
    assert float(row_losses(z[1], (y > 0).float(), LATE).mean()) == pytest.approx(
        math.log(2), rel=0.1
    )
    assert float(row_losses(z[2], (codes[:, 0] % 3).float(), CLASS).mean()) == pytest.approx(
        math.log(3), rel=0.1
    )


def test_saturated_logits_keep_a_finite_loss_and_their_slope():
    for task, shape in ((LATE, (1, 1, 1)), (CLASS, (1, 1, 3))):
        z = torch.full(shape, 0.0)
        z[0, 0, 0] = 1e4
        z.requires_grad_()
        wrong = torch.tensor([0.0 if task is LATE else 1.0])
        loss = row_losses(z, wrong, task)
        loss.sum().backward()
        assert float(loss.detach()) == pytest.approx(1e4)
        assert float(z.grad[0, 0, 0]) == pytest.approx(1.0)


def test_a_batch_of_one_keeps_its_axis_and_unequal_shapes_raise():
    one = torch.zeros(1, 1, 1)

    assert row_losses(one, torch.zeros(1), DELAY).shape == (1,)
    for shape in [(4, 1), (3, 1, 1), (4, 1, 2)]:
        with pytest.raises(ValueError, match=r"outputs of shape .*; expected \(rows, members, 1\)"):
            row_losses(torch.zeros(shape), torch.zeros(4), DELAY)


def test_the_loss_of_an_ensemble_is_that_of_its_mean_prediction():
    """And never that of its members averaged, which is larger."""
    generator = torch.Generator().manual_seed(0)
    z_BKO = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    y = torch.tensor([0.0, 1, 2, 1, 0], dtype=torch.float64)
    p_BO = torch.softmax(z_BKO, dim=2).mean(dim=1)
    p_B = torch.sigmoid(z_BKO[:, :, 0]).mean(dim=1)
    is_one = y == 1

    assert torch.allclose(
        mean_losses(z_BKO, y, CLASS, PLAIN), -p_BO[torch.arange(5), y.long()].log()
    )
    assert torch.allclose(
        mean_losses(z_BKO[:, :, :1], is_one.double(), LATE, PLAIN),
        -torch.where(is_one, p_B, 1 - p_B).log(),
    )
    assert torch.allclose(
        mean_losses(z_BKO[:, :, :1], y, DELAY, PLAIN), (z_BKO[:, :, 0].mean(dim=1) - y) ** 2
    )
    assert (
        mean_losses(z_BKO, y, CLASS, PLAIN) < member_losses(z_BKO, y, CLASS, PLAIN).mean(dim=1)
    ).all()


def test_values_stay_in_their_output_range_and_begin_at_the_mean(views, tmp_path):
    model, _ = fitted(views, tmp_path, output_range={"delay": [0.0, 20.0]}, max_epochs=20)
    values = model.predict(encoded_rows(views, "test"))["delay"]
    bounded = TargetScale(mean=5.0, std=10.0, low=0.0, high=20.0)

    assert values.min() >= -2
    assert values.max() <= 22
    assert np.ptp(values) > 15
    assert float(network_module.in_range(torch.zeros(1), bounded)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("bounds", "match"),
    [
        ({"delay": [3.0, 1.0]}, r"output_range.delay` is \[3.0, 1.0\] .*low < high"),
        ({"late": [0.0, 1.0]}, "for a binary target"),
        ({"dela": [0.0, 1.0]}, "names 'dela', which is no target; nearest name: delay"),
    ],
)
def test_an_output_range_that_cannot_be_is_refused(views, tmp_path, bounds, match):
    with pytest.raises(ConfigError, match=match):
        fitted(views, tmp_path, output_range=bounds)


def test_gradients_agree_with_finite_differences():
    net = network().double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    x[0, 1] = math.nan
    codes = torch.randint(0, 5, (6, 1), generator=generator)
    y = torch.randn(6, generator=generator, dtype=torch.float64)

    def total():
        z = net(x, codes)
        return row_losses(z[0], y, DELAY).sum() + row_losses(z[1], (y > 0).double(), LATE).sum()

    total().backward()
    weight = net.trunk[0].weight
    with torch.no_grad():
        for place in [(0, 0), (3, 5), (7, 2)]:
            at, step = float(weight[place]), 1e-6
            weight[place] = at + step
            up = float(total())
            weight[place] = at - step
            down = float(total())
            weight[place] = at
            assert float(weight.grad[place]) == pytest.approx((up - down) / (2 * step), abs=1e-6)


def test_a_repeated_value_takes_one_part_and_the_others_keep_theirs():
    rng = np.random.default_rng(0)
    column = np.r_[np.zeros(900), rng.lognormal(size=100)]
    edges, ranks = capped_quantiles(column, 10)
    plain = np.unique(np.quantile(column, np.linspace(0, 1, 11)))

    assert len(plain) == 3
    assert len(edges) == 11
    assert (np.diff(edges) > 0).all()
    assert (np.diff(ranks) > 0).all()
    assert 0 < ranks[0] < ranks[-1] < 1


def test_equal_parts_where_nothing_repeats():
    column = np.random.default_rng(0).normal(size=10_000)
    edges, _ = capped_quantiles(column, 4)

    assert edges[1:-1] == pytest.approx(np.quantile(column, [0.25, 0.5, 0.75]), abs=0.01)


def test_the_curve_makes_a_skewed_column_normal():
    column = np.random.default_rng(0).lognormal(size=20_000)
    knots, images = normal_curve(column)
    curves = NormalCurves([(torch.tensor(knots).float(), torch.tensor(images).float())])
    found = curves(torch.tensor(column)[:, None].float())[:, 0]
    beyond = curves(torch.tensor([[-1e9], [1e9]]))[:, 0]

    assert float(found.mean()) == pytest.approx(0, abs=0.02)
    assert float(found.std()) == pytest.approx(1, abs=0.02)
    assert float((found**3).mean()) == pytest.approx(0, abs=0.1)
    assert beyond.tolist() == pytest.approx([images[0], images[-1]])


def test_few_values_lie_around_0_whatever_their_shares():
    """Fewer values than parts cannot all keep the cap; each counts the same."""
    column = np.repeat([0.0, 1.0, 2.0, 3.0], [70, 10, 10, 10])
    _, images = normal_curve(column)

    assert images == pytest.approx(ndtri([0.125, 0.375, 0.625, 0.875]))


@pytest.mark.parametrize("column", [[], [3.0], [3.0, 3.0]], ids=["none", "one", "same"])
def test_a_column_without_two_values_is_0(column):
    knots, images = normal_curve(np.array(column))
    curves = NormalCurves([(torch.tensor(knots).float(), torch.tensor(images).float())])

    assert curves(torch.tensor([[-5.0], [3.0], [7.0]])).tolist() == [[0], [0], [0]]


def test_a_number_with_two_values_has_bins_too():
    inputs = Inputs(numeric=("a", "b"), has_missing=(), categories=(), cardinalities=())
    sample = InputSample(
        np.tile(np.array([[-1.0, 3.0], [2.0, 3.0]], np.float32), (20, 1)),
        np.zeros((40, 0), np.int32),
    )
    found = design_of(numbers="piecewise").statistics(sample, inputs, seed=0)

    assert [len(found[f"bins.{place}"]) for place in (0, 1)] == [3, 3]
    assert all((found[f"bins.{place}"].diff() > 0).all() for place in (0, 1))


@pytest.mark.parametrize("numbers", ["piecewise", "periodic", "plain"])
@pytest.mark.parametrize("members", [1, 3])
def test_every_form_of_input_learns_and_is_saved(views, tmp_path, numbers, members):
    shape = {"bins": 8, "number_size": 4} if numbers == "piecewise" else {}
    model, recorder = fitted(
        views, tmp_path, numbers=numbers, members=members, max_epochs=12, **shape
    )
    rows = encoded_rows(views, "test")
    saved(model, tmp_path / "model")
    back = load(tmp_path / "model", {})
    losses = [v for name, v, _ in recorder.recorded_metrics if name == "inner_loss"]

    assert min(losses) < 0.7 * losses[0]
    for name, values in model.predict(rows).items():
        assert np.array_equal(values, back.predict(rows)[name])
    assert np.array_equal(model.embed(rows), back.embed(rows))
    assert model.embed(rows).shape == (len(rows), 16)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"members": 4, "batch_norm": True}, "batch_norm is for a plain MLP, but members is 4"),
        ({"numbers": "plain", "bins": 9}, "bins has no effect where numbers is plain"),
        ({"numbers": "periodic", "bins": 9}, "bins has no effect where numbers is periodic"),
    ],
)
def test_settings_of_the_shape_that_cannot_take_effect_are_refused(params, match):
    with pytest.raises(ValidationError, match=match):
        NnParams.model_validate(params)


def test_embeddings_grow_slowly_with_the_labels():
    assert embedding_sizes([3, 1000], 8) == (3, 8)
    assert embedding_sizes([3], 2) == (2,)


def test_the_order_of_training_is_said_and_goes_by_the_set_alone(views, tmp_path, monkeypatch):
    """Exact while the packed rows are few; the window of another set is as exact as that here."""
    _, exact = fitted(views, tmp_path / "a", max_epochs=1)
    monkeypatch.setattr(network_module, "_EXACT_BYTES", 100)
    _, window = fitted(views, tmp_path / "b", max_epochs=1)
    _, block = fitted(views, tmp_path / "c", max_epochs=1, order="block")

    orders = [recorder.recorded_params["order"] for recorder in (exact, window, block)]
    assert orders == ["exact", "window", "block"]


def test_no_reading_process_outlives_the_fit(views, tmp_path):
    _, recorder = fitted(views, tmp_path, max_epochs=1, resources=Resources(workers=1))

    assert recorder.recorded_params["transfer"] == "plain"
    assert not multiprocessing.active_children()
