# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What every part uses and what depends on no part: errors, files, hashes, redaction, registries."""
