# SPDX-License-Identifier: Apache-2.0
"""Draws images/architecture.svg: which part of the package stands on which.

``python docs/hooks/architecture.py`` writes it. A part imports only from rows beneath its own when
it is itself imported; ``tests/release/test_house.py`` holds the code to these rows.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

ROWS: list[dict[str, str]] = [
    {
        "cli": "the table of commands",
        "extend": "all steps in one",
        "pretrain, launch": "training starts here",
        "dry_run, check_install": "a look before a run",
    },
    {
        "training": "flags, checks, start, step",
        "evaluation": "perplexity, retrieval, pictures",
        "planning": "layout, memory, time",
    },
    {
        "checkpoint": "import, export, load, doctor",
        "corpus": "text to indexed dataset",
    },
    {
        "extras": "CLEX, hybrid, TE's loss",
        "data": "what training reads",
    },
    {
        "mcore": "the one door to Megatron",
        "attention": "dual chunk and relatives",
    },
    {"config": "the settings of an extension"},
    {
        "positions": "where tokens stand",
        "rope": "a position becomes an angle",
    },
    {
        "options, ownership, parallel_layout, torchrun, errors": "small things that all use",
    },
]
"""Parts by row, from the top: modules of ``megatron_cream``, and what each is for."""

IMAGE = Path(__file__).parents[1] / "images" / "architecture.svg"
_WIDTH, _HEIGHT, _GAP = 720, 46, 10
_TEXT = (
    '<text x="{x:.0f}" y="{y}" text-anchor="middle" font-size="{size}" fill="{color}">{text}</text>'
)


def svg() -> str:
    """Return the picture."""
    height = len(ROWS) * (_HEIGHT + _GAP) + _GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for row, parts in enumerate(ROWS):
        top = _GAP + row * (_HEIGHT + _GAP)
        width = (_WIDTH - _GAP * (len(parts) + 1)) / len(parts)
        for column, (names, purpose) in enumerate(parts.items()):
            left = _GAP + column * (width + _GAP)
            lines.append(
                f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{_HEIGHT}" rx="6" '
                'fill="#eef3f6" stroke="#546e7a"/>'
            )
            for text, y, size, color in (
                (names, top + 20, 14, "#263238"),
                (purpose, top + 37, 12, "#546e7a"),
            ):
                place = {"x": left + width / 2, "y": y, "size": size, "color": color}
                lines.append(_TEXT.format(**place, text=escape(text)))
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    IMAGE.write_text(svg())
