# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The Hub: publishing datasets, adapters and models with their cards."""
