# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are scripts that find each other beside them; their tests find them here."""

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent)]
