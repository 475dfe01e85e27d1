"""Shards on disk: what was written comes back, damage is named, opening reads no rows."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from headrace.data.encoder import Encoder
from headrace.data.shards import SHARDS, ShardWriter, open_shards
from headrace.data.table import open_table
from headrace.errors import IntegrityError, SchemaError
from tests.encode_tables import encode_example


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder, _, _ = encode_example(tmp_path_factory.mktemp("shards"), num_train=500)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "encode")
    return tmp_path / "encode"


def as_encoded(folder, split="train"):
    """Encode the rows of a split again, all at once."""
    encoder = Encoder.load(folder)
    table = open_table(folder.parent / "reduce")
    return encoder.transform(table.read(split, list(encoder.columns)))


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True)
        for name in ("numeric", "targets", "weight", "row_id", "codes", "fold")
    )


def test_shards_hold_the_encoded_rows_in_order(pristine):
    shards = open_shards(pristine, "train")

    assert len(shards.sizes) == 9
    assert shards.num_rows == 500
    assert same(shards.slice(0, 500), as_encoded(pristine))
    assert shards.numeric == ("distance", "seats", "is_weekend")
    assert shards.categories == ("carrier", "gate")
    assert shards.targets == ("delay", "late")
    assert shards.cardinalities == (5, 10)


def test_rows_are_taken_over_shards_in_the_order_asked_for(pristine):
    shards = open_shards(pristine, "train")
    rows = np.random.default_rng(0).integers(0, 500, 300)

    assert same(shards.take(rows), as_encoded(pristine).where(rows))
    assert same(shards.take(rows[:1]), as_encoded(pristine).where(rows[:1]))
    assert len(shards.take(rows[:0])) == 0
    assert shards.read("row_id").tolist() == list(range(500))


def test_rows_outside_the_split_are_refused(pristine):
    shards = open_shards(pristine, "valid")

    with pytest.raises(IndexError, match=r"rows must be in 0\.\.59 of valid"):
        shards.take(np.array([60]))
    with pytest.raises(IndexError, match=r"are not in 0\.\.60 of valid"):
        shards.slice(50, 61)
    with pytest.raises(SchemaError, match="no field 'row'; nearest name: row_id"):
        shards.read("row")


def test_what_is_handed_out_is_a_copy(pristine):
    """Writing into a batch changes neither the file nor what is read next."""
    shards = open_shards(pristine, "train")
    for batch in (shards.slice(0, 10), shards.take(np.arange(10))):
        batch.numeric[:] = 7

    assert same(shards.slice(0, 500), as_encoded(pristine))


def test_batches_of_any_length_make_the_same_shards(pristine, tmp_path):
    """The shards depend on the rows alone, not on how they came."""
    shards = open_shards(pristine, "train")
    for lengths in (1, 7, 500):
        with ShardWriter(
            tmp_path / str(lengths), shards.schema, shard_bytes=4000, num_rows=520
        ) as writer:
            for first in range(0, 500, lengths):
                writer.append(shards.slice(first, min(500, first + lengths)))
        assert tuple(writer.sizes) == shards.sizes
        for path in sorted((pristine / "train").rglob("*.*")):
            copy = tmp_path / str(lengths) / path.relative_to(pristine / "train")
            assert copy.read_bytes() == path.read_bytes()


def test_a_split_without_rows_opens_empty(folder, tmp_path):
    encoded, _, _ = encode_example(tmp_path / "large", num_train=30, shard_bytes=1 << 20)
    assert open_shards(encoded, "valid").sizes == (60,)

    with pytest.raises(SchemaError, match="no split 'tests'; nearest name: test"):
        open_shards(folder, "tests")
    with pytest.raises(SchemaError, match="no split 'gap'"):
        open_shards(folder, "gap")


def test_a_flipped_bit_is_named_when_it_is_touched(folder):
    """Other shards can be read; the damaged one names the file and the block."""
    path = folder / "train" / "shard-00002" / "rows.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    shards = open_shards(folder, "train")
    size = shards.sizes[0]

    assert len(shards.slice(0, 2 * size)) == 2 * size
    with pytest.raises(IntegrityError, match=r"shard-00002/rows\.bin is damaged: block 0"):
        shards.take(np.array([2 * size + 5]))
    with pytest.raises(IntegrityError, match=r"rows\.bin has another digest"):
        open_shards(folder, "train", verify=True)


def test_blocks_are_checked_where_they_are_touched(tmp_path):
    """In a file of several blocks, rows of sound blocks are read, those of a bad one refused."""
    folder, _, _ = encode_example(tmp_path, num_train=200_000, shard_bytes=1 << 30)
    path = folder / "train" / "shard-00000" / "rows.bin"
    data = bytearray(path.read_bytes())
    assert len(data) > 2 << 20
    data[(1 << 20) + 100] ^= 1
    path.write_bytes(data)
    shards = open_shards(folder, "train")
    width = shards.schema.rows.row_bytes
    row_of_second_block = (1 << 20) // width
    assert (1 << 20) % width, "a row should lie across blocks"

    shards.take(np.array([0, 199_999]))
    with pytest.raises(IntegrityError, match="block 1 "):
        shards.take(np.array([row_of_second_block]))
    with pytest.raises(IntegrityError, match="block 1 "):
        shards.slice(row_of_second_block - 10, row_of_second_block + 10)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "rows.bin has .* bytes instead"),
        (lambda path: path.unlink(), "rows.bin is missing"),
        (lambda path: shutil.rmtree(path.parent), r"rows.bin is missing; .*fold.i1 is missing"),
    ],
    ids=["truncated", "no file", "no shard"],
)
def test_an_incomplete_shard_is_refused_at_opening(folder, damage, message):
    damage(folder / "train" / "shard-00001" / "rows.bin")

    with pytest.raises(IntegrityError, match=message):
        open_shards(folder, "train")
    assert open_shards(folder, "valid").num_rows == 60


def test_another_format_is_refused(folder):
    content = json.loads((folder / SHARDS).read_text())
    (folder / SHARDS).write_text(json.dumps(content | {"format": 1}))

    with pytest.raises(IntegrityError, match=r"shard format 1; this headrace reads format 2"):
        open_shards(folder, "train")


def test_a_changed_schema_is_refused(folder):
    content = json.loads((folder / SHARDS).read_text())
    (folder / SHARDS).write_text(json.dumps(content | {"numeric": ["a", "b", "c"]}))

    with pytest.raises(IntegrityError, match="is not the file its manifest lists"):
        open_shards(folder, "train")


def test_another_contract_is_refused(folder):
    digest = Encoder.load(folder).contract.digest

    assert open_shards(folder, "train", contract_digest=digest).num_rows == 500
    with pytest.raises(IntegrityError, match="the reader was made for ffffffffffff"):
        open_shards(folder, "train", contract_digest="f" * 64)


def test_a_folder_that_is_not_whole_is_refused(folder, tmp_path):
    (folder / "manifest.json").unlink()

    with pytest.raises(IntegrityError, match="was not written to its end"):
        open_shards(folder, "train")
    with pytest.raises(IntegrityError, match="does not exist; run `headrace repro`"):
        open_shards(tmp_path / "nowhere", "train")


def test_the_documented_way_reads_the_rows(pristine, monkeypatch):
    """The Python of docs/shards.md, as it stands there, needs no headrace."""
    text = (Path(__file__).parents[1] / "docs" / "shards.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    (pristine.parent / "data").mkdir()
    (pristine.parent / "data" / "encode").symlink_to(pristine)
    monkeypatch.chdir(pristine.parent)
    names = {}
    exec(code, names)
    rows = open_shards(pristine, "train").slice(0, len(names["shard"]))

    for name in ("row_id", "numeric", "codes", "targets", "weight", "fold"):
        assert np.array_equal(names["shard"][name], getattr(rows, name), equal_nan=name != "codes")


def test_threads_may_share_one_reader(pristine):
    """Also while it is being opened: all of them get the rows they ask for."""
    expected = as_encoded(pristine)
    rows = np.random.default_rng(0).integers(0, 500, (8, 50))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            shards = open_shards(pristine, "train")
            for wanted, found in zip(rows, pool.map(shards.take, rows), strict=True):
                assert same(found, expected.where(wanted))
