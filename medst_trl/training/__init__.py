# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Training: the self-questioning collator, the trainers over TRL's, learning rates by part, exact resuming."""
