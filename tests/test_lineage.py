"""Stage keys and the lineage id depend on what makes an output, and on nothing else."""

from pathlib import Path

import pytest
import yaml

from headrace.errors import IntegrityError
from headrace.lineage import code_files, environment, lineage_id, stage_keys

_ENTRY = {
    "cmd": "headrace stage extract",
    "deps": [{"path": "a.csv", "md5": "1", "size": 3}],
    "params": {"params.yaml": {"extract": {"folds": 5}}},
    "outs": [{"path": "data/extract", "md5": "2"}],
}


def _keys(tmp_path: Path, **changes: object) -> dict[str, str]:
    lock = tmp_path / "dvc.lock"
    lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": {"extract": _ENTRY | changes}}))
    return stage_keys(lock)


def test_a_key_follows_command_inputs_and_params_but_not_outputs(tmp_path: Path):
    base = _keys(tmp_path)
    assert _keys(tmp_path, outs=[]) == base
    assert _keys(tmp_path, cmd="other") != base
    assert _keys(tmp_path, deps=[]) != base
    assert _keys(tmp_path, params={}) != base


def test_no_lock_is_no_keys_and_a_broken_one_is_refused(tmp_path: Path):
    assert stage_keys(tmp_path / "dvc.lock") == {}
    (tmp_path / "dvc.lock").write_text("stages: [1, 2\n")
    with pytest.raises(IntegrityError, match="restore it from git"):
        stage_keys(tmp_path / "dvc.lock")


def test_the_lineage_id_takes_live_stages_only():
    keys = {"a": "1", "b": "2", "dead": "3"}
    assert lineage_id(keys, ["a", "b"], "e") == lineage_id({"b": "2", "a": "1"}, ["b", "a"], "e")
    assert lineage_id(keys, ["a", "b"], "e") != lineage_id(keys, ["a", "b"], "other")
    assert lineage_id(keys, ["a", "b"], "e") != lineage_id(keys, ["a", "b", "dead"], "e")


def test_code_is_found_through_imports_but_not_in_the_calling_layers():
    names = {path.name for path in code_files("headrace.data.predictions")}
    assert names == {"predictions.py", "schema.py", "errors.py", "storage.py", "params.py"}
    for path in code_files("headrace.commands.settings"):
        assert path.parent.name != "tracking"


def test_the_environment_names_what_results_depend_on():
    names = {line.partition("==")[0] for line in environment()}
    assert {"python", "headrace", "torch", "duckdb", "catboost", "numpy", "pyarrow"} <= names
