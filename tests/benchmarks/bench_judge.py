# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Throughput of the judge's client with a faulty server, as a share of the highest possible throughput.

```bash
python tests/benchmarks/bench_judge.py                 # 2,000 pairs, 32 concurrent calls
python tests/benchmarks/bench_judge.py 500 16 0.5      # pairs, concurrent calls, latency in seconds
```

The server runs in a separate process. Its responses are 10% 429, 5% 500, 5% timeouts, 5% garbage and 2% truncated
bodies. The ideal time is the total time that all calls, including failed and repeated ones, spend at the server,
divided by the number of concurrent calls. The throughput is the ideal time divided by the measured time. The rest is
overhead of the client, slots that are empty while calls wait to be retried, and the end of the run.
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
    from medst_trl.selftrain.judge.pairwise import PairwiseJudge
    from medst_trl.selftrain.judge.statistics import judge_statistics

    pipe, server_pipe = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(server_pipe, latency, rates), daemon=True)
    process.start()
    judge = PairwiseJudge("judge", base_url=pipe.recv(), concurrency=concurrency, timeout=TIMEOUT)
    rows = candidates(pairs)
    start, cpu_start = time.perf_counter(), time.process_time()
    judgements = list(judge(rows))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    pipe.send("end")
    busy, outcomes, most = pipe.recv()
    process.join()
    statistics = judge_statistics(judgements)
    return {
        "pairs": pairs, "concurrency": concurrency, "latency": latency, "seconds": round(seconds, 2),
        "allowed_seconds": round(busy / concurrency, 2), "throughput": round(busy / concurrency / seconds, 3),
        "client_ms_a_call": round(1000 * cpu_seconds / sum(outcomes.values()), 2), "most_at_once": most,
        "judged": statistics["judged"], "dropped": statistics["dropped"], "outcomes": outcomes,
    }  # fmt: skip


def main(pairs: int = 2000, concurrency: int = 32, latency: float = 0.5) -> None:
    for rates in ({}, RATES):
        print(json.dumps(measure(pairs, concurrency, latency, rates)))


if __name__ == "__main__":
    main(*(kind(argument) for kind, argument in zip((int, int, float), sys.argv[1:])))
