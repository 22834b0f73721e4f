# SPDX-License-Identifier: Apache-2.0
"""Parts of a page of results that is one file: tables that sort, pictures inside, settings."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cream.evaluation.results import Result
from megatron_cream.positions.plots import has_matplotlib

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="megatron_cream">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
th button {{ all: unset; cursor: pointer; font-weight: bold }}
th button:focus-visible {{ outline: 2px solid #0072b2 }}
th[aria-sort=ascending] button::after {{ content: " \\25b2" }}
th[aria-sort=descending] button::after {{ content: " \\25bc" }}
img {{ max-width: 100% }} pre {{ background: #f4f4f4; padding: .8rem; overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>
{body}
<script>
for (const button of document.querySelectorAll("th button")) button.onclick = () => {{
  const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].textContent;
  const order = (a, b) => {{
    const [x, y] = [parseFloat(a), parseFloat(b)];
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
    return isNaN(x) ? a.localeCompare(b) : x - y;
  }};
  const rows = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)));
  table.tBodies[0].append(...(down ? rows.reverse() : rows));
}};
</script>
</body></html>
"""


def make_page(title: str, body: str) -> str:
    """Return a page; ``body`` is HTML, ``title`` a text."""
    return _PAGE.format(title=html.escape(title), body=body)


def is_page(path: Path) -> bool:
    """Return whether a file is a page that ``make_page`` made."""
    with open(path, "rb") as file:
        return b'content="megatron_cream"' in file.read(200)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose rows can be sorted by any column; the first row names the columns."""
    names = "".join(f"<th><button>{_cell(cell)}</button></th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return html.escape(text.replace("\\*", "*"))  # as Markdown has it


def paragraph(text: str) -> str:
    """Return a text as a paragraph."""
    return f"<p>{_cell(text)}</p>"


def html_picture(results: Sequence[Result], title: str) -> str:
    """Return the picture of runs of one task; nothing where matplotlib is not installed."""
    if not has_matplotlib():
        return ""
    from megatron_cream.evaluation.pictures import picture

    image = io.BytesIO()
    picture(results).savefig(image, format="png", dpi=110)
    data = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def html_settings(settings: dict[str, Any]) -> str:
    """Return settings as JSON in a block."""
    return f"<pre>{html.escape(json.dumps(settings, indent=2))}</pre>"


def folded(title: str, body: str) -> str:
    """Return HTML that is shown when its title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"
