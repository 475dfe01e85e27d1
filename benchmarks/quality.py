"""Do the default models reach published tables? One row per claim, means of three seeds.

Data: California housing (HEADRACE_SHARED_DATA, default ../shared/data) and Adult (examples/adult),
with the splits of the published tables. Rows named *alone* follow their protocol: one model, early
stopping on valid rows. Everything else is the default: a bag over five folds, stopped on an inner
part of train, stacked by out-of-fold predictions. ``--quick`` is one seed. Fitted models are kept
below HEADRACE_BENCHMARK_DATA and made again only if data, parameters or code change; two are
fitted at a time. ``--only TEXT`` keeps the questions whose name has TEXT.
"""

import argparse
import functools
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks._folders import told
from benchmarks._published import Case
from benchmarks.harness import Row, report
from headrace.data.predictions import read_predictions, write_predictions
from headrace.data.table import open_table
from headrace.data.truth import line_up, read_truth
from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Scored,
    Units,
    bootstrap,
    difference,
    interval,
)
from headrace.evaluation.metrics import MetricName, Sample, metric_of, score
from headrace.lineage import code_digest, stage_modules
from headrace.models.embedding_catboost import EmbeddingCatboostParams
from headrace.models.protocol import model_section
from headrace.schema import Target
from headrace.stages.embedding_catboost import embedding_catboost
from headrace.stages.stack import StackParams, stack
from headrace.stages.train import train
from headrace.storage import canonical_json, digest_bytes, new_folder, read_json, write_json

ALONE = {"bag": "none", "stop_rows": "valid"}
MEMBERS = ("catboost", "nn")
RESAMPLING = Resampling(num_resamples=1000, confidence=0.95, seed=0, threads=1)


@dataclass(frozen=True)
class Fit:
    """One run of the stage ``train``: a kind on a case with params and a seed."""

    case: Case
    kind: str
    seed: int
    params: Mapping[str, Any] = field(default_factory=dict)
    network: "Fit | None" = None  # whose features embedding_catboost gets

    @property
    def out(self) -> Path:
        """Its folder, named by all that it depends on."""
        stage = self.kind if self.network else f"train@{self.kind}"
        text = canonical_json(
            {
                "params": self.section.model_dump(mode="json"),
                "table": open_table(self.case.table).digest,
                "code": code_digest(*stage_modules(stage)),
                "network": self.network.out.name if self.network else None,
            }
        )
        return self.case.folder / f"train-{self.kind}-{digest_bytes(text.encode())[:12]}"

    @property
    def section(self) -> Any:
        """Its section of params.yaml."""
        kind = EmbeddingCatboostParams if self.network else model_section(self.kind)
        return kind.model_validate({"seed": self.seed, **self.params})

    @property
    def seconds(self) -> float:
        """CPU seconds that it took."""
        return float(read_json(self.out.with_suffix(".json"))["cpu_s"])


def run_fit(fit: Fit) -> None:
    """Fit and predict, unless that is done."""
    if fit.out.with_suffix(".json").exists():
        return
    began = time.process_time()
    places = {
        "cache": fit.case.folder / "cache" / str(os.getpid()),
        "checkpoints": fit.out.with_suffix(".checkpoints"),
    }
    case, section = fit.case, fit.section
    if fit.network is not None:
        embedding_catboost(
            case.table, case.encoded, fit.network.out, fit.out, section, **places, **told()
        )
    else:
        train(case.table, case.encoded, fit.out, section, model=fit.kind, **places, **told())
    write_json(fit.out.with_suffix(".json"), {"cpu_s": time.process_time() - began})


@dataclass(frozen=True)
class Judged:
    """Predictions of the test rows of one target."""

    sample: Sample

    def value(self, metric: MetricName) -> float:
        """The metric's point value."""
        return score(metric, self.sample)

    def interval(self, metric: MetricName) -> Interval:
        """The metric's 95 % interval."""
        found = self.resampled(metric)
        return interval(found.points[metric], found.resamples[metric], self.units, RESAMPLING)

    def minus(self, other: "Judged", metric: MetricName) -> Interval:
        """The paired difference of the metric, with its interval."""
        ours, theirs = self.resampled(metric), other.resampled(metric)
        return difference(metric, ours, theirs, self.units, RESAMPLING)

    @property
    def units(self) -> Units:
        num_rows = len(self.sample.truth)
        return Units("row", np.arange(num_rows), num_rows)

    def resampled(self, metric: MetricName) -> Scored:
        return bootstrap(self.sample, self.units, RESAMPLING, threshold=0.5, only=metric)


