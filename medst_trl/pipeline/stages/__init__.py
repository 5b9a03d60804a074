# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One file per stage, each a script with `make_parser()` and `main(...)`."""
