# SPDX-License-Identifier: Apache-2.0
"""Which files a job reads, and what is in them."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cream.corpus.compression import COMPRESSED_SUFFIXES, import_zstandard, suffixes
from megatron_cream.errors import UserError

STDIN = Path("-")
JSONL, TEXT, PARQUET, ARROW = "jsonl", "text", "parquet", "arrow"
FORMATS = (JSONL, TEXT, PARQUET, ARROW)
_FORMAT_OF = {
    ".jsonl": JSONL,
    ".json": JSONL,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
}
FOLDER_SUFFIXES = frozenset(
    {".jsonl", ".txt", ".md", ".rst", ".py", ".parquet", ".arrow", ".feather"}
)


@dataclass(frozen=True)
class TextInputs:
    """The files a job reads, in order.

    Attributes:
        files: every file to read; folders and patterns are already expanded, sorted by path.
        skipped: how many files in the folders were of a kind that folders do not take.
        total_bytes: size of all files on disk (compressed size of compressed ones).
    """

    files: tuple[Path, ...]
    skipped: int
    total_bytes: int


def find_inputs(paths: Sequence[str | Path]) -> TextInputs:
    """List the files behind `paths` without reading any of them.

    Args:
        paths: files, folders, patterns as ``data/*.jsonl`` or ``data/**/*.gz``, and ``-`` for
            standard input.

    Raises:
        FileNotFoundError: a path that does not exist, or a pattern without a file.
        UserError: nothing to read, something that is not a regular file, an empty compressed
            file, or a `.zst` file without the `zstandard` package.
    """
    files: list[Path] = []
    skipped = 0
    if "" in map(str, paths):
        raise UserError("--input '': names nothing, needs a file or a folder")
    for path in map(Path, paths):
        if path == STDIN:
            files.append(path)
        elif path.is_dir():
            found, others = _walk(path)
            files += found
            skipped += others
        else:
            files += _matches(path)
    if not files:
        given = " ".join(map(str, paths)) or "(nothing)"
        kinds = " ".join(sorted(FOLDER_SUFFIXES))
        raise UserError(
            f"--input {given}: no files to read ({skipped} of other kinds left out), "
            f"needs at least one of {kinds}, plain or .gz, .xz or .zst"
        )
    if files.count(STDIN) > 1:
        raise UserError("--input - -: standard input can be read once only")
    sizes = [_checked_size(path) for path in files]
    return TextInputs(tuple(files), skipped, sum(sizes))


def format_of(path: Path, given: str | None = None) -> str:
    """Return what is in a file: one of FORMATS, by its suffix where it is not ``given``."""
    if path == STDIN:
        return given or JSONL
    return given or _FORMAT_OF.get(suffixes(path)[0], TEXT)


def is_compressed(path: Path) -> bool:
    """Say whether a file is expanded while it is read."""
    return path != STDIN and suffixes(path)[1] != ""


def _matches(path: Path) -> list[Path]:
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        # A folder that matches is a name of its own; its files need a pattern that reaches them.
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = sorted(name for name in found if not name.is_dir())
        if files:
            return files
        raise FileNotFoundError(f"--input {path}: no file matches, needs one that does")
    raise FileNotFoundError(f"--input {path}: not found, needs an existing file or folder")


def _walk(folder: Path) -> tuple[list[Path], int]:
    """Files under `folder` that folders take, sorted, and the number of the other files."""

    def fail(error: OSError) -> None:
        raise error

    # os.walk passes over folders it may not list unless it is told otherwise.
    every = [Path(root, name) for root, _, names in os.walk(folder, onerror=fail) for name in names]
    taken = sorted(path for path in every if suffixes(path)[0] in FOLDER_SUFFIXES)
    return taken, len(every) - len(taken)


def _checked_size(path: Path) -> int:
    if path == STDIN:
        return 0
    if not path.is_file():
        raise UserError(f"--input {path}: not a regular file, needs a file or a folder")
    content, compression = suffixes(path)
    if compression == ".zst":
        import_zstandard(path)
    if compression and _FORMAT_OF.get(content) in (PARQUET, ARROW):
        raise UserError(f"--input {path}: needs a {content} file that is not compressed again")
    size = path.stat().st_size
    if compression in COMPRESSED_SUFFIXES and size == 0:
        raise UserError(f"--input {path}: is empty, needs a whole {compression} file")
    return size
