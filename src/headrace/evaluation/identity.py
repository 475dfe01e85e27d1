"""The place in the report for what only a finished run knows: its lineage id, its look at the test.

The page that a stage writes leaves it empty, for two runs of the same state write the same bytes.
"""

import html
from collections.abc import Mapping

EMPTY = '<dl id="identity" hidden></dl>'


def identified(page: str, facts: Mapping[str, str]) -> str:
    """Return a copy of ``page`` that says ``facts``.

    Raises:
        ValueError: if the page has no free place for them: it is not ours, or says them already.
    """
    if page.count(EMPTY) != 1:
        raise ValueError("the page has no free place for the run's identity; render it anew")
    said = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()
    )
    return page.replace(EMPTY, f'<dl id="identity">{said}</dl>')
