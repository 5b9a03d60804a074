# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m medst_trl RECIPE` or `COMMAND`, also under your own launcher. See `run_launched` in `cli.py`."""

import sys

from medst_trl.cli import guarded, run_launched


if __name__ == "__main__":
    sys.exit(guarded(run_launched, sys.argv[1:]))
