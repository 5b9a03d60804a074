# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing datasets, adapters and models on the Hub, with their cards."""
