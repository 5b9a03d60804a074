# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Turns a recipe into a run: settings, launchers, run records, plan and stages."""
