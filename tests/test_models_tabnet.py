"""TabNet: what it learns and looks at, few rows, unseen codes, and the very same bytes twice."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from headrace.errors import ConfigError, DataError
from headrace.models.attention import Explanation, GhostNorm, TabnetDesign, TabnetNetwork
from headrace.models.attention_figures import (
    attention_correlations,
    attention_figures,
    correlations_figure,
    predicted_numbers,
)
from headrace.models.network import Inputs
from headrace.models.tabnet import TabnetParams, fit, load, open_learner
from headrace.record import MemoryRecorder
from headrace.storage import digest_bytes
from headrace.training.device import RandomStream
from tests.encode_tables import changed
from tests.halting import Halt, HaltingRecorder
from tests.train_case import (
    CLASS,
    DELAY,
    LATE,
    RESOURCES,
    TARGETS,
    encoded_rows,
    make_case,
    tree_bytes,
)

QUICK = {
    "device": "cpu",
    "width": 4,
    "num_steps": 2,
    "bins": 6,
    "batch_rows": 64,
    "max_epochs": 3,
    "health": "off",
}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"), weight=True)


@pytest.fixture(scope="module")
def quick(views, tmp_path_factory):
    return fitted(views, tmp_path_factory.mktemp("quick"))


def fitted(views, folder, *, recorder=None, **params):
    recorder = recorder or MemoryRecorder()
    model = fit(
        views,
        TabnetParams.model_validate({**QUICK, **params}),
        checkpoints=folder / "checkpoints",
        resources=RESOURCES,
        recorder=recorder,
    )
    return model, recorder


def saved(model, folder):
    folder.mkdir()
    model.save(folder)
    return tree_bytes(folder)


def figures(recorder):
    return {path.name: path.read_bytes() for path, kind in recorder.files if kind == "figures"}


def test_all_three_tasks_are_learnt_and_attention_finds_the_columns(views, tmp_path):
    model, recorder = fitted(views, tmp_path, width=8, max_epochs=12, health="warn")
    rows = encoded_rows(views, "test")
    values = model.predict(rows)
    delay, late, group = rows.targets.T.astype(np.float64)
    known, known_late = ~np.isnan(delay), ~np.isnan(late)
    error = np.sqrt(np.mean((values["delay"][known] - delay[known]) ** 2))
    shares = model.summary["attention"]

    assert error < 0.45 * np.nanstd(delay)
    assert np.mean((values["late"] > 0.5)[known_late] == (late > 0.5)[known_late]) > 0.85
    assert np.mean(values["class"].argmax(axis=1) == group) > 0.75
    assert set(list(shares)[:2]) == {"distance", "carrier"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    assert not [text for text in recorder.warnings if "first loss" in text]


def test_two_fits_have_the_same_bytes_figures_included(views, tmp_path, quick):
    model, recorder = quick
    again, recorder_again = fitted(views, tmp_path / "2")
    other, _ = fitted(views, tmp_path / "3", seed=1)
    first, second = saved(model, tmp_path / "a"), saved(again, tmp_path / "b")

    assert first == second
    assert model.summary == again.summary
    assert figures(recorder) == figures(recorder_again)
    assert set(figures(recorder)) == {"attention_masks.svg", "attention_correlations.svg"}
    assert first["weights.safetensors"] != saved(other, tmp_path / "c")["weights.safetensors"]


def test_a_saved_network_predicts_embeds_and_explains_the_same(views, tmp_path, quick):
    model, _ = quick
    saved(model, tmp_path / "model")
    back = load(tmp_path / "model", {"summary": dict(model.summary)})
    rows = encoded_rows(views, "test")
    for name, values in model.predict(rows).items():
        assert np.array_equal(values, back.predict(rows)[name])
    assert model.embed(rows).shape == (len(rows), QUICK["width"])
    assert np.array_equal(model.embed(rows), back.embed(rows))
    assert np.array_equal(model.explain(rows).masks_SBK, back.explain(rows).masks_SBK)
    assert back.summary == model.summary


@pytest.mark.parametrize("halt_after", [3, 12])
def test_a_halted_fit_resumes_to_the_very_same_bytes(views, tmp_path, halt_after):
    params = {"checkpoint_minutes": 0.0, "max_epochs": 2}
    whole = saved(fitted(views, tmp_path / "whole", **params)[0], tmp_path / "a")
    with pytest.raises(Halt):
        fitted(views, tmp_path / "halted", recorder=HaltingRecorder(halt_after), **params)
    model, recorder = fitted(views, tmp_path / "halted", **params)

    assert saved(model, tmp_path / "b") == whole
    assert any(note.startswith("Resumed in epoch") for note in recorder.notes)


def test_training_begins_from_the_weights_of_an_earlier_one(views, tmp_path, quick):
    """Of layers that stand under several names, the file has one."""
    saved(quick[0], tmp_path / "model")
    path = tmp_path / "model" / "weights.safetensors"
    start = {"path": str(path), "digest": digest_bytes(path.read_bytes())}
    model, _ = fitted(views, tmp_path, warm_start=start, learning_rate=1e-12, max_epochs=1)

    before, after = (dict(one.network.named_parameters()) for one in (quick[0], model))
    for name, value in before.items():
        assert torch.allclose(after[name], value, atol=1e-6), name


def test_the_masks_of_a_step_share_out_its_attention(views, quick):
    model, _ = quick
    rows = encoded_rows(views, "test")
    found = model.explain(rows)

    assert found.columns == ("distance", "wind", "carrier", "gate")
    assert found.masks_SBK.shape == (2, len(rows), 4)
    assert found.masks_SBK.min() >= 0
    assert found.masks_SBK.sum(axis=2) == pytest.approx(1, abs=1e-5)
    total_B = found.importances_BK.sum(axis=1)
    assert np.all((np.abs(total_B - 1) < 1e-5) | (total_B == 0))


def test_a_row_is_predicted_and_explained_alike_alone_and_among_others(views, quick):
    model, _ = quick
    rows = encoded_rows(views, "test")
    one = rows.where(np.array([77]))
    whole, masks_SBK = model.predict(rows), model.explain(rows).masks_SBK
    for name, values in model.predict(one).items():
        assert values == pytest.approx(whole[name][[77]], rel=1e-5, abs=1e-5)
    assert model.explain(one).masks_SBK[:, 0] == pytest.approx(masks_SBK[:, 77], abs=1e-5)


def test_no_rows_give_no_predictions(views, quick):
    none = encoded_rows(views, "test").where(np.arange(0))

    assert {name: v.shape for name, v in quick[0].predict(none).items()} == {
        "delay": (0,), "late": (0,), "class": (0, 3),
    }  # fmt: skip
    assert quick[0].explain(none).masks_SBK.shape == (2, 0, 4)


def test_missing_numbers_unseen_codes_and_extremes_are_predicted(views, quick):
    model, _ = quick
    rows = encoded_rows(views, "test")
    nothing = changed(
        rows, numeric=np.full_like(rows.numeric, np.nan), codes=np.zeros_like(rows.codes)
    )
    extreme = changed(rows, numeric=np.full_like(rows.numeric, 1e30))

    assert all(np.isfinite(values).all() for values in model.predict(nothing).values())
    assert np.abs(model.predict(extreme)["delay"]).max() < 1e4


def test_the_penalty_is_minimised_and_not_validated(views, tmp_path):
    _, with_one = fitted(views, tmp_path / "a", lambda_sparse=0.1, max_epochs=1)
    _, without = fitted(views, tmp_path / "b", lambda_sparse=0.0, max_epochs=1)
    told = [{name: v for name, v, _ in r.recorded_metrics} for r in (with_one, without)]

    assert told[0]["train_loss_penalty"] > 0.001
    names = ("delay", "late", "class")
    parts = [told[0][f"train_loss_{name}"] for name in (*names, "penalty")]
    assert told[0]["train_loss"] == pytest.approx(sum(parts), rel=1e-6)
    inner = [told[0][f"inner_loss_{name}"] for name in names]
    assert told[0]["inner_loss"] == pytest.approx(sum(inner), rel=1e-6)
    assert not [name for name in told[0] if name.startswith("inner") and "penalty" in name]
    assert not [name for name in told[1] if "penalty" in name]


def test_more_penalty_makes_masks_sparser(views, tmp_path):
    rows = encoded_rows(views, "test")
    entropies = []
    for name, weight in (("a", 0.0), ("b", 3.0)):
        model, _ = fitted(views, tmp_path / name, lambda_sparse=weight, max_epochs=6)
        masks_SBK = model.explain(rows).masks_SBK
        entropies.append(-(masks_SBK * np.log(masks_SBK + 1e-15)).sum(axis=2).mean())

    assert entropies[1] < 0.5 * entropies[0]


def test_a_short_tail_joins_the_batch_before_it(views):
    """480 rows in batches of 50 end in 30, too few for the means of norms."""
    params = TabnetParams.model_validate({**QUICK, "batch_rows": 50})
    learner = open_learner(views, params, resources=RESOURCES)
    sizes = [len(batch.row_id) for batch in learner.batches(0, used=0)]
    learner.close()

    assert learner.num_rows == 480
    assert sizes == [50] * 8 + [80]


@pytest.mark.parametrize(
    ("num_train", "params", "error", "told"),
    [
        (30, {"batch_rows": None}, DataError, r"at least 32 rows, but there are only 24 to learn"),
        (600, {"batch_rows": 481}, ConfigError, r"`train\.tabnet\.batch_rows` is 481.*480 to lear"),
        (600, {"batch_rows": 31}, ConfigError, r"is 31, but a batch of tabnet has at least 32"),
    ],
)
def test_too_few_rows_are_refused(tmp_path, num_train, params, error, told):
    with pytest.raises(error, match=told):
        fitted(make_case(tmp_path, num_train=num_train), tmp_path, **params)


def test_a_table_of_categories_alone_and_of_numbers_alone():
    numeric, codes = torch.randn(40, 2), torch.randint(0, 5, (40, 1), dtype=torch.int32)
    for inputs in (
        {"numeric": (), "has_missing": (), "categories": ("c",), "cardinalities": (5,)},
        {"numeric": ("a", "b"), "has_missing": (), "categories": (), "cardinalities": ()},
    ):
        net = network(**inputs)
        z = net(numeric[:, : len(inputs["numeric"])], codes[:, : len(inputs["categories"])])
        assert [part.shape for part in z] == [(40, 1, 1), (40, 1, 3)]


def network(
    numeric=("a", "b"), has_missing=(1,), categories=("c",), cardinalities=(5,), outputs=(1, 3)
):
    inputs = Inputs(
        numeric=numeric,
        has_missing=has_missing,
        categories=categories,
        cardinalities=cardinalities,
    )
    design = TabnetDesign(
        width=4,
        num_steps=3,
        gamma=1.3,
        lambda_sparse=0.5,
        bins=6,
        embedding_size=3,
        virtual_batch_rows=16,
    )
    line = torch.linspace(-2, 2, 7)
    statistics = {f"{name}.{n}": line for name in ("knots", "images", "bins") for n in (0, 1)}
    with RandomStream(0, device=torch.device("cpu")).lent():
        return TabnetNetwork(inputs, design, outputs, statistics)


def test_the_number_of_parameters_by_hand():
    """W is the width; a layer of W + W puts out twice that, for gates; norms have two each."""
    W, S, K = 4, 3, 3
    D = 2 + 1 + 2 * 6 + 3
    first = 2 * D  # the norm of the inputs
    shared = D * 4 * W + 2 * W * 4 * W
    transformer = 2 * (2 * 4 * W) + 2 * (2 * W * 4 * W) + 2 * (2 * 4 * W)
    attention = W * K + 2 * K
    heads = (W + 1) * (1 + 3)
    expected = first + shared + (S + 1) * transformer + S * attention + heads + 5 * 3

    assert sum(p.numel() for p in network().parameters()) == expected


def test_the_penalty_is_the_entropy_of_the_masks():
    net = network().eval()
    numeric, codes = torch.randn(40, 2), torch.randint(0, 5, (40, 1), dtype=torch.int32)
    with torch.no_grad():
        net(numeric, codes)
        masks_SBK, _ = net.explain(numeric, codes)
    entropy = -(masks_SBK * torch.log(masks_SBK + 1e-15)).sum(dim=2).mean()

    assert float(net.penalty()) == pytest.approx(0.5 * float(entropy), rel=1e-4)
    assert float(entropy) > 0.01


def test_every_parameter_learns_and_a_copy_is_of_its_own():
    net = network()
    numeric, codes = torch.randn(40, 2), torch.randint(0, 5, (40, 1), dtype=torch.int32)
    numeric[0] = math.nan
    twin = copy.deepcopy(net)
    z = net(numeric, codes)
    (sum(part.square().sum() for part in z) + net.penalty()).backward()

    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in twin.parameters())
    # The norms moved in one forward pass of one of them.
    assert not torch.equal(net.state_dict()["encoder.initial_bn.running_mean"], torch.zeros(18))
    assert torch.equal(twin.state_dict()["encoder.initial_bn.running_mean"], torch.zeros(18))


@pytest.mark.parametrize(("num_rows", "num_parts"), [(241, 16), (16, 1), (17, 2), (2, 1)])
def test_ghost_norm_is_batch_norm_of_nearly_even_parts(num_rows, num_parts):
    """241 rows in parts of 16 leave one row, where the library fails."""
    x = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(0))
    norm = GhostNorm(nn.BatchNorm1d(3), 16)
    parts = np.array_split(x.numpy(), num_parts)
    expected = np.concatenate(
        [(part - part.mean(axis=0)) / np.sqrt(part.var(axis=0) + 1e-5) for part in parts]
    )

    assert norm(x).detach().numpy() == pytest.approx(expected, abs=1e-4)
    norm.eval()
    assert torch.equal(norm(x), norm.norm(x))


def test_correlations_are_those_of_numpy_and_empty_where_nothing_varies():
    rng = np.random.default_rng(0)
    masks_SBK = rng.dirichlet(np.ones(4), size=(5, 50)).astype(np.float32)
    masks_SBK[:, :, 1] = 0.25  # a column that gets the same attention in all rows
    masks_SBK[2, :, 3] = 1.0 - 1e-8 * rng.random(50)
    predicted_BO = np.column_stack([rng.normal(1e6, 1, 50), np.full(50, 0.3), rng.random(50)])
    found_SKO = attention_correlations(masks_SBK, predicted_BO)

    for s in range(5):
        for k in range(4):
            for o in range(3):
                if k == 1 or o == 1 or (s, k) == (2, 3):
                    assert math.isnan(found_SKO[s, k, o])
                else:
                    twin = np.corrcoef(masks_SBK[s, :, k], predicted_BO[:, o])[0, 1]
                    assert found_SKO[s, k, o] == pytest.approx(twin, abs=1e-6)


def test_classes_enter_by_their_probabilities_and_never_by_number():
    p_BO = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    values = {"delay": np.array([1.0, 2.0]), "late": np.array([0.1, 0.9]), "class": p_BO}
    names, numbers_BO = predicted_numbers(values, TARGETS)

    assert names == ["delay", "P(late = yes)", "P(class = a)", "P(class = b)", "P(class = c)"]
    assert numbers_BO.tolist() == [[1.0, 0.1, 0.2, 0.3, 0.5], [2.0, 0.9, 0.6, 0.3, 0.1]]


def explained(num_steps, num_columns=3, num_rows=30):
    rng = np.random.default_rng(1)
    masks_SBK = rng.dirichlet(np.ones(num_columns), size=(num_steps, num_rows)).astype(np.float32)
    names = tuple(f"column_{k}" for k in range(num_columns))
    return Explanation(names, masks_SBK, masks_SBK.mean(axis=0))


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_the_figures_show_any_number_of_steps(num_steps):
    values = {"delay": np.arange(30.0)}
    masks, correlations = attention_figures(explained(num_steps), values, (DELAY,))

    assert [f"step {s}" in masks.svg for s in range(1, num_steps + 2)] == [True] * num_steps + [
        False
    ]
    assert "delay: most with column_" in correlations.alternative
    assert masks.title == "Where each step looked, in 16 rows"


def test_the_figures_show_the_columns_with_most_attention_and_say_what_they_leave_out():
    explanation = explained(2, num_columns=40)
    explanation.importances_BK[:, 7] = 10.0
    names = [f"P(class = {label})" for label in range(13)]
    figure = correlations_figure(explanation, names, np.full((2, 40, 13), 0.5))

    assert "column_7<" in figure.svg
    assert figure.svg.count("column_") == 12 * 15
    assert figure.alternative.endswith("; not drawn: 1 more")


def test_no_correlation_no_figure():
    explanation = explained(2)
    explanation.masks_SBK[:] = [1.0, 0.0, 0.0]
    values = {"late": np.linspace(0, 1, 30), "class": np.full((30, 3), 1 / 3)}

    assert [one.name for one in attention_figures(explanation, values, (LATE, CLASS))] == [
        "attention_masks"
    ]
