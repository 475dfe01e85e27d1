"""Stage ``embedding_catboost``: trees on raw columns and on out-of-fold features of ``train@nn``.

It writes a table of its own into its working folder: the rows of ``data/reduce``, under their ids,
with what the bag of networks says of each as further columns (``models/embedding_catboost``). A bag
of trees is then fitted on that table as ``train@catboost`` is on the plain one.

The network that speaks of a train row has not seen its fold, but has seen all others; so trees that
learn from rows of some folds have, through the networks, seen the labels of the rest as well. No
train row is left that such a model has not seen. It predicts valid and test rows only, and every
prediction carries all folds: it is compared beside the other models, and is no member of a blend
that is made on train rows.

Off by default, for its cost: the stage is there if params.yaml has its section.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.data.encoder import open_encoder
from headrace.data.predictions import read_predictions
from headrace.data.table import Table, open_table
from headrace.errors import ConfigError, DataError
from headrace.models.bagging import BaggedModel
from headrace.models.embedding_catboost import (
    EmbeddingCatboostModel,
    EmbeddingCatboostParams,
    NetworkFeatures,
    network_features,
)
from headrace.models.protocol import load_model, save_model
from headrace.params import Resources
from headrace.record import Recorder
from headrace.schema import CONTRACT, FEATURE_ROLES, FOLD, ROW_ID, Column, Target
from headrace.stages.train import (
    PREDICTED_SPLITS,
    Trained,
    fit_all,
    plan_fits,
    predict_rows,
    record_inputs,
)
from headrace.storage import folder_digest, new_folder, verify_folder, write_file

VECTORS = "vectors"  # folder of what the networks say of each row
_BATCH_ROWS = 65_536
_ALIGNED_ROWS = 20_000  # valid rows that show how the networks' spaces lie, at most


def embedding_catboost(
    table: Path,
    encoded: Path,
    network: Path,
    out: Path,
    params: EmbeddingCatboostParams,
    *,
    cache: Path,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> Trained:
    """Fit trees on ``table`` and on what ``network``, the out of ``train@nn``, says of its rows.

    Raises:
        ConfigError: if the networks are no bag, so that they have seen every train row.
        DataError: if a target cannot be learnt, or a prediction is of a row its network has seen.
        IntegrityError: if an input is damaged.
        ResourceError: if the pool will not fit the memory budget, with the figure needed.
    """
    source = open_table(table)
    verify_folder(network)
    seen_before = _folds_seen(network, source.contract.targets[0])
    record_inputs(recorder, source, encoded)
    recorder.params({"network_digest": folder_digest(network)})
    features = _features(source, encoded, network, params)
    fed = _write_fed(source, features, checkpoints / "table", recorder)
    plans = plan_fits(fed, encoded, cache, params)
    fits = fit_all(plans, params, "catboost", fed, checkpoints, resources, recorder)
    trees = BaggedModel({plan.name or "all": fitted for plan, fitted in fits})
    whole = EmbeddingCatboostModel(features, trees)
    with new_folder(out) as folder:
        save_model(whole, folder, source.contract)
        num_rows = predict_rows(
            whole, plans, whole.kind, source, encoded, folder, recorder, seen_before=seen_before
        )
        _write_vectors(source, fed, features, folder / VECTORS)
    names = tuple(target.name for target in source.contract.targets)
    return Trained(whole.kind, names, num_rows, whole.summary)


def _folds_seen(network: Path, target: Target) -> tuple[int, ...]:
    """Return what the networks have seen together; refuse one that speaks of rows it has seen."""
    found = read_predictions(network, target)
    of_train = found.of_split("train")
    if not len(of_train.row_id):
        raise ConfigError(
            "embedding_catboost needs out-of-fold predictions of train@nn, which has predicted no "
            "train row: set `train.nn.bag` to folds or bootstrap, or leave out the section "
            "`embedding_catboost`"
        )
    for code, folds in enumerate(found.folds_seen):
        is_seen = np.isin(of_train.fold, folds) & (of_train.seen == code)
        if is_seen.any():
            raise DataError(
                f"{network}: {is_seen.sum()} train rows were predicted by a network that has seen "
                f"their fold, first row ids {[str(i) for i in of_train.row_id[is_seen][:5]]}; run "
                f"train@nn again"
            )
    return tuple(sorted({fold for folds in found.folds_seen for fold in folds}))


def _features(
    source: Table, encoded: Path, network: Path, params: EmbeddingCatboostParams
) -> NetworkFeatures:
    networks, encoder = load_model(network), open_encoder(encoded)
    assert isinstance(networks, BaggedModel)  # train rows have predictions
    rows = pa.table({})
    if params.features == "embeddings":
        rows = source.first("valid", encoder.inputs, _ALIGNED_ROWS)
        if not rows.num_rows:
            raise DataError(
                "`embedding_catboost.features` is embeddings, and there are no valid rows to bring "
                "the networks' spaces together by; change `extract.split`, or take predictions"
            )
    return network_features(networks, encoder, params.features, rows)


def _write_fed(source: Table, features: NetworkFeatures, folder: Path, recorder: Recorder) -> Table:
    """Write the rows of ``source`` with the features as a table, batch by batch."""
    kept = [
        column
        for column in source.contract.columns
        if column.role in (*FEATURE_ROLES, "target", "weight")
    ]
    names = [ROW_ID, FOLD, *(column.name for column in kept)]
    splits = ("train", "valid")  # what a fit may look at
    total, done = sum(source.num_rows(split) for split in splits), 0
    added: list[str] = []
    with new_folder(folder) as private:
        for split in splits:
            writer = None
            for batch in source.batches(split, names, batch_rows=_BATCH_ROWS):
                rows = features.added_to(pa.Table.from_batches([batch]))
                added = rows.column_names[len(names) :]
                if writer is None:
                    (private / split).mkdir()
                    path = private / split / "part-00000.parquet"
                    writer = pq.ParquetWriter(path, rows.schema, compression="lz4")
                writer.write_table(rows)
                done += rows.num_rows
                recorder.progress(done, total, unit="rows", detail="features of the networks")
            if writer is not None:
                writer.close()
        columns = (*kept, *(Column(name=n, role="numeric", dtype="float") for n in added))
        contract = source.contract.model_copy(update={"columns": columns})
        write_file(private / CONTRACT, contract.to_json())
    return open_table(folder)


def _write_vectors(source: Table, fed: Table, features: NetworkFeatures, folder: Path) -> None:
    """Write what the networks say of every row, to be joined by row id.

    SPLIT.parquet has row_id, fold (null outside train), model, the one that says it, and vector,
    a list of float32 per row; rows are in the order of the table.
    """
    names = [name for name in fed.contract.features if name not in source.contract.features]
    folder.mkdir()
    for split in ("train", *PREDICTED_SPLITS):
        writer = None
        for batch in _fed_rows(source, fed, features, split, names):
            vector_BH = np.column_stack([batch[name].to_numpy() for name in names])
            rows = pa.table(
                {
                    ROW_ID: batch[ROW_ID],
                    FOLD: batch[FOLD],
                    "model": pa.array(["nn"] * batch.num_rows).dictionary_encode(),
                    "vector": pa.FixedSizeListArray.from_arrays(vector_BH.ravel(), len(names)),
                }
            )
            if writer is None:
                path = folder / f"{split}.parquet"
                writer = pq.ParquetWriter(path, rows.schema, compression="lz4")
            writer.write_table(rows)
        if writer is not None:
            writer.close()


def _fed_rows(
    source: Table, fed: Table, features: NetworkFeatures, split: str, names: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield ids, folds and features; trees are fed no test row, so the networks are asked."""
    if split != "test":
        for batch in fed.batches(split, [ROW_ID, FOLD, *names], batch_rows=_BATCH_ROWS):
            yield pa.Table.from_batches([batch])
        return
    asked = [ROW_ID, FOLD, *source.contract.features]
    for batch in source.batches(split, asked, batch_rows=_BATCH_ROWS):
        yield features.added_to(pa.Table.from_batches([batch]))
