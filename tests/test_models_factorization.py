"""Factorization: what a label adds, cold labels, absent pairs, the search, resume, the figure."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from headrace.data.encoder import FIRST_LABEL, open_encoder
from headrace.errors import ConfigError
from headrace.models import factorization
from headrace.models.bias_figure import bias_figures, label_effects
from headrace.models.factorization import FactorizationParams, fit, load
from headrace.models.factors import FactorDesign
from headrace.models.network import Inputs
from headrace.models.protocol import StopRows
from headrace.record import MemoryRecorder
from headrace.schema import Target
from headrace.training.device import RandomStream
from tests.encode_tables import changed, write_table
from tests.halting import Halt, HaltingRecorder
from tests.train_case import RESOURCES, encode_only, encoded_rows, tree_bytes

RATING = Target(name="rating", task="regression")
LIKED = Target(name="liked", task="binary", labels=("no", "yes"))
STARS = Target(name="stars", task="multiclass", labels=("few", "some", "many"))
TARGETS = (RATING, LIKED, STARS)
NUM_USERS, NUM_ITEMS = 40, 30
SIZES = {"train": 900, "valid": 150, "test": 150}
QUICK = {
    "device": "cpu",
    "columns": ["user", "item"],
    "weight_decay": 0.02,
    "dim": 4,
    "batch_rows": 64,
    "max_epochs": 15,
    "warmup_steps": 0,
    "learning_rate": 0.02,
    "health": "off",
}


def ratings(num_rows, *, seed):
    """Ratings from 1 to 5: a level of each user and item, and one taste that they share or not."""
    truth, rng = np.random.default_rng(9), np.random.default_rng(seed)
    level_u, level_i = truth.normal(0, 0.7, NUM_USERS), truth.normal(0, 0.7, NUM_ITEMS)
    taste_u, taste_i = truth.choice([-1, 1], NUM_USERS), truth.choice([-1, 1], NUM_ITEMS)
    user, item = rng.integers(0, NUM_USERS, num_rows), rng.integers(0, NUM_ITEMS, num_rows)
    value = 3 + level_u[user] + level_i[item] + 0.6 * taste_u[user] * taste_i[item]
    value = np.clip(value + rng.normal(0, 0.3, num_rows), 1, 5)
    return {
        "user": pa.array(user),
        "item": pa.array([f"film {i}" for i in item]).dictionary_encode(),
        "hour": pa.array(rng.integers(0, 24, num_rows)),
        "rating": pa.array(value),
        "liked": pa.array(np.where(value > 3, "yes", "no").tolist()),
        "stars": pa.array(np.array(["few", "some", "many"])[np.digitize(value, [2.5, 3.5])]),
    }


def case(folder, *, targets=TARGETS, change=None):
    """Write and encode a table of ratings; ``change`` replaces columns of train."""
    roles = {"user": "category", "item": "category", "hour": "category"}
    roles |= {target.name: "target" for target in targets}
    splits = {s: ratings(n, seed=i) for i, (s, n) in enumerate(SIZES.items())}
    splits["train"] |= dict(change or {})
    splits = {s: {c: v for c, v in columns.items() if c in roles} for s, columns in splits.items()}
    write_table(folder / "reduce", splits, roles=roles, targets=targets)
    return encode_only(folder)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    return case(tmp_path_factory.mktemp("ratings"), targets=(RATING,))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return case(tmp_path_factory.mktemp("three"))


def fitted(views, folder, *, recorder=None, **params):
    recorder = recorder or MemoryRecorder()
    model = fit(
        views,
        FactorizationParams.model_validate({**QUICK, **params}),
        checkpoints=folder / "checkpoints",
        resources=RESOURCES,
        recorder=recorder,
    )
    return model, recorder


def saved(model, folder):
    folder.mkdir()
    model.save(folder)
    return tree_bytes(folder)


def of_codes(views, *codes_BC):
    """Return rows with these codes of user, item and hour."""
    rows = encoded_rows(views, "test").where(np.zeros(len(codes_BC), np.int64))
    return changed(rows, codes=np.array(codes_BC, rows.codes.dtype))


def rmse(model, views):
    """Return the error of the first target on test rows."""
    rows = encoded_rows(views, "test")
    return math.sqrt(np.mean((model.predict(rows)["rating"] - rows.targets[:, 0]) ** 2))


def test_ratings_of_all_three_tasks_are_learnt_side_by_side(three, tmp_path):
    model, _ = fitted(three, tmp_path)
    rows = encoded_rows(three, "test")
    values = model.predict(rows)
    rating, liked, stars = rows.targets.T

    assert rmse(model, three) < 0.5 * np.std(rating)
    assert np.mean((values["liked"] > 0.5) == (liked > 0.5)) > 0.8
    assert np.mean(values["stars"].argmax(axis=1) == stars) > 0.7
    assert np.allclose(values["stars"].sum(axis=1), 1, atol=1e-12)
    assert model.embed(rows).shape == (len(rows), 2 * 5 * 4)


def test_taste_is_learnt_beyond_the_biases(views, tmp_path):
    """Without vectors nothing tells who likes what; the noise alone is 0.3."""
    whole = rmse(fitted(views, tmp_path / "whole")[0], views)
    model = fitted(views, tmp_path / "biases")[0]
    with torch.no_grad():
        model.network.first.weight.zero_()

    assert whole < 0.5
    assert rmse(model, views) > whole + 0.15


def network(*, outputs=(1, 3), weight_decay=0.5):
    inputs = Inputs(numeric=(), has_missing=(), categories=("item", "hour", "user"),
                    cardinalities=(5, 9, 4))  # fmt: skip
    design = FactorDesign(columns=("user", "item"), dim=2, weight_decay=weight_decay)
    targets = [RATING if count == 1 else STARS for count in outputs]
    with RandomStream(0, device=torch.device("cpu")).lent():
        made = design.build(inputs, targets, {}).double()
        for table in (made.first_bias, made.second_bias):
            torch.nn.init.normal_(table.weight)
    return made


def test_the_number_of_parameters_by_hand():
    assert sum(p.numel() for p in network().parameters()) == (4 + 5) * (2 + 1) * 4 + 4


def test_looking_up_is_the_product_with_one_hot_matrices():
    """And the codes of unknown and missing are rows of zeros."""
    net = network(outputs=(1, 1))
    item, user = torch.arange(5).repeat(4), torch.arange(4).repeat_interleave(5)
    codes = torch.stack([item, torch.zeros_like(item), user], dim=1)
    z_BO = torch.cat(net(torch.empty(20, 0), codes), dim=2)[:, 0]

    user_1h = torch.nn.functional.one_hot(user, 4).double() * (user >= FIRST_LABEL)[:, None]
    item_1h = torch.nn.functional.one_hot(item, 5).double() * (item >= FIRST_LABEL)[:, None]
    expected = net.mean_O + user_1h @ net.first_bias.weight + item_1h @ net.second_bias.weight
    for o in range(2):
        of_user = user_1h @ net.first.weight.unflatten(1, (2, 2))[:, o]
        of_item = item_1h @ net.second.weight.unflatten(1, (2, 2))[:, o]
        expected[:, o] += (of_user @ of_item.T).diagonal()
    assert torch.allclose(z_BO, expected, atol=1e-12)


def test_the_penalty_is_the_decay_of_what_was_looked_up():
    net = network(outputs=(1,), weight_decay=0.5)
    net(torch.empty(2, 0), torch.tensor([[2, 0, 3], [4, 0, 1]]))
    user, item, no_user = net.first.weight[3], net.second.weight[[2, 4]], 0
    squares = (user**2).sum() + (item**2).sum() + no_user
    squares = squares + net.first_bias.weight[3, 0] ** 2
    squares = squares + (net.second_bias.weight[[2, 4], 0] ** 2).sum()

    assert torch.allclose(net.penalty(), 0.5 * squares / 2)


def test_the_optimiser_adds_no_decay_of_its_own(views, tmp_path, monkeypatch):
    """The network's penalty is all: without it the number in the parameters changes nothing."""
    monkeypatch.setattr("headrace.models.factors.Factors.has_penalty", False)
    files = [
        saved(fitted(views, tmp_path / str(d), weight_decay=d)[0], tmp_path / f"m{d}")
        for d in (1e-6, 0.1)
    ]
    assert files[0]["weights.safetensors"] == files[1]["weights.safetensors"]


