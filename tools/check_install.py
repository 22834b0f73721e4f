# SPDX-License-Identifier: Apache-2.0
"""Check that the install works: imports, a dataset, two training steps on a CPU.

    python tools/check_install.py

No GPU and no network; the Dockerfile runs it at build time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_cream.errors import one_line_errors
from megatron_cream.health import check_install


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; a broken install ends in its error and exit status 2."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        lines = check_install(Path(folder))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
