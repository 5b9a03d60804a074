# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Self-training: candidates from the policy, verdicts of a judge, preference pairs from both."""