def test_weight_decay_pulls_vectors_and_biases_to_zero(views, tmp_path):
    weak = fitted(views, tmp_path / "1", weight_decay=1e-6)[0].network
    strong = fitted(views, tmp_path / "2", weight_decay=5.0)[0].network
    for name in ("first", "second", "first_bias", "second_bias"):
        ours, theirs = getattr(strong, name).weight, getattr(weak, name).weight
        assert ours[2:].abs().mean() < 0.5 * theirs[2:].abs().mean()


def test_an_unseen_label_leaves_the_others_bias_and_the_mean(views, tmp_path):
    model, _ = fitted(views, tmp_path, output_range={})
    net, scale = model.network, float(np.std(ratings(900, seed=0)["rating"]))
    item, user = FIRST_LABEL + 3, FIRST_LABEL + 7
    told = model.predict(
        of_codes(views, (0, 0, 2), (1, 1, 2), (0, item, 2), (1, item, 2), (user, 0, 2))
    )["rating"]
    mean = float(np.mean(ratings(900, seed=0)["rating"]))

    assert told[0] == told[1] == pytest.approx(mean, abs=0.1)
    assert told[2] == told[3]
    bias_of_item = float(net.second_bias.weight.detach()[item, 0])
    bias_of_user = float(net.first_bias.weight.detach()[user, 0])
    assert told[2] - told[0] == pytest.approx(bias_of_item * scale, rel=0.05)
    assert told[4] - told[0] == pytest.approx(bias_of_user * scale, rel=0.05)
    assert abs(told[2] - told[0]) > 0.1


