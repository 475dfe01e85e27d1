"""The list of kinds, and reading models back by what model.json says."""

import subprocess
import sys

import pytest

from headrace.errors import ConfigError, IntegrityError
from headrace.models.baseline import BaselineParams, fit
from headrace.models.protocol import (
    KINDS,
    kind_module,
    load_model,
    model_section,
    save_model,
)
from headrace.params import Section
from headrace.record import MemoryRecorder
from headrace.storage import read_json, write_json
from tests.train_case import RESOURCES, make_case


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_a_section_whose_defaults_hold_and_both_functions(name):
    section = model_section(name)
    module = kind_module(name)

    assert issubclass(section, Section)
    assert section.model_validate({}) == section()
    assert callable(module.fit)
    assert callable(module.load)


@pytest.mark.parametrize("ask", [model_section, kind_module])
def test_an_unknown_kind_names_the_nearest(ask):
    with pytest.raises(ConfigError, match="'catbost' is not a kind of model; nearest name: catbo"):
        ask("catbost")
    with pytest.raises(ConfigError, match=f"not a kind of model; known: {', '.join(KINDS)}"):
        ask("zzz")


def test_sections_load_neither_torch_nor_catboost():
    code = (
        "import sys; from headrace.models.protocol import KINDS, model_section\n"
        "for name in KINDS: model_section(name)\n"
        "print(*({'torch', 'catboost', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    views = make_case(folder, num_train=100)
    model = fit(
        views,
        BaselineParams(),
        checkpoints=folder / "checkpoints",
        resources=RESOURCES,
        recorder=MemoryRecorder(),
    )
    save_model(model, folder / "out", views.contract)
    return folder / "out", views


def test_model_json_says_what_it_is(saved):
    folder, views = saved
    content = read_json(folder / "model.json")

    assert content["kind"] == "baseline"
    assert content["inputs"] == "encoded"
    assert content["contract"] == views.contract.digest
    assert [target["name"] for target in content["targets"]] == ["delay", "late", "class"]
    assert load_model(folder).kind == "baseline"


@pytest.mark.parametrize(
    ("change", "told"),
    [({"format": 1}, "format 1"), ({"kind": "pickle"}, "kind 'pickle'")],
)
def test_another_form_of_model_is_refused(saved, tmp_path, change, told):
    folder, _ = saved
    write_json(tmp_path / "model.json", read_json(folder / "model.json") | change)
    with pytest.raises(IntegrityError, match=f"{told}.*reads format 2 of the kinds baseline"):
        load_model(tmp_path)


def test_a_missing_model_json_is_named(tmp_path):
    with pytest.raises(IntegrityError, match=r"model\.json is missing"):
        load_model(tmp_path)
