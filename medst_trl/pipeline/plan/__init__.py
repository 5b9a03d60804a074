# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a recipe will do, need and transfer, before it runs: `medst run RECIPE --dry_run`."""
