# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compare pairs of answers with a vision-language model, in both orders.

```bash
python examples/judge_pairs.py                                     # with the oracle judge, on this machine
OPENAI_API_KEY=... python examples/judge_pairs.py --model gpt-4o   # a few cents
```

You can also use a local model as the judge. Start any OpenAI-compatible server; it needs no key:

```bash
vllm serve Qwen/Qwen2.5-VL-7B-Instruct                             # or: transformers serve --port 8000
python examples/judge_pairs.py --model Qwen/Qwen2.5-VL-7B-Instruct --base_url http://localhost:8000/v1
```
"""

import argparse
from typing import Any

from datasets import Dataset

from medst_trl import PairwiseJudge
from medst_trl.data.images import image_id
from medst_trl.data.schema import image_part, text_part
from medst_trl.demo.oracle import open_oracle
from medst_trl.demo.phantoms import make_phantoms
from medst_trl.selftrain.judge.statistics import format_statistics, judge_statistics, warnings_of


def make_candidates(n: int) -> list[dict[str, Any]]:
    """Return a question about each of `n` phantoms, with its true answer and an invented one."""
    candidates = []
    for phantom in make_phantoms(n, seed=0, split="unlabelled"):
        question, name = phantom.questions[-1], image_id(phantom.image)
        candidates.append(
            {
                "id": f"{name[:8]}#0",
                "images": [phantom.image],
                "image_ids": [name],
                "prompt": [{"role": "user", "content": [image_part(), text_part(question["question"])]}],
                "answers": [question["answer"], "It shows a fractured wrist."],
            }
        )
    return candidates


def main(model: str | None = None, base_url: str | None = None, pairs: int = 6) -> list[dict[str, Any]]:
    candidates = make_candidates(pairs)
    judge = PairwiseJudge(
        model or "phantom-oracle",
        base_url=base_url,
        local=None if model else open_oracle(Dataset.from_list(candidates)),
        prompt_version="rubric",  # or "paper" for the prompt of STLLaVA-Med
        order="both",  # drops verdicts that change when the answers are swapped
        concurrency=4,
    )
    print(judge.estimate(candidates))
    judgements = []
    for judgement in judge(candidates):
        judgements.append(judgement)
        print(f"\n{judgement['question']}")
        for index, answer in enumerate(judgement["answers"]):
            score = judgement["scores"][index] if judgement["scores"] else "-"
            print(f"  {'>' if judgement['verdict'] == index else ' '} {score:>4}  {answer}")
        if judgement["dropped"]:
            print(f"  dropped: {judgement['dropped']}")
    statistics = judge_statistics(judgements)
    print("\n" + "\n".join([format_statistics(statistics), *warnings_of(statistics)]))
    return judgements


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--base_url")
    parser.add_argument("--pairs", type=int, default=6)
    main(**vars(parser.parse_args()))
