"""The encoder: what train rows teach about a table, and the fixed-width arrays it makes of rows.

Fitted on the train split alone, in one pass and with memory for one batch: per numeric column the
mean, spread and quantiles, per category its labels. A value that train rows did not have gets the
code 0, a missing one the code 1, known labels count from 2 in the order of their text.

Which columns are inputs is the contract's word: role ``numeric`` or ``category``. A boolean is
what its role says: 0 and 1, or the labels "false" and "true". Dates and times are no inputs; the
SQL recipe can derive numbers from them. A column whose encoded train rows are all the same
(constant, all null, only rare labels) is left out and named with the reason.

Labels are compared by their canonical text (``label_text``), so 3, 3.0 and "3" are one label
whatever type a file happens to give the column. Labels that are too rare or beyond the cap share
code 0 with the unseen ones: in both cases train rows say too little about the value, and so the
model learns from real rows what code 0 means.

Infinite numbers, and those float32 cannot hold once standardised, count as missing; the fit and
the stage say how many there were.

Strings never become Python objects: each batch's dictionary (a handful of values) is looked up
once and its codes are remapped through that table. Cost of a row: near the cost of decoding it.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from headrace.data.layout import Buffers, Packed, RowLayout, row_layout
from headrace.data.parallel import in_order
from headrace.data.table import Span, Table
from headrace.errors import DataError, IntegrityError, SchemaError, nearest
from headrace.kernels.arrow import DICTIONARY, ColumnTable
from headrace.kernels.encode import KINDS, count_indices, fill_codes, fill_numeric, moments
from headrace.kernels.encode import scale as scale_column
from headrace.params import Section
from headrace.schema import (
    CONTRACT,
    FOLD,
    ROW_ID,
    Contract,
    Target,
    arrow_type,
    encode_target,
    label_text,
    read_contract,
)
from headrace.storage import canonical_json, digest_bytes, read_json, verify_file, write_file

ENCODER = "encoder.json"
QUANTILES = "encoder.safetensors"
UNKNOWN = 0  # a label that train rows did not have, or had too rarely
MISSING = 1  # null
FIRST_LABEL = 2

Rows: TypeAlias = pa.RecordBatch | pa.Table
Result = TypeVar("Result")
Floats: TypeAlias = npt.NDArray[np.float64]

_BATCH_BYTES = 32 << 20  # of float64 cells; fixed, because means are merged batch by batch
_LEAST_BATCH_ROWS = 4096
_NO_NULLS = np.empty(0, np.uint8)
_MAX_COUNTED_LABELS = 2_000_000  # a category with more is counted approximately


class EncodedBatch:
    """Rows as fixed-width arrays: B rows, N numeric inputs, C categories, T targets.

    Shapes: ``row_id`` (B,) int64; ``numeric`` (B, N) float32, standardised by train rows, NaN
    where missing; ``codes`` (B, C) unsigned, 0 unknown, 1 missing, from 2 the known labels;
    ``targets`` (B, T) float64, the value or the class code, NaN where missing; ``weight`` (B,)
    float32, NaN where missing; ``fold`` (B,) int8, -1 outside train.

    They are views of ``packed``, the same rows as ``layout`` lays them out; only numbers that are
    stored as float16 are copied, to float32.
    """

    def __init__(self, packed: Packed, layout: RowLayout) -> None:
        self.packed = packed
        self.layout = layout
        views = layout.split(packed)
        self.row_id: npt.NDArray[np.int64] = views["row_id"]
        self.numeric: npt.NDArray[np.float32] = views["numeric"].astype(np.float32, copy=False)
        self.codes: npt.NDArray[Any] = views["codes"]
        self.targets: npt.NDArray[np.float64] = views["targets"]
        self.weight: npt.NDArray[np.float32] = views["weight"]
        self.fold: npt.NDArray[np.int8] = views["fold"]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.packed)

    def where(self, rows: npt.NDArray[Any]) -> "EncodedBatch":
        """Return the rows that a mask or an index array names."""
        return EncodedBatch(self.packed[rows], self.layout)


class NumericScale(Section):
    """What train rows taught about one numeric input; ``std`` is 1 where it could be nothing."""

    name: str
    mean: float
    std: float
    low: float
    high: float
    num_missing: int
    num_infinite: int


class CategoryCodes(Section):
    """The labels of one category: ``labels[i]`` has the code ``i + 2``, ``counts[i]`` train rows.

    ``dtype`` is the Arrow type at the fit: later float values are first rounded to it.
    """

    name: str
    dtype: str
    labels: Annotated[tuple[str, ...], Field(strict=False)]
    counts: Annotated[tuple[int, ...], Field(strict=False)]
    num_missing: int
    num_rare_labels: int  # that share code 0 with unseen labels
    num_rare_rows: int

    @property
    def cardinality(self) -> int:
        """Number of codes, the two reserved ones included: an embedding needs this many rows."""
        return len(self.labels) + FIRST_LABEL


@dataclass(frozen=True)
class _Plan:
    """How the inputs lie in batches of one schema: K inputs, numeric ones first."""

    schema: pa.Schema
    present: frozenset[str]  # names of its columns
    is_converted: bool  # to columns of the inputs alone, in types that the kernels read
    places: npt.NDArray[np.int64]  # (K,) among the columns
    kinds: npt.NDArray[np.int64]  # (K,) of the values, or of the dictionary indices
    widths: npt.NDArray[np.int64]  # (K,) bytes of one


class _Held(threading.local):
    """What a thread keeps from batch to batch: how they lie, and tables of their dictionaries."""

    def __init__(self) -> None:
        self.plan: _Plan | None = None
        self.buffers: Buffers | None = None
        self.luts: dict[int, tuple[pa.Array, npt.NDArray[Any]]] = {}  # by the category's place
        self.keys: npt.NDArray[np.int64] | None = None  # (C, 5), where the dictionaries lie
        self.tables: npt.NDArray[Any] = np.empty(0, np.uint8)
        self.starts = np.zeros(1, np.int64)

    def follow(self, plan: _Plan) -> None:
        """Take another plan; tables of dictionaries of another type or place are forgotten."""
        self.plan, self.keys, self.luts = plan, None, {}


class _Fitted(Section):
    """The content of encoder.json."""

    format: Literal[1] = 1
    contract: str  # digest
    numeric: Annotated[tuple[NumericScale, ...], Field(strict=False)]
    categories: Annotated[tuple[CategoryCodes, ...], Field(strict=False)]
    dropped: dict[str, str]


class Encoder:
    """A fitted encoder; see ``fit_encoder``. Frozen in what it computes."""

    def __init__(
        self,
        contract: Contract,
        *,
        scales: tuple[NumericScale, ...],
        categories: tuple[CategoryCodes, ...],
        quantiles: npt.NDArray[np.float32],
        dropped: Mapping[str, str],
    ) -> None:
        self.contract = contract
        self.scales = scales
        self.categories = categories
        self.quantiles = quantiles  # (N, Q): per numeric input from its smallest to its largest
        self.dropped = dict(dropped)  # feature left out -> why
        self.codes_dtype = _narrowest([category.cardinality for category in categories])
        self._labels = [pa.array(category.labels, pa.string()) for category in categories]
        self._held = _Held()
        self._rates = np.array([(s.mean, 1 / s.std) for s in scales]).reshape(len(scales), 2)
        self._weight = contract.weight
        self.layout = row_layout(
            num_targets=len(contract.targets),
            num_numeric=len(scales),
            num_codes=len(categories),
            codes=self.codes_dtype.newbyteorder("<").str,
            numeric="<f4",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_held"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = _Held()

    @property
    def numeric(self) -> tuple[str, ...]:
        """Names of the numeric inputs, in the order of ``EncodedBatch.numeric``."""
        return tuple(scale.name for scale in self.scales)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of codes of each category, in the order of ``EncodedBatch.codes``."""
        return tuple(category.cardinality for category in self.categories)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, in the order of ``EncodedBatch.targets``."""
        return self.contract.targets

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the columns that rows must have."""
        return (*self.numeric, *(category.name for category in self.categories))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns of a table that ``transform`` reads."""
        weight = (self.contract.weight,) if self.contract.weight else ()
        targets = (target.name for target in self.targets)
        return tuple(dict.fromkeys((ROW_ID, FOLD, *self.inputs, *targets, *weight)))

    @property
    def digest(self) -> str:
        """Digest of all that was fitted."""
        return digest_bytes(self._to_json().encode() + self._to_tensors())

    def transform(self, rows: Rows) -> EncodedBatch:
        """Encode rows, in their order. Columns may come in any order, and more of them.

        Row id, fold, weight and targets may be absent, as at prediction: then they are the
        positions from 0, -1, 1 and NaN.

        Raises:
            SchemaError: if an input is missing (with the nearest name), comes twice or has a type
                that cannot be what the contract says; if a class is not among the target's labels;
                if a row id is no whole number that int64 holds, or a fold none that int8 holds.
        """
        return self.fill(rows, self.layout.empty(rows.num_rows))[0]

    def transform_reusing(self, rows: Rows) -> tuple[EncodedBatch, npt.NDArray[np.int64]]:
        """Do what ``fill`` does, in memory of a batch that is held no longer."""
        buffers = self._held.buffers
        if buffers is None:
            buffers = self._held.buffers = Buffers(self.layout)
        return self.fill(rows, buffers.take(rows.num_rows))

    def fill(self, rows: Rows, packed_BR: Packed) -> tuple[EncodedBatch, npt.NDArray[np.int64]]:
        """Encode rows into ``packed_BR``, which has ``layout``; see ``transform``.

        Returns the rows, and per numeric input how many of its numbers became NaN by it.
        """
        plan = self._held.plan
        if plan is None or not rows.schema.equals(plan.schema):
            plan = self._plan(rows.schema)
            self._held.follow(plan)
        num_rows = rows.num_rows
        batch = EncodedBatch(packed_BR, self.layout)
        present = plan.present
        batch.row_id[:] = _identity(rows) if ROW_ID in present else np.arange(num_rows)
        batch.fold[:] = _fold(rows) if FOLD in present else -1
        weight = self._weight
        batch.weight[:] = _weight(rows, weight) if weight in present else 1
        for j, target in enumerate(self.targets):
            batch.targets[:, j] = _target(rows, target) if target.name in present else np.nan
        num_infinite = np.zeros(len(self.scales), np.int64)
        start = 0
        for part in rows.to_batches() if isinstance(rows, pa.Table) else [rows]:
            stop = start + part.num_rows
            num_infinite += self._fill(
                part, plan, batch.numeric[start:stop], batch.codes[start:stop]
            )
            start = stop
        return batch, num_infinite

    def save(self, folder: Path) -> None:
        """Write encoder.json, encoder.safetensors and contract.json into ``folder``."""
        write_file(folder / ENCODER, self._to_json())
        write_file(folder / QUANTILES, self._to_tensors())
        write_file(folder / CONTRACT, self.contract.to_json())

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read what ``save`` wrote; the caller has checked the folder's digests.

        Raises:
            IntegrityError: if a file is missing, of another format, or of another contract.
        """
        contract = read_contract(folder)
        fitted = _read_fitted(folder / ENCODER)
        if fitted.contract != contract.digest:
            raise IntegrityError(
                f"{folder / ENCODER} was fitted for the contract {fitted.contract[:12]}, but "
                f"{CONTRACT} beside it is {contract.digest[:12]}; run `headrace repro`"
            )
        try:
            tensors = load_tensors((folder / QUANTILES).read_bytes())
            quantiles = tensors["quantiles"]
        except (FileNotFoundError, SafetensorError, KeyError) as error:
            raise IntegrityError(
                f"{folder / QUANTILES} is missing or not whole ({error}); run `headrace repro`"
            ) from error
        return cls(
            contract,
            scales=fitted.numeric,
            categories=fitted.categories,
            quantiles=quantiles,
            dropped=fitted.dropped,
        )

    def _to_json(self) -> str:
        fitted = _Fitted(
            contract=self.contract.digest,
            numeric=self.scales,
            categories=self.categories,
            dropped=self.dropped,
        )
        return canonical_json(fitted.model_dump(mode="json"))

    def _to_tensors(self) -> bytes:
        return save_tensors({"quantiles": np.ascontiguousarray(self.quantiles)})

    def _require_inputs(self, schema: pa.Schema) -> None:
        present = schema.names
        missing = [name for name in self.inputs if name not in present]
        if missing:
            near = "".join(nearest(name, present) for name in missing[:1])
            raise SchemaError(
                f"the rows lack the columns {missing}, which the encoder was fitted on{near}"
            )
        twice = [name for name in self.columns if present.count(name) > 1]
        if twice:
            raise SchemaError(
                f"the rows have the columns {twice} more than once; keep one of each name"
            )
        _refuse_types(schema, self.numeric, [category.name for category in self.categories])

    def _fill(
        self,
        part: pa.RecordBatch,
        plan: "_Plan",
        out_BN: npt.NDArray[np.float32],
        out_BC: npt.NDArray[Any],
    ) -> npt.NDArray[np.int64]:
        """Write numbers and codes of ``part``; return how many of each input became NaN."""
        num_outside = np.zeros(len(self.scales), np.int64)
        if plan.is_converted:
            part = pa.RecordBatch.from_arrays(
                [
                    *(_plain(part.column(scale.name)) for scale in self.scales),
                    *(_dictionary(part.column(category.name)) for category in self.categories),
                ],
                names=self.inputs,
            )
        columns = ColumnTable(part, plan.places)
        num_numeric = len(self.scales)
        fill_numeric(
            columns.table[:num_numeric],
            plan.kinds[:num_numeric],
            plan.widths[:num_numeric],
            self._rates,
            out_BN,
            num_outside,
        )
        tables, starts = self._tables(part, plan, columns.table[num_numeric:])
        fill_codes(
            columns.table[num_numeric:],
            plan.kinds[num_numeric:],
            plan.widths[num_numeric:],
            tables,
            starts,
            out_BC,
        )
        return num_outside

    def _plan(self, schema: pa.Schema) -> "_Plan":
        """Say how the inputs lie in batches of ``schema``, and whether they must be converted."""
        self._require_inputs(schema)
        places = np.array([schema.get_field_index(name) for name in self.inputs], np.int64)
        types = [schema.field(place).type for place in places.tolist()]
        numbers, categories = types[: len(self.scales)], types[len(self.scales) :]
        is_converted = any(str(kind) not in KINDS for kind in numbers) or not all(
            pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)
            for kind in categories
        )
        if is_converted:
            places = np.arange(len(types), dtype=np.int64)
            empty = schema.empty_table()
            numbers = [_plain(_whole(empty.column(scale.name))).type for scale in self.scales]
            categories = [
                _dictionary(_whole(empty.column(category.name))).type
                for category in self.categories
            ]
        names = [str(kind) for kind in (*numbers, *(kind.index_type for kind in categories))]
        kinds = np.array([KINDS[name] for name in names], np.int64)
        widths = [pa.type_for_alias(name).bit_width // 8 for name in names]
        present = frozenset(schema.names)
        return _Plan(schema, present, is_converted, places, kinds, np.array(widths, np.int64))

    def _tables(
        self, part: pa.RecordBatch, plan: "_Plan", columns_CF: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Return the look-up tables of the batch's dictionaries, and where each begins."""
        held = self._held
        keys_C5 = columns_CF[:, DICTIONARY:]
        if held.keys is not None and np.array_equal(held.keys, keys_C5):
            return held.tables, held.starts
        known, held.keys = held.keys, None  # an error on the way leaves no key of what is replaced
        for j, place in enumerate(plan.places[len(self.scales) :].tolist()):
            # Holding the dictionary keeps its memory from being reused, so the same address is the
            # same content. Arrow's reader repeats a row group's dictionary in each batch.
            if known is None or not np.array_equal(known[j], keys_C5[j]):
                dictionary = part.column(place).dictionary
                if j not in held.luts or not dictionary.equals(held.luts[j][0]):
                    held.luts[j] = (dictionary, self._lut(j, dictionary))
                else:
                    held.luts[j] = (dictionary, held.luts[j][1])
        parts = [held.luts[j][1] for j in range(len(self.categories))]
        held.keys = keys_C5.copy()
        held.starts = np.array([0, *accumulate(len(lut) for lut in parts)], np.int64)
        held.tables = np.concatenate([np.empty(0, self.codes_dtype), *parts])
        return held.tables, held.starts

    def _lut(self, j: int, dictionary: pa.Array) -> npt.NDArray[Any]:
        """Return the codes of a dictionary's values, and after them that of null."""
        text = label_text(_rounded_as_fitted(dictionary, self.categories[j].dtype))
        found = pc.index_in(text, value_set=self._labels[j])
        codes = pc.fill_null(pc.add(found, FIRST_LABEL), UNKNOWN)
        codes = pc.if_else(pc.is_valid(text), codes, MISSING)
        return np.append(codes.to_numpy(zero_copy_only=False), MISSING).astype(self.codes_dtype)


def open_encoder(folder: Path) -> Encoder:
    """Check the digests of an encoder beside its manifest, as ``encode`` wrote it, and read it.

    Raises:
        IntegrityError: if a file is missing, changed, of another format or of another contract.
    """
    for name in (ENCODER, QUANTILES, CONTRACT):
        verify_file(folder, name)
    return Encoder.load(folder)


def fit_encoder(
    table: Table,
    *,
    max_categories: int,
    min_count: int,
    num_quantiles: int,
    quantile_rows: int,
    seed: int,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Encoder:
    """Fit an encoder on the train rows of ``table``; other splits are not read.

    Per category the ``max_categories`` most frequent labels with at least ``min_count`` rows are
    known. Quantiles come from ``quantile_rows`` train rows drawn with ``seed``. ``progress``
    hears the number of rows read so far. No bit depends on ``threads``.

    Raises:
        SchemaError: if an input has a type that its role does not allow.
        DataError: if there are no train rows, or no column carries anything.
    """
    contract = table.contract
    names, categories = contract.named("numeric"), contract.named("category")
    num_rows = table.num_rows("train")
    if num_rows == 0:
        raise DataError(f"{table.folder} has no train rows; change `extract.split`")
    found = {name: _Moments() for name in names}
    counts = {
        name: _LabelCounts(max(_MAX_COUNTED_LABELS, 4 * max_categories)) for name in categories
    }
    sample = _Sample(num_rows, quantile_rows, names, seed=seed)
    done = 0
    columns = [*names, *categories]

    def seen(batch: pa.RecordBatch) -> _Seen:
        _refuse_types(batch.schema, names, categories)
        return _see(batch, names, categories)

    for seen_of in encode_batches(table, "train", columns, seen, threads=threads):
        for name in names:
            x_B, valid, first, of_batch = seen_of.numbers[name]
            found[name].add(seen_of.num_rows, of_batch)
            sample.add(name, x_B, valid, first, start=done)
        for name in categories:
            counts[name].add(seen_of.num_rows, *seen_of.labels[name])
        done += seen_of.num_rows
        if progress:
            progress(done)
    dropped: dict[str, str] = {}
    scales, known = [], []
    for name in names:
        if reason := found[name].useless():
            dropped[name] = reason
        else:
            scales.append(found[name].scale(name))
    for name in categories:
        codes = counts[name].codes(
            name, contract.column(name).dtype, max_categories=max_categories, min_count=min_count
        )
        if reason := _useless(codes, min_count):
            dropped[name] = reason
        else:
            known.append(codes)
    if not scales and not known:
        raise DataError(
            f"{table.folder}: no column of role numeric or category is left to learn from; "
            f"left out: {dropped or 'none'}. Give columns a role in `extract`"
        )
    return Encoder(
        contract,
        scales=tuple(scales),
        categories=tuple(known),
        quantiles=sample.quantiles(scales, num_quantiles),
        dropped=dropped,
    )


def encode_batches(
    table: Table,
    split: str,
    columns: Sequence[str],
    work: Callable[[pa.RecordBatch], Result],
    *,
    threads: int,
) -> Iterator[Result]:
    """Yield what ``work`` makes of each batch of a split, in row order, computed in threads.

    Batches are cut by the width of a row and the file's row groups alone.
    """
    batch_rows = min(65_536, max(_LEAST_BATCH_ROWS, _BATCH_BYTES // (max(1, len(columns)) * 8)))
    dictionaries = [name for name in table.contract.named("category") if name in columns]

    def of_span(span: Span) -> Iterator[Result]:
        for batch in span.batches(columns, batch_rows=batch_rows, dictionaries=dictionaries):
            yield work(batch)

    yield from in_order(table.spans(split, columns, span_rows=batch_rows), of_span, threads=threads)


@dataclass(frozen=True)
class _Seen:
    """What one batch teaches; numbers as Arrow's own buffers, for the sample."""

    num_rows: int
    numbers: dict[str, tuple[npt.NDArray[Any], npt.NDArray[np.uint8], int, "_BatchMoments"]]
    labels: dict[str, tuple[pa.Array, npt.NDArray[np.int64]]]


def _see(batch: pa.RecordBatch, names: Sequence[str], categories: Sequence[str]) -> _Seen:
    numbers = {}
    for name in names:
        x_B, valid, first = _buffers(_plain(batch.column(name)))
        numbers[name] = (x_B, valid, first, moments(x_B, valid, first))
    labels = {name: _label_counts(_dictionary(batch.column(name))) for name in categories}
    return _Seen(batch.num_rows, numbers, labels)


def _label_counts(values: pa.DictionaryArray) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Return the labels that come in a batch and how often; null is not among them."""
    index_B, valid, first = _buffers(values.indices)
    size = len(values.dictionary)
    found = count_indices(index_B, valid, first, size)
    text = label_text(values.dictionary)
    keep = ~pc.is_null(text).to_numpy(zero_copy_only=False) & (found > 0)
    return text.filter(pa.array(keep)), found[keep]


_BatchMoments: TypeAlias = tuple[int, int, float, float, float, float]


class _Moments:
    """Count, mean and spread of one column, merged batch by batch (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.num_finite = 0
        self.num_infinite = 0
        self.mean = 0.0
        self.squares = 0.0  # sum of squared distances from the mean
        self.low = math.inf
        self.high = -math.inf

    def add(self, num_rows: int, found: _BatchMoments) -> None:
        """Take in one batch: its rows, and what ``moments`` returned of them."""
        count, num_infinite, batch_mean, squares, low, high = found
        self.num_rows += num_rows
        self.num_infinite += num_infinite
        if count == 0:
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        total = self.num_finite + count
        shift = batch_mean - self.mean
        self.mean += shift * (count / total)
        self.squares += squares + shift * shift * (self.num_finite * count / total)
        self.num_finite = total

    @property
    def num_missing(self) -> int:
        return self.num_rows - self.num_finite

    def useless(self) -> str:
        """Return why the column carries nothing for a model, or an empty text."""
        if self.num_finite == 0:
            return "no value in the train rows is a finite number"
        if self.low == self.high:
            return "" if self.num_missing else f"constant: all train rows are {self.low:g}"
        if not math.isfinite(self._std()) or self._std() == 0:
            return f"values from {self.low:g} to {self.high:g} are beyond float64 arithmetic"
        return ""

    def scale(self, name: str) -> NumericScale:
        is_constant = self.low == self.high  # with nulls, which then are the information
        return NumericScale(
            name=name,
            mean=self.low if is_constant else self.mean,
            std=1.0 if is_constant else self._std(),
            low=self.low,
            high=self.high,
            num_missing=self.num_missing - self.num_infinite,
            num_infinite=self.num_infinite,
        )

    def _std(self) -> float:
        return math.sqrt(self.squares / self.num_finite) if self.squares >= 0 else math.nan


@dataclass
class _LabelCounts:
    """How often each label of one category came.

    Beyond ``limit`` labels the rarer half is forgotten: a label kept then may be counted too low,
    by no more than the rows it had when it was forgotten.
    """

    limit: int
    num_missing: int = 0
    num_rows: int = 0
    labels: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pending: list[tuple[pa.Array, npt.NDArray[np.int64]]] = field(default_factory=list)
    num_pending: int = 0
    num_forgotten_labels: int = 0

    def add(self, num_rows: int, labels: pa.Array, counts: npt.NDArray[np.int64]) -> None:
        """Take in one batch: its rows, its labels, and how often each came."""
        self.num_rows += num_rows
        self.num_missing += num_rows - int(counts.sum())
        self.pending.append((labels, counts))
        self.num_pending += len(labels)
        # Merged only once there is as much to merge as there is already: cost stays linear.
        if self.num_pending > max(65_536, len(self.labels)):
            self._merge()

    def codes(self, name: str, dtype: str, *, max_categories: int, min_count: int) -> CategoryCodes:
        """Return the codes: the most frequent labels, ties by text, in the order of their text."""
        self._merge()
        frequent = np.flatnonzero(self.counts >= min_count)
        by_count = frequent[np.argsort(-self.counts[frequent], kind="stable")]
        kept = np.sort(by_count[:max_categories])  # labels are sorted by text
        num_known = int(self.counts[kept].sum())
        return CategoryCodes(
            name=name,
            dtype=dtype,
            labels=tuple(self.labels.take(pa.array(kept)).to_pylist()),
            counts=tuple(self.counts[kept].tolist()),
            num_missing=self.num_missing,
            num_rare_labels=len(self.labels) - len(kept) + self.num_forgotten_labels,
            num_rare_rows=self.num_rows - self.num_missing - num_known,
        )

    def _merge(self) -> None:
        labels = pa.chunked_array([self.labels, *(part for part, _ in self.pending)], pa.string())
        counts = np.concatenate([self.counts, *(part for _, part in self.pending)])
        # One thread: the groups' order is sorted away, the sums are whole numbers.
        groups = pa.table({"label": labels, "count": pa.array(counts)}).group_by(
            "label", use_threads=False
        )
        merged = groups.aggregate([("count", "sum")]).sort_by("label")
        self.labels = merged["label"].combine_chunks()
        self.counts = merged["count_sum"].to_numpy()
        self.pending, self.num_pending = [], 0
        if len(self.labels) > self.limit:
            kept = np.sort(np.argsort(-self.counts, kind="stable")[: self.limit // 2])
            self.num_forgotten_labels += len(self.labels) - len(kept)
            self.labels, self.counts = self.labels.take(pa.array(kept)), self.counts[kept]


class _Sample:
    """The same seeded train rows of every numeric column, for quantiles."""

    def __init__(self, num_rows: int, size: int, names: tuple[str, ...], *, seed: int) -> None:
        size = min(size, num_rows)
        rng = np.random.default_rng(seed)
        self._rows = np.sort(rng.choice(num_rows, size=size, replace=False, shuffle=False))
        self._values = {name: np.empty(size) for name in names}

    def add(
        self,
        name: str,
        x_B: npt.NDArray[Any],
        valid: npt.NDArray[np.uint8],
        first_bit: int,
        *,
        start: int,
    ) -> None:
        """Keep the drawn rows of a batch that begins at row ``start``."""
        first, stop = np.searchsorted(self._rows, [start, start + len(x_B)])
        rows = self._rows[first:stop] - start
        taken = x_B[rows].astype(np.float64)
        if len(valid):
            bits = rows + first_bit
            taken[(valid[bits >> 3] >> (bits & 7)) & 1 == 0] = np.nan
        self._values[name][first:stop] = taken

    def quantiles(self, scales: list[NumericScale], num_quantiles: int) -> npt.NDArray[np.float32]:
        """Return standardised quantiles (N, Q), from the exact smallest to the exact largest."""
        steps = np.linspace(0.0, 1.0, num_quantiles)
        out_NQ = np.empty((len(scales), num_quantiles), np.float32)
        for j, scale in enumerate(scales):
            values = self._values[scale.name]
            finite = values[np.isfinite(values)]
            knots = np.quantile(finite if len(finite) else [scale.low, scale.high], steps)
            knots[[0, -1]] = scale.low, scale.high
            scale_column(knots, scale.mean, 1 / scale.std, out_NQ[j])
        return out_NQ


def _useless(codes: CategoryCodes, min_count: int) -> str:
    if codes.num_missing and (codes.labels or codes.num_rare_rows):
        return ""
    if codes.num_missing:
        return "all train rows are null"
    if not codes.labels:
        return f"every label is rare: none comes in {min_count} train rows or more"
    if len(codes.labels) == 1 and not codes.num_rare_rows:
        return f"constant: all train rows are {codes.labels[0]!r}"
    return ""


def _refuse_types(
    schema: pa.Schema, numeric: tuple[str, ...], categories: tuple[str, ...] | list[str]
) -> None:
    faults = [
        f"{name} has type {schema.field(name).type} but role numeric"
        for name in numeric
        if not _is_number(schema.field(name).type)
    ]
    faults += [
        f"{name} has type {schema.field(name).type} but role category"
        for name in categories
        if pa.types.is_nested(schema.field(name).type) or _is_binary(schema.field(name).type)
    ]
    if faults:
        raise SchemaError(
            f"these columns cannot be encoded: {'; '.join(faults)}. Give them another role, or "
            f"derive a number or a text from them in the SQL recipe"
        )


def _is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(test(kind) for test in tests) or bool(pa.types.is_null(kind))


def _is_binary(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_binary(value)
        or pa.types.is_large_binary(value)
        or pa.types.is_fixed_size_binary(value)
    )


def _numbers(values: pa.Array) -> npt.NDArray[Any]:
    """Return numbers as NumPy sees them, NaN where null; no copy where there is no null."""
    numbers: npt.NDArray[Any] = _plain(values).to_numpy(zero_copy_only=False)
    return numbers


def _plain(values: pa.Array) -> pa.Array:
    """Return numbers in a type whose values lie in memory as NumPy has them."""
    kind = values.type
    if pa.types.is_boolean(kind):
        return values.cast(pa.uint8())
    if pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return values.cast(pa.float64())
    return values.cast(pa.float32()) if pa.types.is_float16(kind) else values


def _buffers(values: pa.Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8], int]:
    """Return the numbers of an Arrow array, its validity bits, and which bit is the first row's."""
    valid, data = values.buffers()
    dtype = np.dtype(values.type.to_pandas_dtype())
    x_B = (
        np.frombuffer(data, dtype, len(values), values.offset * dtype.itemsize)
        if data
        else (np.zeros(len(values), dtype))
    )
    if not values.null_count:
        return x_B, _NO_NULLS, 0
    return x_B, np.frombuffer(valid, np.uint8), values.offset


def _dictionary(values: pa.Array) -> pa.DictionaryArray:
    kind = values.type
    if pa.types.is_dictionary(kind):
        return values
    if pa.types.is_float16(kind):  # Arrow cannot hash it
        values = values.cast(pa.float32())
    elif pa.types.is_null(kind):
        values = values.cast(pa.string())
    return values.dictionary_encode()


def _rounded_as_fitted(values: pa.Array, fitted_dtype: str) -> pa.Array:
    """Round floats to the narrower float type of the fit: 0.1 is then the same label in both."""
    kind = arrow_type(fitted_dtype)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_floating(kind) and pa.types.is_floating(values.type)):
        return values
    return values.cast(kind, safe=False) if kind.bit_width < values.type.bit_width else values


def _target(rows: Rows, target: Target) -> Floats:
    values = encode_target(rows.column(target.name), target)
    is_beyond = np.abs(values) > np.finfo(np.float32).max  # losses are float32
    return np.where(is_beyond, np.inf, values) if is_beyond.any() else values


def _weight(rows: Rows, name: str) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return _numbers(_whole(rows.column(name))).astype(np.float32)


def _identity(rows: Rows) -> npt.NDArray[np.int64]:
    values = _whole(rows.column(ROW_ID))
    if not pa.types.is_integer(values.type):
        raise _unusable(ROW_ID, f"type {values.type}", "a whole number in every row, as int64")
    if values.null_count:
        place = pc.index(pc.is_null(values), True).as_py()
        raise _unusable(ROW_ID, f"no value in row {place}", "a whole number in every row")
    try:
        row_id: npt.NDArray[np.int64] = values.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        largest = pc.max(values).as_py()
        raise _unusable(ROW_ID, f"the value {largest}", "numbers that int64 holds") from error
    return row_id


def _fold(rows: Rows) -> npt.NDArray[np.int8]:
    values = _whole(rows.column(FOLD))
    wanted = "whole numbers from -128 to 127, or null outside train"
    if not _is_number(values.type):
        raise _unusable(FOLD, f"type {values.type}", wanted)
    try:
        fold = _plain(values).cast(pa.int8())
    except pa.ArrowInvalid as error:
        known = {None, *range(-128, 128)}
        value = next(value for value in values.to_pylist() if value not in known)
        raise _unusable(FOLD, f"the value {value}", wanted) from error
    return np.array(fold.fill_null(-1).to_numpy(zero_copy_only=False), np.int8)


def _unusable(name: str, found: str, wanted: str) -> SchemaError:
    return SchemaError(
        f"the column {name} has {found}, but must have {wanted}; cast it, or leave it out"
    )


def _whole(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _narrowest(cardinalities: list[int]) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds every code."""
    return np.min_scalar_type(max(cardinalities, default=1) - 1)


def _read_fitted(path: Path) -> _Fitted:
    content = read_json(path)
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != 1:
        raise IntegrityError(
            f"{path} has encoder format {found}; this headrace reads format 1: "
            f"run `headrace upgrade`, then `headrace repro`"
        )
    try:
        return _Fitted.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(f"{path} is not a fitted encoder ({error})") from error
