"""Sanity checks of the table itself: drift of the columns, copies across splits, columns too good.

They take what was counted elsewhere and say what it means.
"""

from collections.abc import Mapping, Sequence

from headrace.evaluation.bootstrap import Interval, Units
from headrace.evaluation.drift import Shift
from headrace.evaluation.findings import CheckVerdict, Finding, rows_text
from headrace.evaluation.slices import Slice, Slices, slice_json

_TOLD_APART, _FAR_APART = 0.55, 0.75  # lower bound of the adversarial ROC-AUC
_MANY_COPIES = 0.01  # share of the later split's rows
_AS_GOOD = 0.9  # share of the model's gain over chance that one column reaches alone
_NAMED = 3


def check_drift(
    pair: tuple[str, str],
    area: Interval,
    shifts: Sequence[Shift],
    units: Units,
    num_rows: int,
    *,
    by_time: bool,
    model: str = "",
) -> Finding:
    """Say whether trees tell the rows of two splits apart, and by which columns.

    ``shifts`` are those of the columns, the largest first; the columns are the predictions of
    ``model``, if one is named.
    """
    check = "prediction drift" if model else "feature drift"
    subject = " → ".join(pair)
    facts = {
        "roc_auc": {"value": area.value, "ci_low": area.low, "ci_high": area.high},
        "num_rows": num_rows,
        "num_units": units.count,
        "unit": units.name,
    }
    if area.low is None or area.value is None:
        sentence = f"Whether trees tell {subject} apart is not known: {area.reason}."
        return Finding(check, subject, "unknown", sentence, facts)
    seen = f"the predictions of {model}" if model else "all columns"
    told = (
        f"By {seen} trees tell {pair[0]} from {pair[1]} with ROC-AUC {area.value:.3f} "
        f"[{area.low:.3f}, {area.high:.3f}] (0.5: not at all; "
        f"{rows_text(num_rows, 'rows', units)})"
    )
    if area.low <= _TOLD_APART:
        return Finding(check, subject, "ok", f"{told}.", facts)
    is_expected = by_time or (bool(model) and pair[0] == "train")
    verdict: CheckVerdict = "bad" if area.low > _FAR_APART and not is_expected else "warn"
    named = ", ".join(f"{one.column} ({one.index:.2g})" for one in shifts[:_NAMED])
    most = f" Most shifted, by stability index: {named}." if named else ""
    if by_time:
        advice = "On a split by time drift is expected; watch it, and retrain as the data moves."
    elif is_expected:
        advice = "Train rows are predicted by models of single folds, which spread more."
    else:
        advice = (
            "Rows of a random or grouped split should be alike: look for rows that were collected "
            "or filtered in another way."
        )
    return Finding(check, subject, verdict, f"{told}.{most} {advice}", facts)


def check_duplicates(
    pair: tuple[str, str],
    num_copies: int,
    share: float,
    first_ids: Sequence[int],
    repeated_in_train: float,
) -> Finding:
    """Judge the rows of the later split whose feature values the earlier has, too.

    ``repeated_in_train`` is the share of train rows that repeat within train.
    """
    ids = [str(one) for one in first_ids]
    facts = {
        "num_rows": num_copies,
        "share": share,
        "first_row_ids": ids,
        "repeated_in_train": repeated_in_train,
    }
    subject = " → ".join(pair)
    if not num_copies:
        sentence = f"No {pair[1]} row has the feature values of a {pair[0]} row."
        return Finding("duplicate rows", subject, "ok", sentence, facts)
    told = (
        f"{num_copies:,} {pair[1]} rows ({100 * share:.3g} %) have exactly the feature values of a "
        f"{pair[0]} row; first row ids: {', '.join(ids)}"
    )
    if repeated_in_train >= share:
        sentence = (
            f"{told}. Within train {100 * repeated_in_train:.3g} % of the rows repeat, so the "
            f"columns are few or coarse, and nothing was copied for sure; add columns that tell "
            f"rows apart, or split by a group."
        )
        return Finding("duplicate rows", subject, "warn", sentence, facts)
    sentence = (
        f"{told}, but within train only {100 * repeated_in_train:.3g} % repeat: a model that knows "
        f"rows by heart looks good on them; drop copies in the recipe, or split random or grouped."
    )
    verdict: CheckVerdict = "bad" if share >= _MANY_COPIES else "warn"
    return Finding("duplicate rows", subject, verdict, sentence, facts)


