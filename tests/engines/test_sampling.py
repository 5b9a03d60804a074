# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import math
import random
from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList

from medst_trl.base.errors import UserError
from medst_trl.engines.engine import Sampling, random_stream
from medst_trl.engines.sampling import SeededSampler, warpers


PAPER = Sampling()


def draw(scores, streams, sampling=PAPER, steps=1):
    """Tokens of shape (rows, steps), the same scores at each step."""
    sampler, tokens = SeededSampler(sampling, streams), []
    for _ in range(steps):
        out = sampler(None, scores.clone())
        assert out.isfinite().sum(1).eq(1).all()
        tokens.append(out.argmax(1))
    sampler.check()
    return torch.stack(tokens, 1)


def chi_square(counts, probabilities):
    """Pearson's statistic over the tokens that can occur, and its expectation's standard score."""
    total = sum(counts.values())
    possible = [(token, p) for token, p in enumerate(probabilities) if p > 0]
    assert set(counts) <= {token for token, _ in possible}, "a token without probability was drawn"
    statistic = sum((counts[token] - total * p) ** 2 / (total * p) for token, p in possible)
    freedom = len(possible) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "sampling",
    [
        PAPER,
        Sampling(temperature=0.7, top_k=0, top_p=1.0),
        Sampling(temperature=1.0, top_k=5, top_p=1.0),
        Sampling(temperature=2.0, top_k=0, top_p=0.5),
    ],
    ids=str,
)
def test_distribution(sampling):
    """Over many streams, and over the steps of one, tokens come as often as after transformers' own warpers."""
    n = 5_000
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 1.5
    expected = LogitsProcessorList(warpers(sampling))(None, scores).softmax(-1)[0].tolist()
    across = draw(scores.expand(n, -1), [random_stream(s, "r", "answer", 0) for s in range(n)], sampling)
    assert abs(chi_square(Counter(across[:, 0].tolist()), expected)) < 5
    long = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, max_new_tokens=2000)
    along = draw(scores.expand(5, -1), list("abcde"), long, steps=2000)
    assert abs(chi_square(Counter(along.flatten().tolist()), expected)) < 5


def test_a_wrong_sampler_would_be_noticed():
    counts = Counter({0: 520, 1: 480})
    assert abs(chi_square(counts, [0.5, 0.5])) < 5 < chi_square(counts, [0.6, 0.4])


def test_a_row_knows_nothing_of_its_neighbours():
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    streams = [random_stream(0, f"r{row}", "question", 0) for row in range(6)]
    together = draw(scores, streams, steps=8)
    for row in range(6):
        assert (draw(scores[row : row + 1], streams[row : row + 1], steps=8) == together[row]).all()
    order = [3, 1, 5]
    assert (draw(scores[order], [streams[row] for row in order], steps=8) == together[order]).all()


def test_streams_differ_and_repeat():
    scores = torch.zeros(1, 1000)
    names = [
        random_stream(*parts)
        for parts in [(0, "a", "question", 1), (1, "a", "question", 1), (0, "b", "question", 1), (0, "a", "answer", 1),
                      (0, "a", "question", 2), (0, "a", "answer", 1, 0), (0, "a", "answer", 1, 1),
                      (0, "a', 'question", "question", 1)]
    ]  # fmt: skip
    wide = Sampling(top_k=0, top_p=1.0)
    texts = [tuple(draw(scores, [name], wide, steps=6)[0].tolist()) for name in names]
    assert len(set(texts)) == len(names)
    assert texts == [tuple(draw(scores, [name], wide, steps=6)[0].tolist()) for name in names]
    # The numbers themselves are part of what a seed promises.
    numbers = random.Random("a")
    assert draw(torch.zeros(1, 10), ["a"], wide, steps=6).tolist() == [[int(10 * numbers.random()) for _ in range(6)]]


def test_token_limit_does_not_change_the_tokens_before_it():
    scores = torch.zeros(1, 1000)
    short, long = (draw(scores, ["a"], Sampling(max_new_tokens=n), steps=4) for n in (4, 400))
    assert (short == long).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_borders(uniform):
    """The smallest and the largest uniform number draw a token that has a probability."""
    scores = torch.full((1, 9), -torch.inf)
    scores[0, 3:6] = torch.tensor([0.1, 0.2, 0.3])
    sampler = SeededSampler(Sampling(top_k=0, top_p=1.0), ["a"])
    sampler._uniforms[:] = uniform
    assert sampler(None, scores).argmax() == (5 if uniform else 3)


def test_one_step_more_than_there_are():
    draw(torch.zeros(2, 5), ["a", "b"], Sampling(max_new_tokens=2), steps=4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers(bad):
    scores = torch.zeros(2, 5)
    scores[1, 2] = bad
    sampler = SeededSampler(Sampling(top_k=0, top_p=1.0), ["a", "b"])
    sampler(None, scores)
    sampler(None, torch.zeros(2, 5))
    with pytest.raises(UserError, match="not numbers"):
        sampler.check()
