"""The parts of the page refuse what cannot be shown."""

import pytest

from headrace.evaluation.page import Table


def test_a_row_that_does_not_fit_its_headings_is_refused():
    """By number, so that its maker can be found."""
    with pytest.raises(ValueError, match=r"'t' has 2 headings; its rows \[1\] \(of 1 such rows\)"):
        Table("t", ("a", "b"), (("x", 1), ("y",)))
