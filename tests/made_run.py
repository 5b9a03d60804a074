# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Write a small run directory with every kind of file that the stages write, without a model.

`python tests/made_run.py DIRECTORY` writes one for inspection.
"""

import json
import math
import random
import sys
from pathlib import Path

from datasets import Dataset
from phantom_rows import benchmark_rows

from medst_trl.base.files import write_json, write_jsonl
from medst_trl.data.schema import benchmark_features, features_of, message, text_part
from medst_trl.demo.phantoms import answer, make_phantoms
from medst_trl.evaluation.predictions import control_path, read_predictions, score_predictions
from medst_trl.evaluation.vqa import CONTROLS
from medst_trl.selftrain.judge.statistics import judge_statistics


VERSIONS = {"python": "3.11.9", "medst_trl": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"}


def write_stage(directory: Path, stage: str, *, status: str = "complete", settings=None, counts=None, **extra) -> Path:
    """Write the directory of a stage with its record."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "stage": stage, "status": status, "started": "2026-01-01T10:00:00+00:00", "seconds": 61.5,
        "versions": VERSIONS, "inputs": {}, "settings": settings or {}, "counts": counts or {}, **extra,
    }  # fmt: skip
    (directory / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    return directory


def write_log(directory: Path, log: list[dict]) -> None:
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": log}), encoding="utf-8")


def prepare(run: Path, n: int = 8) -> list:
    phantoms = make_phantoms(n, seed=0, split="test")
    counts = {
        "datasets": {"instruct/train": {"images": 225, "conversations": 225, "answers": 900}},
        "notes": {"test_images_in_training": 0},
        "rejected": {"truncated": 3, "missing": 1},
    }
    settings = {"source": "phantoms", "num_phantoms": 225, "seed": 0}
    directory = write_stage(run / "prepare", "prepare", settings=settings, counts=counts) / "benchmark"
    directory.mkdir()
    dataset = Dataset.from_list(list(benchmark_rows(phantoms)), features=benchmark_features())
    dataset.to_parquet(directory / "test-00000-of-00001.parquet")
    return phantoms


def sft(run: Path, steps: int = 20) -> None:
    settings = {"model_name_or_path": str(run / "base"), "learning_rate": 7e-4, "sq_ratio": 0.5, "seed": 0}
    counts = {"records": 225, "set_aside": {"too_long": 2}, "truncated": 0, "steps": steps * 10}
    directory = write_stage(run / "sft", "sft", settings=settings, counts=counts)
    write_log(
        directory,
        [
            {
                "step": 10 * i, "loss": 3 * math.exp(-i / 6) + 0.3, "loss_question": 3.4 * math.exp(-i / 5) + 0.5,
                "loss_answer": 2.8 * math.exp(-i / 7) + 0.2, "question_accuracy": 0.8 - 0.7 * math.exp(-i / 5),
                "answer_accuracy": 0.93 - 0.8 * math.exp(-i / 6), "learning_rate": 7e-4,
            }
            for i in range(1, steps + 1)
        ],
    )  # fmt: skip


def generate(run: Path, phantoms: list, round: str = "") -> list[dict]:
    """Write and return candidates: two questions per image, each with a right and a wrong answer."""
    directory = write_stage(
        run / round / "generate",
        "generate",
        settings={"engine": "transformers", "temperature": 1.2, "top_k": 100, "top_p": 0.95},
        counts={
            "images": len(phantoms),
            "questions": 24,
            "candidates": 16,
            "answers": 32,
            "rejected": {"not_a_question": 3, "repeated": 5},
        },
    )
    rows = []
    for phantom in phantoms:
        for n, question in enumerate(phantom.questions[:2]):
            rows.append(
                {
                    "id": f"{phantom.id}#{n}",
                    "images": [phantom.image],
                    "image_ids": [phantom.id],
                    "prompt": [message("user", [text_part(question["question"])])],
                    "answers": [question["answer"], f"Not {question['answer']}, but something else."],
                    "generation": "{}",
                }
            )
    for row in rows:
        for turn in row["prompt"]:
            turn.pop("vusr")
    (directory / "candidates").mkdir()
    dataset = Dataset.from_list(rows, features=features_of("candidates", grouped=False))
    dataset.to_parquet(directory / "candidates" / "train-00000-of-00001.parquet")
    return rows


def judgement(candidate: dict, verdict: int | None = 0, dropped: str | None = None, **changes) -> dict:
    order = {
        "verdict": verdict, "reply": "8 3\nThe first answer is right.", "finish_reason": "stop", "cached": False,
        "usage": {"prompt_tokens": 100, "completion_tokens": 10}, "cost": 0.00012, "scores": [8, 3],
    }  # fmt: skip
    swapped = 1 if dropped == "flip" else verdict
    return {
        "id": candidate["id"], "candidate": candidate["id"], "image_ids": candidate["image_ids"],
        "question": candidate["prompt"][-1]["content"][0]["text"], "answers": candidate["answers"],
        "scores": None if dropped else [8, 3], "verdict": None if dropped else verdict, "dropped": dropped,
        "orders": [order | {"shown": [0, 1]}, order | {"shown": [1, 0], "verdict": swapped}],
        "model": "oracle", "prompt_version": "rubric",
    } | changes  # fmt: skip


def judge(run: Path, candidates: list[dict], round: str = "", rows: list[dict] | None = None) -> None:
    outcomes = [None, None, "flip", None, "tie", "unparsable"]
    rows = rows or [judgement(c, dropped=outcomes[i % len(outcomes)]) for i, c in enumerate(candidates)]
    statistics = judge_statistics(rows)
    rejected = statistics["dropped"] | {"near_duplicate_question": 2}
    train = {"pairs": len(rows) - sum(rejected.values()), "images": 5}
    counts = {"judge": statistics, "preferences": {"pairs": len(rows), "train": train, "rejected": rejected}}
    settings = {"candidates": "generate/candidates", "prompt_version": "rubric", "seed": 0}
    directory = write_stage(run / round / "judge", "judge", settings=settings, counts=counts)
    write_jsonl(directory / "judgements.jsonl", rows)


def dpo(run: Path, round: str = "", chosen: float = -1.0, steps: int = 15) -> None:
    directory = write_stage(
        run / round / "dpo", "dpo", settings={"beta": 0.1, "learning_rate": 5e-6}, counts={"pairs": 8, "steps": steps}
    )
    rng = random.Random(0)
    write_log(
        directory,
        [
            {
                "step": i, "loss": math.log(2) * math.exp(-i / 20), "rewards/margins": 0.1 * i / 5,
                "rewards/accuracies": min(1, 0.5 + i / 30), "rewards/chosen": 0.1 * chosen * i / steps,
                "rewards/rejected": -0.3 * i / steps, "logratios/chosen": chosen * i / steps,
                "logratios/rejected": -3 * i / steps, "logps/chosen": -20 + chosen * i / steps + rng.gauss(0, 0.3),
                "logps/rejected": -24 - 3 * i / steps + rng.gauss(0, 0.3),
                "lengths/chosen": 8.1, "lengths/rejected": 9.3,
            }
            for i in range(1, steps + 1)
        ],
    )  # fmt: skip


def evaluate(run: Path, name: str, phantoms: list, model: str, skill: float, change=None) -> Path:
    """Write predictions of a model that is right with probability `skill`, and their scores."""
    n = sum(len(phantom.questions) for phantom in phantoms)
    counts = {str(run / "prepare" / "benchmark"): {"records": n, "rejected": {}, "cut_off": 0}}
    started = f"2026-01-01T{10 + ('aligned' in name)}:00:00+00:00"
    settings = {"model_name_or_path": str(run / model), "output_dir": str(run / name)}
    directory = write_stage(run / name, "evaluate", settings=settings, counts=counts, started=started)
    rng = random.Random(name)
    for control in [None, *CONTROLS]:
        rows = []
        for phantom in phantoms:
            for question in phantom.questions:
                right = rng.random() < (0.3 if control else skill)
                prediction = answer(question["question"], phantom.truth) if right else "Unclear."
                row = {k: question[k] for k in ("id", "question", "answer", "answer_type", "question_type")}
                image_id = next(iter(benchmark_rows([phantom])))["image_id"]
                rows.append(row | {"image_id": image_id, "prediction": prediction, "generation": {"ended": True}})
        if change and control is None:
            rows = change(rows)
        write_jsonl(control_path(directory / "predictions.jsonl", control), rows)
    about = {
        "benchmark": str(run / "prepare" / "benchmark"),
        "data": {"path": str(run), "sha256": "ab" * 32},
        "split": "test",
        "model": str(run / model),
    }
    path = directory / "predictions.jsonl"
    answers = {control: read_predictions(control_path(path, control))[0] for control in (None, *CONTROLS)}
    scores = score_predictions(answers.pop(None), answers, variants=("strict",), bootstrap_samples=100)
    write_json(directory / "scores.json", about | scores)
    return directory


def whole_run(run: Path, n: int = 8, rounds: int = 0) -> Path:
    write_stage(run / "base", "base", settings={"seed": 0})
    phantoms = prepare(run, n)
    sft(run)
    judge(run, generate(run, phantoms))
    dpo(run)
    evaluate(run, "evaluate/stage_1", phantoms, "sft", 0.5)
    evaluate(run, "evaluate/aligned", phantoms, "dpo", 0.75)
    for number in range(1, rounds + 1):
        round = f"round_{number}"
        judge(run, generate(run, phantoms, round), round)
        dpo(run, round, chosen=0.5)
        evaluate(run, f"{round}/evaluate/aligned", phantoms, f"{round}/dpo", 0.75 + 0.1 * number)
    return run


if __name__ == "__main__":
    whole_run(Path(sys.argv[1]), n=40, rounds=2)