def test_a_label_of_held_back_rows_alone_counts_as_unseen(tmp_path):
    """It has a code, for the encoder saw it; but nothing taught its random vector."""
    user = ratings(900, seed=0)["user"].to_numpy().copy()
    user[np.arange(900) % 5 == 4] = 77  # of the fold that training stops by
    views = case(tmp_path, targets=(RATING,), change={"user": pa.array(user)})
    model, _ = fitted(views, tmp_path)
    code = FIRST_LABEL + open_encoder(views.encoded).categories[0].labels.index("77")
    item = FIRST_LABEL + 3
    told = model.predict(of_codes(views, (code, item, 2), (0, item, 2)))["rating"]

    assert told[0] == told[1]
    assert not model.embed(of_codes(views, (code, item, 2)))[0, :4].any()


def test_pairs_without_a_row_are_absent_and_not_zero(tmp_path):
    """Ratings of 5 alone, of a tenth of the pairs: every other pair is predicted near 5 too."""
    value = 5 - 0.01 * (np.arange(900) % 2)
    views = case(tmp_path, targets=(RATING,), change={"rating": pa.array(value)})
    model, recorder = fitted(views, tmp_path)
    codes = [(u, i, 2) for u in range(2, 2 + NUM_USERS) for i in range(2, 2 + NUM_ITEMS)]

    assert recorder.recorded_params["rows_learnt_from"] == 720
    assert model.predict(of_codes(views, *codes))["rating"].min() > 4.9


def test_predictions_stay_in_the_range_of_the_rows_learnt_from(views, tmp_path):
    """A tenth wider on each side; the rows that training stops by do not widen it."""
    value = ratings(900, seed=0)["rating"].to_numpy().copy()
    value[np.arange(900) % 5 == 4] *= 100
    folder = tmp_path / "wide"
    wide = case(folder, targets=(RATING,), change={"rating": pa.array(value)})
    model, _ = fitted(wide, folder, max_epochs=2)
    (scale,) = model._config.scales
    learnt = value[np.arange(900) % 5 != 4]
    assert (scale.low, scale.high) == (learnt.min(), learnt.max())

    free, _ = fitted(views, tmp_path / "free", output_range={})
    given, _ = fitted(views, tmp_path / "given", output_range={"rating": [2.9, 3.1]})
    rows = encoded_rows(views, "test")
    assert np.ptp(free.predict(rows)["rating"]) > 2
    assert np.ptp(given.predict(rows)["rating"]) < 0.24


def test_other_inputs_are_left_aside(views, tmp_path):
    model, _ = fitted(views, tmp_path)
    rows = encoded_rows(views, "test")
    other = rows.codes.copy()
    other[:, 2] = 0

    for name, values in model.predict(rows).items():
        assert np.array_equal(values, model.predict(changed(rows, codes=other))[name])


def test_the_decay_is_searched_on_the_rows_that_training_stops_by(views, tmp_path, monkeypatch):
    monkeypatch.setattr(factorization, "WEIGHT_DECAYS", (3.0, 0.01, 0.1))
    model, recorder = fitted(views, tmp_path / "a", weight_decay="search")
    fixed, _ = fitted(views, tmp_path / "b", weight_decay=0.01)

    assert model.summary["weight_decay"] == recorder.recorded_params["weight_decay_found"] == 0.01
    searched = model.summary["searched"]
    assert list(searched) == ["3e+00", "1e-02", "1e-01"]
    assert searched["1e-02"] == min(searched.values())
    assert {
        name: value for name, value, _ in recorder.recorded_metrics if name.startswith("search")
    } == {f"search_inner_loss/weight-decay-{name}": loss for name, loss in searched.items()}
    first, second = saved(model, tmp_path / "c"), saved(fixed, tmp_path / "d")
    assert first == second, "the whole fit starts from a fresh network"
    assert fixed.summary["searched"] == {}


def test_the_searched_decays_are_those_documented():
    assert tuple(map(math.log10, factorization.WEIGHT_DECAYS)) == (-1, -2, -3, -4, -5, -6)


