# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How well a policy answers: predictions on a benchmark, their scores, and controls that keep the scores honest."""
