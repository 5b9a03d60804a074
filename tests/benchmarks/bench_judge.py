# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
How close the judge's client comes to what a faulty server allows.

```bash
python tests/benchmarks/bench_judge.py                 # 2,000 pairs, 32 calls at a time
python tests/benchmarks/bench_judge.py 500 16 0.5      # pairs, calls at a time, latency in seconds
```

The server (in a process of its own) answers with 10% 429, 5% 500, 5% time-outs, 5% garbage and 2% truncated bodies.
What it allows: the time that all calls spent with it, the failed and repeated ones included, divided by the calls that
may be under way. The client's throughput is its share of that; the rest is its own overhead, slots left empty while
calls wait to be repeated, and the tail of the run.
"""

import io
import json
import multiprocessing
import sys
import time
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[1])]  # the test server

TIMEOUT = 2.0
RATES = {"429": 0.10, "500": 0.05, "hang": 0.05, "garbage": 0.025, "nonsense": 0.025, "truncate": 0.02}


def serve(pipe, latency: float, rates: dict[str, float]) -> None:
    from judge_server import JudgeServer, RandomFaults

    with JudgeServer(fault=RandomFaults(rates), latency=latency, retry_after="1") as server:
        pipe.send(server.base_url)
        pipe.recv()
        pipe.send((server.busy_seconds, dict(server.outcomes), server.max_concurrent))


def candidates(n: int) -> list[dict]:
    import numpy as np
    from PIL import Image

    rows = []
    for number in range(n):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {number}?"}]}]
        answers = ["It is dark.", "It is dark on the left."]
        rows.append({"id": f"r{number}#0", "images": [file.getvalue()], "prompt": prompt, "answers": answers})
    return rows


def measure(pairs: int, concurrency: int, latency: float, rates: dict[str, float]) -> dict:
    from medst_trl.selftrain.judge.judgements import judge_statistics
    from medst_trl.selftrain.judge.pairwise import PairwiseJudge

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, latency, rates), daemon=True)
    process.start()
    judge = PairwiseJudge("judge", base_url=ours.recv(), concurrency=concurrency, timeout=TIMEOUT)
    rows = candidates(pairs)
    begun, processor = time.perf_counter(), time.process_time()
    judgements = list(judge(rows))
    seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    ours.send("end")
    busy, outcomes, most = ours.recv()
    process.join()
    statistics = judge_statistics(judgements)
    return {
        "pairs": pairs, "concurrency": concurrency, "latency": latency, "seconds": round(seconds, 2),
        "allowed_seconds": round(busy / concurrency, 2), "throughput": round(busy / concurrency / seconds, 3),
        "client_ms_a_call": round(1000 * processor / sum(outcomes.values()), 2), "most_at_once": most,
        "judged": statistics["judged"], "dropped": statistics["dropped"], "outcomes": outcomes,
    }  # fmt: skip


def main(pairs: int = 2000, concurrency: int = 32, latency: float = 0.5) -> None:
    for rates in ({}, RATES):
        print(json.dumps(measure(pairs, concurrency, latency, rates)))


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, int, float), sys.argv[1:])))
