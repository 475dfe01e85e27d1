"""The settings of the loop: what cannot take effect is refused, with its reason."""

import re
from pathlib import Path

import pytest

from headrace.errors import ConfigError
from headrace.params import parse_section
from headrace.training.params import TrainingParams

IDLE = [
    ({"momentum": 0.9}, "momentum is for sgd and rmsprop, but optimiser is adamw"),
    (
        {"plateau": {"patience": 2}},
        "plateau is for schedule: plateau, but schedule is constant",
    ),
    (
        {"warmup_steps": 0, "rate_floor": 0.1},
        "rate_floor has no effect on a constant rate without a warm-up",
    ),
    (
        {"batch_rows": 64, "micro_rows": 64},
        "micro_rows is 64, but a batch has only batch_rows = 64",
    ),
    (
        {"predict_draws": 4, "mixup": 0.2},
        "predict_draws is 4, but input_noise and column_mask are 0",
    ),
]


@pytest.mark.parametrize(("settings", "message"), IDLE, ids=[next(iter(s)) for s, _ in IDLE])
def test_a_setting_that_cannot_take_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingParams.model_validate(settings)


def test_settings_with_an_effect_are_taken_and_survive_a_round_trip():
    for settings in (
        {"optimiser": "sgd", "momentum": 0.5},
        {"schedule": "plateau", "plateau": {"patience": 2, "cooldown": 1}, "patience": 5},
        {"schedule": "cosine", "warmup_steps": 0, "rate_floor": 0.1},
        {"batch_rows": 64, "micro_rows": 32},
        {"column_mask": 0.1, "predict_draws": 4},
        {"warm_start": {"path": "w.safetensors", "digest": "ab", "freeze": ["trunk.*"]}},
    ):
        params = TrainingParams.model_validate(settings)
        assert TrainingParams.model_validate(params.model_dump(mode="json")) == params


@pytest.mark.parametrize(("patience", "fits"), [(7, False), (8, True)])
def test_early_stopping_waits_for_two_falls_of_a_plateau(patience, fits):
    settings = {
        "schedule": "plateau",
        "plateau": {"patience": 3, "cooldown": 2},
        "patience": patience,
    }
    if fits:
        assert TrainingParams.model_validate(settings).patience == patience
        return
    with pytest.raises(ValueError, match=r"patience is 7.* at least .* = 8"):
        TrainingParams.model_validate(settings)


def test_all_faults_are_told_at_once_and_without_the_whole_section():
    with pytest.raises(ConfigError) as caught:
        parse_section(
            TrainingParams,
            {"momentum": 0.9, "plateau": {"patience": 4}},
            key="train.nn",
            path=Path("params.yaml"),
        )

    assert str(caught.value) == (
        "params.yaml: `train.nn`: momentum is for sgd and rmsprop, but optimiser is adamw; plateau "
        "is for schedule: plateau, but schedule is constant"
    )
    assert caught.value.exit_code == 2