SEARCHED = {"weight_decay": "search", "checkpoint_minutes": 0.0, "max_epochs": 2}


@pytest.fixture(scope="module")
def undisturbed(views, tmp_path_factory):
    """A fit after a search of two candidates, and how often it told its progress."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recorder = HaltingRecorder(1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorization, "WEIGHT_DECAYS", (0.3, 0.03))
        model, _ = fitted(views, folder, recorder=recorder, **SEARCHED)
    return model, saved(model, folder / "model"), 1000 - recorder.calls_left


@pytest.mark.parametrize("halt_after", [3, 40, 70])
def test_a_halted_search_resumes_to_the_very_same_bytes(
    views, undisturbed, tmp_path, monkeypatch, halt_after
):
    monkeypatch.setattr(factorization, "WEIGHT_DECAYS", (0.3, 0.03))
    whole, files, num_calls = undisturbed
    with pytest.raises(Halt):
        fitted(views, tmp_path, recorder=HaltingRecorder(halt_after), **SEARCHED)
    rest = HaltingRecorder(1000)
    model, _ = fitted(views, tmp_path, recorder=rest, **SEARCHED)

    assert saved(model, tmp_path / "model") == files
    assert model.summary == whole.summary
    assert 1000 - rest.calls_left <= num_calls - halt_after + 4, "nothing is done twice"


def test_a_saved_factorization_predicts_the_same(views, tmp_path):
    model, _ = fitted(views, tmp_path)
    saved(model, tmp_path / "model")
    back = load(tmp_path / "model", {"summary": {}})
    rows = encoded_rows(views, "test")
    for name, values in model.predict(rows).items():
        assert np.array_equal(values, back.predict(rows)[name])


def test_a_bootstrap_sample_and_valid_rows_to_stop_by_are_other_models(views, tmp_path):
    plain = saved(fitted(views, tmp_path / "1")[0], tmp_path / "a")
    for name, other in (
        ("draw", replace(views, draw=3)),
        ("valid", replace(views, stop=StopRows("valid"))),
    ):
        model, _ = fitted(other, tmp_path / name)
        assert (
            saved(model, tmp_path / f"m-{name}")["weights.safetensors"]
            != (plain["weights.safetensors"])
        )


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (["usr", "item"], "names 'usr', .*nearest name: user"),
        (["user", "zzz"], "names 'zzz', .*user.*item.*hour"),
        (["item", "item"], "must name two categories"),
        (None, r"is not set, and the categories are \['user', 'item', 'hour'\]"),
    ],
)
def test_columns_that_are_no_pair_of_categories_are_refused(views, tmp_path, columns, told):
    with pytest.raises(ConfigError, match=rf"`train\.factorization\.columns`.*{told}"):
        fitted(views, tmp_path, columns=columns)


def test_noise_on_numbers_is_refused():
    with pytest.raises(ValueError, match="input_noise has no effect"):
        FactorizationParams(input_noise=0.1)


def test_the_figure_names_the_ends_and_is_the_same_bytes_twice(three, tmp_path):
    model, recorder = fitted(three, tmp_path, max_epochs=3)
    files = {path.name: path.read_text() for path, folder in recorder.files if folder == "figures"}
    encoder = open_encoder(three.encoded)
    effects = label_effects(model, encoder, "item")["rating"][:, 0]
    labels = np.array(encoder.categories[1].labels)
    again = bias_figures(model, three.encoded, ("user", "item"), three.contract.targets)

    assert sorted(files) == [
        "biases_liked.svg",
        "biases_rating.svg",
        "biases_stars_few.svg",
        "biases_stars_many.svg",
        "biases_stars_some.svg",
    ]
    assert {f"{figure.name}.svg": figure.file_text() for figure in again} == files
    order = labels[np.argsort(-effects)]
    found = [text for text in order if f">{text}</text>" in files["biases_rating.svg"]]
    assert found == [*order[:10], *order[-10:]]
    figure = next(f for f in again if f.name == "biases_rating")
    assert f"item: from {order[0]} (+" in figure.alternative
    assert "user:" in figure.alternative


def test_the_effect_of_a_label_is_in_the_unit_of_the_target(three, tmp_path):
    model, _ = fitted(three, tmp_path)
    effects = label_effects(model, open_encoder(three.encoded), "user")
    told = model.predict(of_codes(three, (5, 0, 0), (0, 0, 0)))

    assert effects["rating"][5 - FIRST_LABEL, 0] == told["rating"][0] - told["rating"][1]
    assert effects["stars"].shape == (NUM_USERS, 3)
    assert np.allclose(effects["stars"].sum(axis=1), 0, atol=1e-12)