def judged(case: Case, folder: Path, target_name: str) -> Judged:
    """Read the predictions in ``folder`` of the test rows of ``case``."""
    table = open_table(case.table)
    target = _target(case, target_name)
    truth = read_truth(table, "test", unit="row", key="benchmark")
    is_labelled = ~np.isnan(truth.labels[target.name])
    found = read_predictions(folder, target).of_split("test")
    values = found.values[line_up(found, truth, is_labelled)]
    return Judged(Sample(target.task, truth.labels[target.name][is_labelled], values, None))


def mean_row(
    figure: str,
    found: Sequence[Judged],
    metric: MetricName,
    *,
    must: float,
    goal: float | None = None,
    reference: str,
) -> Row:
    """The mean of a metric over seeds, beside the published figure and one interval."""
    values = [one.value(metric) for one in found]
    bounds = found[0].interval(metric)
    told_values = " ".join(f"{value:.4f}" for value in values)
    return Row(
        figure,
        statistics.mean(values),
        metric,
        must,
        goal,
        metric_of(found[0].sample.task, metric).higher_is_better,
        f"{reference}; seeds {told_values}; 95 % [{bounds.low:.4f}, {bounds.high:.4f}]",
    )


def worst_gain_row(
    figure: str,
    pairs: Sequence[tuple[Judged, Judged]],
    metric: MetricName,
    *,
    must: float | None,
    goal: float | None = None,
    reference: str,
    bound: Literal["low", "high"] = "high",
) -> Row:
    """A bound of the paired interval of a loss, ours minus theirs: the worst over the seeds."""
    changes = [ours.minus(theirs, metric) for ours, theirs in pairs]
    told_changes = "; ".join(f"{c.value:+.4f} [{c.low:+.4f}, {c.high:+.4f}]" for c in changes)
    worst = max(float(getattr(change, bound) or 0) for change in changes)
    return Row(figure, worst, metric, must, goal, False, f"{reference}; {told_changes}")


def mean_gain_row(
    figure: str,
    pairs: Sequence[tuple[Judged, Judged]],
    metric: MetricName,
    *,
    must: float | None,
    reference: str,
) -> Row:
    """The upper bound of the paired interval of a loss, ours minus theirs, mean of the seeds.

    The seeds are judged on the same rows, so resample by resample their differences are averaged.
    """
    scored = [(ours.resampled(metric), theirs.resampled(metric)) for ours, theirs in pairs]
    value = statistics.mean(o.points[metric] - t.points[metric] for o, t in scored)
    resamples = np.mean([o.resamples[metric] - t.resamples[metric] for o, t in scored], axis=0)
    found = interval(value, resamples, pairs[0][0].units, RESAMPLING)
    changes = [ours.minus(theirs, metric) for ours, theirs in pairs]
    told_changes = "; ".join(f"{c.value:+.4f} [{c.low:+.5f}, {c.high:+.5f}]" for c in changes)
    told_mean = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    return Row(
        figure,
        float(found.high or 0),
        metric,
        must,
        None,
        False,
        f"{reference}; {told_mean}; per seed {told_changes}",
    )


