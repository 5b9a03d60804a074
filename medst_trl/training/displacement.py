# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Notices likelihood displacement: DPO widens the margin while the chosen answers become less likely, too.

Described in https://huggingface.co/papers/2410.08847. The margin and the accuracy look well then, and the model gets
worse.
"""

import logging

from transformers import TrainerCallback


logger = logging.getLogger(__name__)

PATIENCE = 3  # logs in a row, so that one unlucky batch does not count


class WarnOfDisplacement(TrainerCallback):
    """Warns once when the chosen answers have been less likely than under the reference for three logs in a row."""

    def __init__(self):
        self.falling = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        change = (logs or {}).get("logratios/chosen")
        if change is None:
            return
        self.falling = self.falling + 1 if change < 0 else 0
        if self.falling == PATIENCE and state.is_world_process_zero:
            logger.warning(
                "The chosen answers have become less likely than under the reference, by %.2f nats on average at step "
                "%d (likelihood displacement): the margin may grow while the model gets worse. What helps: the `sft` "
                "term (loss_type: [sigmoid, sft]), a lower learning rate, a higher beta.",
                -change,
                state.global_step,
            )
