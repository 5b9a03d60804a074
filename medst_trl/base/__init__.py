# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The innermost ring, which imports no other part: errors, files, hashes, redaction, registries."""
