# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Put the directory of the benchmarks on the path: they are scripts that import each other by name."""

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent)]
