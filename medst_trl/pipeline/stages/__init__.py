# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One file per stage: its settings, its `main`, and the `Stage` that declares both. See `medst_trl.pipeline.stage`."""
