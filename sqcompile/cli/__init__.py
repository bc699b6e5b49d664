"""The command line: `sqcompile compile`, `recipe`, `report`, `bundle` and others, one file a command.

Exit codes: 0, it worked; 1, the work failed; 2, the command line, a recipe or a pass's options are
wrong, and nothing was done; 130, interrupted.

These modules import nothing heavy at their top: `sqcompile --help` needs no PyTorch.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from sqcompile.cli.app import app  # takes a moment, in which a user may have thought better of it
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    app()