class Quality:
    """The questions, their fits, and how their rows are read."""

    def __init__(self, root: Path, seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self.california = Case(root, "california", ("house_value",))
        self.adult = Case(root, "adult", ("income",))
        income = "medium_income"
        self.two = {
            "California": (
                Case(root, "california", ("house_value", income)),
                Case(root, "california", ("house_value",), without=(income,)),
                Case(root, "california", (income,), without=("house_value",)),
            ),
            "Adult": (
                Case(root, "adult", ("income", "hours_per_week")),
                Case(root, "adult", ("income",), without=("hours_per_week",)),
                Case(root, "adult", ("hours_per_week",), without=("income",)),
            ),
        }

    def questions(self) -> dict[str, tuple[list[Fit], Callable[[], list[Row]]]]:
        """Return per name what has to be fitted, and what then gives its rows."""
        found: dict[str, tuple[list[Fit], Callable[[], list[Row]]]] = {
            "California nn alone": (self._alone(self.california, "nn"), self._california_nn),
            "California catboost alone": (
                self._alone(self.california, "catboost"),
                self._california_catboost,
            ),
            "California tabnet alone": (
                self._alone(self.california, "tabnet"),
                self._california_tabnet,
            ),
            "Adult nn alone": (self._alone(self.adult, "nn"), self._adult_nn),
            "California stack": (self._members(self.california), self._california_stack),
            "Adult stack": (self._members(self.adult), self._adult_stack),
            "California embedding_catboost": (
                self._members(self.california) + self._embedding(self.california),
                functools.partial(self._embedding_catboost, self.california, "rmse", -0.008),
            ),
            "Adult embedding_catboost": (
                self._members(self.adult) + self._embedding(self.adult),
                functools.partial(self._embedding_catboost, self.adult, "log_loss", None),
            ),
            "random member": (
                self._members(self.california) + self._members(self.adult),
                self._random_member,
            ),
        }
        for name, cases in self.two.items():
            fits = [fit for case in cases for fit in self._inner(case)]
            found[f"{name} two targets"] = (fits, functools.partial(self._two_targets, name))
        return found

    def _alone(self, case: Case, kind: str) -> list[Fit]:
        return [Fit(case, kind, seed, ALONE) for seed in self.seeds]

    def _inner(self, case: Case) -> list[Fit]:
        return [Fit(case, "nn", seed, {"bag": "none"}) for seed in self.seeds]

    def _members(self, case: Case) -> list[Fit]:
        return [Fit(case, kind, seed) for seed in self.seeds for kind in MEMBERS]

    def _embedding(self, case: Case) -> list[Fit]:
        return [
            Fit(case, "embedding_catboost", seed, network=Fit(case, "nn", seed))
            for seed in self.seeds
        ]

    def _of(self, case: Case, kind: str) -> list[Judged]:
        target = case.targets[0]
        return [judged(case, fit.out, target) for fit in self._alone(case, kind)]

    def _california_nn(self) -> list[Row]:
        reference = "tuned MLP .495, FT-Transformer .459, TabM .4414"
        return [
            mean_row("California, nn alone", self._of(self.california, "nn"), "rmse",
                     must=0.455, goal=0.4414, reference=reference)
        ]  # fmt: skip

    def _california_catboost(self) -> list[Row]:
        return [
            mean_row("California, catboost alone", self._of(self.california, "catboost"), "rmse",
                     must=0.434, goal=0.431, reference="published default .4303")
        ]  # fmt: skip

    def _california_tabnet(self) -> list[Row]:
        return [
            mean_row("California, tabnet alone", self._of(self.california, "tabnet"), "rmse",
                     must=0.53, goal=0.49, reference="published tuned .510")
        ]  # fmt: skip

    def _adult_nn(self) -> list[Row]:
        found = self._of(self.adult, "nn")
        return [
            mean_row("Adult, nn alone", found, "roc_auc", must=0.9135,
                     reference="tuned FT-Transformer .9135"),
            mean_row("Adult, nn alone", found, "accuracy", must=0.8587, goal=0.869,
                     reference="tuned FT-Transformer .8587, MLP-PLR .869"),
        ]  # fmt: skip

    def _stacked(
        self, case: Case, metric: MetricName
    ) -> tuple[list[Judged], list[tuple[Judged, Judged]]]:
        """Return each seed's stack, and beside it its best member by the test rows."""
        stacks, pairs = [], []
        for seed in self.seeds:
            fits = {kind: Fit(case, kind, seed).out for kind in MEMBERS}
            found = judged(case, run_stack(case, fits, f"seed-{seed}"), case.targets[0])
            members = [judged(case, out, case.targets[0]) for out in fits.values()]
            stacks.append(found)
            pairs.append((found, _best(members, metric)))
        return stacks, pairs

    def _california_stack(self) -> list[Row]:
        found, pairs = self._stacked(self.california, "rmse")
        return [
            mean_row("California, stack", found, "rmse", must=0.428, goal=0.420,
                     reference="CatBoost tuned ensemble .4234, TabM ensemble .427"),
            mean_gain_row("California, stack − best member, upper bound", pairs, "rmse", must=0.0,
                          reference="paired"),
        ]  # fmt: skip

    def _adult_stack(self) -> list[Row]:
        found, pairs = self._stacked(self.adult, "log_loss")
        return [
            mean_row("Adult, stack", found, "roc_auc", must=0.9281, goal=0.9295,
                     reference="CatBoost .9279"),
            mean_row("Adult, stack", found, "log_loss", must=0.2755, goal=0.273,
                     reference="CatBoost .2764"),
            mean_gain_row("Adult, stack − best member, upper bound", pairs, "log_loss", must=None,
                          reference="paired"),
        ]  # fmt: skip

    def _embedding_catboost(self, case: Case, metric: MetricName, goal: float | None) -> list[Row]:
        """Beside catboost with the same seed; the lower bound must not be above 0."""
        pairs = [
            tuple(
                judged(case, fit.out, case.targets[0]) for fit in (ours, Fit(case, "catboost", s))
            )
            for s, ours in zip(self.seeds, self._embedding(case), strict=True)
        ]
        changes = [ours.value(metric) / theirs.value(metric) - 1 for ours, theirs in pairs]
        name = f"{case.name.title()}, embedding_catboost − catboost"
        return [
            worst_gain_row(f"{name}, lower bound", pairs, metric, must=0.0, bound="low",
                           reference="paired, per seed; in-sample features lose 4 %"),
            Row(f"{name}, relative", statistics.mean(changes), metric, None, goal, False),
        ]  # fmt: skip

    def _random_member(self) -> list[Row]:
        rows = []
        for case, metric in ((self.california, "rmse"), (self.adult, "roc_auc")):
            target = _target(case, case.targets[0])
            fits = {kind: Fit(case, kind, 0).out for kind in MEMBERS}
            plain = run_stack(case, fits, "seed-0")
            noise = write_random(case, fits["catboost"], target)
            mixed = run_stack(case, {**fits, "random": noise}, "random")
            before, after = (judged(case, out, target.name).value(metric) for out in (plain, mixed))
            blend = read_json(mixed / "selection.json")["targets"][target.name]["blend"]
            weight = blend["weights"].get("random", 0.0)
            name = f"{case.name.title()}, stack with a random member"
            reference = f"{before:.5f} without it, {after:.5f} with it"
            rows += [
                Row(
                    f"{name}: change",
                    abs(after / before - 1),
                    metric,
                    0.001,
                    None,
                    False,
                    reference,
                ),
                Row(f"{name}: its weight", weight, "share", 0.0, None, False),
            ]
        return rows

    def _two_targets(self, name: str) -> list[Row]:
        both, *singles = self.two[name]
        rows = []
        for place, single in enumerate(singles):
            target = _target(both, both.targets[place])
            metric = "rmse" if target.task == "regression" else "roc_auc"
            ratios = []
            for two, one in zip(self._inner(both), self._inner(single), strict=True):
                two_heads, one_head = (
                    judged(fit.case, fit.out, target.name).value(metric) for fit in (two, one)
                )
                ratio = two_heads / one_head if metric == "rmse" else one_head / two_heads
                ratios.append(ratio)
            told_ratios = " ".join(f"{ratio:.4f}" for ratio in ratios)
            rows.append(
                Row(f"{name}, {target.name}: two heads / one head", statistics.mean(ratios),
                    f"{metric} (worse > 1)", 1.01, None, False, f"seeds {told_ratios}")
            )  # fmt: skip
        seconds = [
            sum(fit.seconds for case in singles for fit in self._inner(case) if fit.seed == seed)
            / next(fit.seconds for fit in self._inner(both) if fit.seed == seed)
            for seed in self.seeds
        ]
        told_seconds = " ".join(f"{ratio:.2f}" for ratio in seconds)
        rows.append(
            Row(f"{name}: two fits / one fit with two heads", statistics.mean(seconds), "x CPU",
                None, 1.6, True, f"seeds {told_seconds}")
        )  # fmt: skip
        return rows


def run_stack(case: Case, members: Mapping[str, Path], name: str) -> Path:
    """Stack ``members`` with the default settings; return the folder."""
    out = case.folder / f"stack-{name}"
    stack(case.table, members, out, StackParams(), **told())
    return out


def write_random(case: Case, like: Path, target: Target) -> Path:
    """Write the predictions of a member that knows nothing, for the rows that ``like`` predicts."""
    out = case.folder / "train-random"
    found = read_predictions(like, target)
    low, high = found.values.min(), found.values.max()
    values = np.random.default_rng(0).uniform(low, high, len(found.values))
    shutil.rmtree(out, ignore_errors=True)
    with new_folder(out) as folder:
        write_predictions(folder, replace(found, model="random", values=values), target)
    return out


def main() -> int:
    """Fit what is not kept, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--only", default="", metavar="TEXT", help="questions whose name has TEXT")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(os.environ.get("HEADRACE_BENCHMARK_DATA", scratch)) / "quality"
        quality = Quality(root, range(1 if args.quick else 3))
        asked = {n: q for n, q in quality.questions().items() if args.only in n}
        for case in dict.fromkeys(fit.case for fits, _ in asked.values() for fit in fits):
            case.made()
        wanted = {fit.out: fit for fits, _ in asked.values() for fit in fits}.values()
        fit_all([fit for fit in wanted if fit.network is None])
        fit_all([fit for fit in wanted if fit.network is not None])
        return report([row for _, rows in asked.values() for row in rows()], args)


def fit_all(fits: Iterable[Fit]) -> None:
    """Run the fits, two at a time: each has one thread."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for fit, done in [(fit, pool.submit(run_fit, fit)) for fit in fits]:
            done.result()
            print(
                f"{fit.case.folder.name:34} {fit.kind:20} {dict(fit.params)} seed {fit.seed}: "
                f"{fit.seconds:.0f} CPU s",
                flush=True,
            )


def _target(case: Case, name: str) -> Target:
    contract = open_table(case.table).contract
    return next(target for target in contract.targets if target.name == name)


def _best(members: Sequence[Judged], metric: MetricName) -> Judged:
    sign = 1 if metric_of(members[0].sample.task, metric).higher_is_better else -1
    return max(members, key=lambda member: sign * member.value(metric))


if __name__ == "__main__":
    sys.exit(main())
