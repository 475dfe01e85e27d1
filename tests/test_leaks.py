"""No row's label reaches its own out-of-fold prediction: one label is changed, the rest reruns.

The label is changed in the extracted table, with split and fold held fixed, and ``reduce``,
``encode`` and ``train`` run again. The row's own prediction stays equal to the last bit; rows of
other folds, whose models learn from the label, get others. Statistics of labels (the scale of a
target, priors, encodings of categories) are covered with it: the changed value is far out.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.data.predictions import read_predictions
from headrace.models.protocol import KINDS, FitParams, model_section
from headrace.record import MemoryRecorder
from headrace.schema import SPLITS
from headrace.stages.encode import EncodeParams, encode
from headrace.stages.reduce import ReduceParams, reduce
from headrace.stages.train import train
from tests.encode_tables import write_table
from tests.train_case import QUICK, RESOURCES, ROLES, TARGETS, example_columns

NUM_ROWS = 300
OTHER = {"yes": "no", "no": "yes", "a": "c", "b": "c", "c": "a"}
MODELS = [
    (model, bag)
    for model in KINDS
    for bag in ("folds", "bootstrap")
    if bag == "folds" or issubclass(model_section(model), FitParams)
]


def changed(columns, row):
    """Return the columns with other labels in one row."""
    found = dict(columns)
    for target in TARGETS:
        labels = columns[target.name].to_pylist()
        value = labels[row]
        labels[row] = 1e4 - value if target.task == "regression" else OTHER[value]
        found[target.name] = pa.array(labels, columns[target.name].type)
    return found


def example_splits():
    return {
        split: example_columns(num_rows, seed=seed)
        for seed, (split, num_rows) in enumerate(
            {"train": NUM_ROWS, "valid": 40, "test": 40}.items()
        )
    }


def prepare(folder, splits):
    """Run the stages from the extracted table to the encoded one."""
    roles = ROLES | {target.name: "target" for target in TARGETS}
    write_table(folder / "extract", splits, roles=roles, targets=TARGETS)
    told = {"resources": RESOURCES, "recorder": MemoryRecorder()}
    reduce(folder / "extract", folder / "reduce", ReduceParams(), **told)
    encode(folder / "reduce", folder / "encode", EncodeParams(), **told)
    return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The folders as they are and with one row's labels changed, and that row."""
    folder = tmp_path_factory.mktemp("leaks")
    splits = example_splits()
    is_labelled = np.all(
        [splits["train"][t.name].is_valid().to_numpy(zero_copy_only=False) for t in TARGETS], axis=0
    )
    row = int(np.flatnonzero(is_labelled & (np.arange(NUM_ROWS) % 5 == 1))[3])
    flipped = splits | {"train": changed(splits["train"], row)}
    return prepare(folder / "as_is", splits), prepare(folder / "flipped", flipped), row


def predicted(folder, model, bag, out):
    """Return the out-of-fold predictions per target, and the fold of each row."""
    section = model_section(model)
    params = dict(QUICK.get(model, {}))
    if issubclass(section, FitParams):
        params["bag"] = bag
    train(
        folder / "reduce",
        folder / "encode",
        out,
        section.model_validate(params),
        model=model,
        cache=folder / "cache",
        checkpoints=out.parent / f"checkpoints-{out.name}",
        resources=RESOURCES,
        recorder=MemoryRecorder(),
    )
    found = {target.name: read_predictions(out, target).of_split("train") for target in TARGETS}
    assert all(np.array_equal(one.row_id, np.arange(NUM_ROWS)) for one in found.values())
    return {name: one.values for name, one in found.items()}, found["delay"].fold


@pytest.mark.parametrize(("model", "bag"), MODELS)
def test_a_changed_label_leaves_the_rows_own_prediction_as_it_was(case, tmp_path, model, bag):
    """For every kind of model and every target; others do change, so the test can fail."""
    as_is, flipped, row = case
    before, fold = predicted(as_is, model, bag, tmp_path / "before")
    after, _ = predicted(flipped, model, bag, tmp_path / "after")

    for target in TARGETS:
        own, other = before[target.name], after[target.name]
        assert own[row].tobytes() == other[row].tobytes(), target.name
        assert own[fold == fold[row]].tobytes() == other[fold == fold[row]].tobytes()
        assert (own[fold != fold[row]] != other[fold != fold[row]]).any(), target.name


def test_the_changed_row_is_of_the_train_split_and_alone(case):
    """What the tests above rest on."""
    as_is, flipped, row = case
    for split in SPLITS[:3]:
        tables = [
            pq.read_table(folder / "extract" / split / "part-00000.parquet")
            for folder in (as_is, flipped)
        ]
        different = [
            i
            for i, (one, two) in enumerate(
                zip(tables[0].to_pylist(), tables[1].to_pylist(), strict=True)
            )
            if one != two
        ]
        assert different == ([row] if split == "train" else [])
