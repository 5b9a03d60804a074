# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The sources that come with the package. See [`medst_trl.data.source.Source`]."""
