"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], columns: str, gap: str = " ") -> str:
    """Format rows of cells as aligned lines of text.

    Args:
      rows: the cells, with the header in the first row.
      columns: the alignment and minimum width of each column, such as "<8 >12".
      gap: the separator of columns.

    >>> print(text_table([("", "MB"), ("mu", "1.5")], "<4 >5"))
            MB
    mu     1.5
    """
    formats = [
        f"{column[0]}{max(int(column[1:]), *map(len, cells))}"
        for column, cells in zip(columns.split(), zip(*rows, strict=True), strict=True)
    ]
    return "\n".join(gap.join(map(format, row, formats)).rstrip() for row in rows)
