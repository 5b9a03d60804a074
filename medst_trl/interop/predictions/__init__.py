# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Prediction files of other evaluation projects, one file each. Every file registers its format."""
