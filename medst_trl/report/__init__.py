# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""An HTML page about a run."""