def check_single_columns(
    target: str,
    measure: str,
    columns: Mapping[str, float],
    suspicious: Sequence[str],
    model: str,
    of_model: float | None,
) -> Finding:
    """Compare what the best column reaches alone with the model; ``measure`` is ROC-AUC or R².

    ``suspicious`` are the columns that hardly an honest one is as good as; ``of_model`` is the
    model's own value on test rows, None where it has none.
    """
    if not columns:
        return Finding("leaks", target, "unknown", "Too few labelled train rows to judge by.")
    best = max(columns, key=lambda name: (columns[name], name))
    facts = {"column": best, "measure": measure, "value": columns[best], "model": of_model}
    told = f"{best} alone reaches {measure} {columns[best]:.4g} on train rows"
    if suspicious:
        sentence = (
            f"{told}: {', '.join(suspicious)} may be the answer itself, which is not known when "
            f"predicting; set `extract.columns.{best}.role` to ignore if it is."
        )
        return Finding("leaks", target, "bad", sentence, facts)
    chance = 0.5 if measure == "ROC-AUC" else 0.0
    if of_model is None or of_model <= chance:
        return Finding("leaks", target, "ok", f"No column is suspiciously good: {told}.", facts)
    told = f"{told}, {model} {of_model:.4g} on test rows"
    if columns[best] - chance >= _AS_GOOD * (of_model - chance):
        sentence = (
            f"{told}: nearly all that the model knows is in this column; see that it is known when "
            f"predicting, and whether a simpler model would do."
        )
        return Finding("leaks", target, "warn", sentence, facts)
    return Finding("leaks", target, "ok", f"No column is suspiciously good: {told}.", facts)


def check_slices(model: str, found: Slices, num_rows: int, units: Units) -> Finding:
    """Say whether the model is worse on some slice, after Holm's correction over all of them."""
    facts = {
        "loss": found.loss,
        "correction": "holm",
        "num_tested": found.num_tested,
        "num_worse": found.num_worse,
        "num_off": found.num_off,
        "num_rows": num_rows,
        "unit": units.name,
        "num_units": units.count,
        "skipped": found.skipped,
        "worst": [slice_json(one) for one in found.worst],
    }
    if not found.num_tested:
        reason = "; ".join(found.skipped.values()) or "there is no column to cut by"
        return Finding("slices", model, "unknown", f"Nothing was tested: {reason}.", facts)
    rows = rows_text(num_rows, "test rows", units)
    if not found.num_worse:
        sentence = (
            f"On none of {found.num_tested} slices is the {found.loss} significantly larger than "
            f"elsewhere (Holm; {rows})."
        )
        return Finding("slices", model, "ok", sentence, facts)
    told = (
        f"On {found.num_worse} of {found.num_tested} slices the {found.loss} is significantly "
        f"larger than elsewhere (Holm; {rows}), first where {_slice_text(found.worst[0])}"
    )
    if not found.num_off:
        sentence = (
            f"{told}; on none is it larger than the model's own probabilities say, so these rows "
            f"are harder, and the model knows it."
        )
        return Finding("slices", model, "ok", sentence, facts)
    advice = (
        "See whether these rows are harder or the model is off there"
        if found.worst[0].p_off is None
        else f"On {found.num_off} of them more is lost than the model's own probabilities say: it "
        f"is off there, so look for what differs"
    )
    sentence = f"{told}. {advice}; do not rely on the mean of all rows for them."
    return Finding("slices", model, "warn", sentence, facts)


def _slice_text(one: Slice) -> str:
    said = (
        f"{one.column} is {one.label}: {one.value:.4g} against {one.rest:.4g} on {one.num_rows:,} "
        f"rows"
    )
    return said if one.expected is None else f"{said} ({one.expected:.4g} by its own probabilities)"
