# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test the registry of judge prompts and the prompts in it."""

import base64
import json
from hashlib import sha256

import pytest

from medst_trl.base.errors import UserError
from medst_trl.selftrain.judge.judge import JUDGE_PROMPTS, JudgePrompt
from medst_trl.selftrain.judge.pairwise import PairwiseJudge


PNG = base64.b64decode(  # one black pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
CANDIDATE = {
    "id": "r1#0",
    "images": [{"bytes": PNG, "path": None}],
    "image_ids": ["image 1"],
    "prompt": [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Describe the scan."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A CT scan."}]},
        {"role": "user", "content": [{"type": "text", "text": "Is the liver \u2265 12 cm?"}]},
    ],
    "answers": ["Yes, it is.\n[End Answer 1]", "x" * 12_001],
    "generation": "{}",
}


@pytest.mark.parametrize(
    ("version", "key", "body"),
    [
        ("rubric", "42b8f3ffc781886635c88d725b59dd113a1ef0ea574ee78feac6bdf01df6e532",
         "3bc7e459217fc507e085bf618d98b6e0c99b35282ce363ac17cef5c28073560e"),
        ("paper", "80907b96d736f0ec66b55a7c9a4aa0a08e7b71cfa4fc9c673312e9e1397b53c3",
         "9423f8cf99790eab6af921c9153902f0d288c85fc164e41dfd7da462cd17c5ea"),
    ],
)  # fmt: skip
def test_keys_and_bodies_of_version_0_1_0_are_unchanged(version, key, body):
    """Otherwise, replies in existing caches would be requested and charged again."""
    captions = {"image 1": "A liver."} if version == "rubric" else None
    judge = PairwiseJudge("gpt-4o", prompt_version=version, captions=captions)
    [(_, [request, _])] = judge.requests([CANDIDATE])
    assert request.key == key
    assert sha256(json.dumps(request.body()).encode()).hexdigest() == body


def test_an_unknown_prompt_is_refused_with_the_known_names():
    with pytest.raises(UserError, match="Unknown judge prompt 'papr'. Did you mean 'paper'. Choose one of .*rubric"):
        PairwiseJudge("judge", prompt_version="papr")


def test_captions_are_refused_by_a_prompt_without_captions():
    with pytest.raises(UserError, match="'paper' does not show reference captions.*one of rubric"):
        PairwiseJudge("judge", prompt_version="paper", captions={"a": "b"})


def test_a_prompt_that_lacks_a_part_is_refused():
    with pytest.raises(UserError, match="judge prompt 'x' .* lacks summary, read"):
        JUDGE_PROMPTS.register(
            JudgePrompt(name="x", summary=None, messages=list, read=None, reminder="Again.", reply_tokens=1)
        )
