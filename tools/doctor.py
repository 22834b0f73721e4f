# SPDX-License-Identifier: Apache-2.0
"""Read a Megatron checkpoint whole and say which of its files are damaged.

    python tools/doctor.py runs/cream                  # the latest iteration
    python tools/doctor.py runs/cream/iter_0000010     # one of them

Sizes, every record, and the checksums that megatron_cream writes when it saves; a checkpoint of
another trainer has those in its records. Nothing in the checkpoint is run.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

from megatron_cream.errors import UserError, one_line_errors


def main(argv: list[str]) -> int:
    """Print what was found; a damaged checkpoint ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder given to --save, or one")
    args = parser.parse_args(argv)
    # Megatron says on import which GPU packages are missing: none is needed here.
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with one_line_errors():
        from megatron_cream.checkpoint.doctor import examine
        from megatron_cream.checkpoint.integrity import go_on_before

        report = examine(args.checkpoint)
        print("\n".join(report.lines()))
        if report.problems:
            raise UserError(
                f"{report.folder} is damaged: {len(report.problems)} problem(s); "
                f"{go_on_before(report.folder, '--load')}"
            )
        print("whole")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
