# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampling in which every text has a random stream of its own, so that it is the same in whatever batch it stands."""

import random
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from medst_trl.base.errors import UserError

from .engine import Sampling


class SeededSampler(LogitsProcessor):
    """
    Draws the next token of each row of a batch by that row's own random numbers.

    transformers' own sampling takes one global stream for the whole batch, so a text would change with the texts
    beside it. Here temperature, top-k and top-p (transformers' warpers) make the distribution, and one uniform number
    per row and step picks from it by the inverse of its cumulative distribution, in the order of the vocabulary. The
    token picked is the only one left with a finite score: `generate(do_sample=False)` takes it.

    Args:
        sampling ([`Sampling`]):
            Temperature above 0, top-k, top-p, and how many tokens there can be.
        streams (sequence of `str`):
            One for each row: the same stream gives the same numbers, always and everywhere.

    Example:

    ```python
    >>> sampler = SeededSampler(Sampling(temperature=1.2), streams=["record 1", "record 2"])
    >>> model.generate(**inputs, do_sample=False, logits_processor=[sampler], max_new_tokens=64)
    ```
    """

    def __init__(self, sampling: Sampling, streams: Sequence[str]):
        self.warpers = warpers(sampling)
        # Python's generator, not torch's: its numbers are promised to stay the same.
        rows = [random.Random(stream) for stream in streams]
        uniforms = [[row.random() for _ in range(sampling.max_new_tokens)] for row in rows]
        self._uniforms = torch.tensor(uniforms, dtype=torch.float64)
        self._step = 0
        self._broken = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape (batch, length)): The tokens so far.
            scores (`torch.FloatTensor` of shape (batch, vocabulary)): Scores of the next one.

        Returns:
            `torch.FloatTensor`: 0 for the token drawn and minus infinity for all others.
        """
        if self._step == 0:
            self._uniforms = self._uniforms.to(scores.device)
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        # In float64, so that rounding in the sum does not move tokens over their borders.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        # A step beyond the last one happens where `generate` notices late that all rows have ended.
        uniform = self._uniforms[:, min(self._step, self._uniforms.shape[1] - 1), None]
        below_total = torch.nextafter(total, torch.zeros_like(total))  # `uniform * total` may round up to it
        token = torch.searchsorted(cumulative, torch.minimum(uniform * total, below_total), right=True)
        # Looked at after generation only: on a GPU each look would wait for it.
        broken = ~total.isfinite().all()
        self._broken = broken if self._broken is None else self._broken | broken
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token.clamp(max=scores.shape[1] - 1), 0.0)

    def keep(self, rows: torch.LongTensor) -> None:
        """Go on with some rows of the batch, given by their numbers."""
        self._uniforms = self._uniforms[rows]

    def check(self) -> None:
        """Raise a `UserError` if the model's scores were no numbers at some step."""
        if self._broken is not None and bool(self._broken):
            raise UserError(
                "The model's scores are not numbers (NaN or infinity), so nothing can be drawn from them. Load it "
                "with --dtype bfloat16 or float32; if that does not help, its training has diverged."
            )


def warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """transformers' warpers in transformers' order."""
    chosen = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k > 0:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    return chosen
