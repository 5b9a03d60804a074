# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import shutil

import pytest
import tiny_dpo
import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_file

from medst_trl import load_policy
from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import fingerprint
from medst_trl.data.images import image_id
from medst_trl.data.schema import preference_features
from medst_trl.pipeline.stages import dpo


def write_pairs(directory, rows, split="train"):
    directory.mkdir(exist_ok=True)
    columns = {"image_ids": ["x"], "score_chosen": 9.0, "score_rejected": 2.0, "judge": "{}"}
    dataset = Dataset.from_list([row | columns for row in rows], features=preference_features())
    dataset.to_parquet(directory / f"{split}-00000-of-00001.parquet")
    return directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """An adapter and preference pairs with both splits, as written by `sft` and `judge`."""
    directory = tmp_path_factory.mktemp("inputs")
    model, processor = tiny_dpo.adapter_policy(save_to=directory)
    model.save_pretrained(directory / "sft", save_embedding_layers=False)
    processor.save_pretrained(directory / "sft")
    write_pairs(directory / "preferences", [tiny_dpo.pair(number) for number in range(12)])
    write_pairs(directory / "preferences", [tiny_dpo.pair(number) for number in range(50, 54)], "validation")
    return directory


def run(inputs, output_dir, **options):
    options = {
        "model_name_or_path": inputs / "sft", "dataset": inputs / "preferences", "output_dir": output_dir,
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    arguments = [piece for key, value in options.items() for piece in (f"--{key}", str(value))]
    dpo.STAGE.main(*dpo.STAGE.make_parser().parse_args_and_config(arguments))
    return load_file(output_dir / "adapter_model.safetensors"), json.loads((output_dir / "stage.json").read_text())


def test_the_adapter_is_trained_further_and_saved_with_its_record(inputs, tmp_path, capsys):
    weights, record = run(inputs, tmp_path / "dpo", eval_strategy="steps", eval_steps=3)
    before = load_file(inputs / "sft" / "adapter_model.safetensors")
    assert set(weights) == set(before)
    assert any(not torch.equal(weights[name], before[name]) for name in before)
    assert record["status"] == "complete" and record["counts"]["pairs"] == 12 and record["counts"]["steps"] == 3
    names = {"rewards/margins", "logps/chosen", "logratios/chosen", "lengths/rejected", "eval_rewards/accuracies"}
    assert names <= set(record["metrics"])
    assert not (tmp_path / "dpo" / "ref").exists() and not list((tmp_path / "dpo").rglob("training_args.bin"))
    printed = capsys.readouterr().out
    assert "Stage 2 is done: 3 steps on 12 preference pairs" in printed and "nats" in printed
    load_policy(str(tmp_path / "dpo"))


def test_pairs_of_ones_own_are_trained_on_beside_those_of_the_judge(inputs, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    rows = []
    for number in range(4):
        tiny_dpo.pair(20 + number)["images"][0].save(own / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "prompt": f"Which plane, {number}?", "chosen": "Axial", "rejected": "No"}
        )
    rows[3]["image"] = "missing.png"
    (own / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(inputs / "preferences", tmp_path / "preferences")
    before = {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
    names = [tmp_path / "preferences", own / "pairs.jsonl"]

    def run_both():
        options = {
            "model_name_or_path": inputs / "sft", "output_dir": tmp_path / "dpo", "report_to": "none", "max_steps": 1,
            "per_device_train_batch_size": 4, "disable_tqdm": True, "precompute_ref_log_probs": True,
            "oversample": True,
        }  # fmt: skip
        given = [piece for key, value in options.items() for piece in (f"--{key}", str(value))]
        given += ["--dataset", *map(str, names), "--dataset_weights", "3", "1"]
        dpo.STAGE.main(*dpo.STAGE.make_parser().parse_args_and_config(given))
        return json.loads((tmp_path / "dpo" / "stage.json").read_text())

    record = run_both()
    assert record["counts"]["pairs"] >= 16 and record["counts"]["steps"] == 1
    assert set(record["counts"]["set_aside"]) == {"unreadable_image"}
    assert [item["path"] for item in record["inputs"]["dataset"]] == list(map(str, names))
    assert list((tmp_path / "dpo" / "reference_log_probs").glob("*.jsonl"))
    ids = json.loads((tmp_path / "dpo" / "training_images.json").read_text())["image_ids"]
    assert {image_id(tiny_dpo.pair(20 + number)["images"][0]) for number in range(3)} <= set(ids)
    assert before == {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
    capsys.readouterr()
    run_both()
    assert "finished and unchanged" in capsys.readouterr().out


def test_every_figure_of_an_evaluation_can_select_the_best_checkpoint(inputs, tmp_path):
    run(
        inputs, tmp_path / "dpo", eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="rewards/accuracies",
    )  # fmt: skip
    state = json.loads((tmp_path / "dpo" / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == max(entry["eval_rewards/accuracies"] for entry in evaluations)
    figures = {name.removeprefix("eval_") for name in evaluations[0] if name.startswith("eval_")}
    figures -= {"runtime", "samples_per_second", "steps_per_second", "num_tokens"}
    assert figures == {*dpo.DpoArguments.best_metrics}


def test_the_model_card_shows_how_to_load_a_vision_language_model(inputs, tmp_path):
    run(inputs, tmp_path / "dpo")
    card = (tmp_path / "dpo" / "README.md").read_text()
    assert "load_policy" in card and "<vusr>" in card
    assert not re.search(r"pipeline\(.text-generation", card)


def test_a_finished_run_is_skipped_and_a_changed_setting_is_refused(inputs, tmp_path):
    run(inputs, tmp_path / "dpo")
    modified = (tmp_path / "dpo" / "adapter_model.safetensors").stat().st_mtime_ns
    run(inputs, tmp_path / "dpo", logging_steps=2)
    assert (tmp_path / "dpo" / "adapter_model.safetensors").stat().st_mtime_ns == modified
    with pytest.raises(UserError, match="beta: 0.1 before, 0.5 now"):
        run(inputs, tmp_path / "dpo", beta=0.5)


def test_a_frozen_vision_tower_is_saved_unchanged(inputs, tmp_path):
    weights, _ = run(inputs, tmp_path / "dpo", train_vision=False)
    before = load_file(inputs / "sft" / "adapter_model.safetensors")
    changed = {name for name in before if not torch.equal(weights[name], before[name])}
    assert changed and not any("vision_tower" in name for name in changed)


def test_a_model_without_an_adapter_gets_a_new_one(inputs, tmp_path):
    weights, _ = run(inputs, tmp_path / "dpo", model_name_or_path=inputs / "base", lora_r=4, vision_lora_r=2)
    assert any("vision_tower" in name and "lora_A" in name and len(w) == 2 for name, w in weights.items())


def test_identical_answers_are_rejected_and_a_dataset_of_only_such_pairs_is_refused(inputs, tmp_path):
    rows = [tiny_dpo.pair(number) for number in range(8)]
    rows[3]["rejected"] = rows[3]["chosen"]
    pairs = write_pairs(tmp_path / "pairs", rows)
    _, record = run(inputs, tmp_path / "dpo", dataset=pairs)
    assert record["counts"]["set_aside"] == {"chosen_equals_rejected": 1}
    (line,) = (tmp_path / "dpo" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "p3"

    pairs = write_pairs(tmp_path / "same", [rows[3]])
    with pytest.raises(UserError, match="1 chosen_equals_rejected .both answers say the same"):
        run(inputs, tmp_path / "none", dataset=pairs)
    run(inputs, tmp_path / "none")  # the failed run left no record that would refuse this one


def test_an_invalid_dataset_is_refused_before_a_directory_is_created(inputs, tmp_path):
    with pytest.raises(UserError, match="medst judge"):
        invalid = tmp_path / "invalid"
        invalid.mkdir()
        Dataset.from_list([{"id": "1"}]).to_parquet(invalid / "train-00000-of-00001.parquet")
        run(inputs, tmp_path / "dpo", dataset=invalid)
    assert not (tmp_path / "dpo").exists()


def cached_files(directory):
    return sorted(path.name for path in (directory / "reference_log_probs").iterdir())


def test_reference_log_probs_are_cached_next_to_the_pairs_and_reused(inputs, tmp_path, capsys):
    pairs = shutil.copytree(inputs / "preferences", tmp_path / "preferences")
    before = fingerprint(pairs)
    options = {"dataset": pairs, "precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 3}
    live, _ = run(inputs, tmp_path / "live", **options | {"precompute_ref_log_probs": False})
    first, record = run(inputs, tmp_path / "first", **options)
    assert record["settings"]["precompute_ref_log_probs"] is True and "eval_rewards/margins" in record["metrics"]
    (name,) = cached_files(pairs)
    assert name.endswith(".jsonl") and not (tmp_path / "first" / "reference_log_probs").exists()
    assert fingerprint(pairs) == before  # so a run that started without the cache can resume
    assert len(load_dataset(str(pairs), split="train")) == 12  # the cache is not loaded as pairs
    capsys.readouterr()
    again, _ = run(inputs, tmp_path / "again", **options, beta=0.1)
    assert "16 of 16 pairs are known" in capsys.readouterr().out and cached_files(pairs) == [name]
    for weights in (first, again):
        assert all(torch.allclose(weights[key], live[key], atol=2e-5) for key in live)
    run(inputs, tmp_path / "again", **options, ref_log_probs_dir=tmp_path / "elsewhere")  # finished: nothing to do
    assert not (tmp_path / "elsewhere").exists()


def test_reference_log_probs_of_read_only_pairs_are_read_and_cached_in_the_run_directory(
    inputs, tmp_path, capsys, monkeypatch
):
    pairs = shutil.copytree(inputs / "preferences", tmp_path / "preferences")
    run(inputs, tmp_path / "first", dataset=pairs, precompute_ref_log_probs=True, max_records=8)
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and str(path).startswith(str(pairs))))
    before = [(path, path.stat().st_mtime_ns) for path in sorted(pairs.rglob("*"))]
    capsys.readouterr()
    run(inputs, tmp_path / "second", dataset=pairs, precompute_ref_log_probs=True)
    assert "8 of 12 pairs are known" in capsys.readouterr().out
    assert set(cached_files(pairs)) < set(cached_files(tmp_path / "second"))
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted(pairs.rglob("*"))]
    # `overwrite` keeps the cache of the run.
    options = {"dataset": pairs, "precompute_ref_log_probs": True, "beta": 0.5, "overwrite": True}
    run(inputs, tmp_path / "second", **options)
    assert "12 of 12 pairs are known" in capsys.readouterr().out


def test_another_directory_for_reference_log_probs_can_be_set(inputs, tmp_path):
    pairs = shutil.copytree(inputs / "preferences", tmp_path / "preferences")
    options = {"dataset": pairs, "precompute_ref_log_probs": True, "ref_log_probs_dir": tmp_path / "shared" / "cache"}
    run(inputs, tmp_path / "dpo", **options)
    assert len(list((tmp_path / "shared" / "cache").glob("*.jsonl"))) == 1
    assert not (pairs / "reference_log_probs").exists()


def test_a_pair_with_a_broken_image_is_listed_as_rejected(inputs, tmp_path, capsys):
    rows = [tiny_dpo.pair(number) for number in range(8)]
    rows[3]["images"] = [{"bytes": b"not an image", "path": None}]
    write_pairs(tmp_path / "pairs", rows, "validation")
    pairs = write_pairs(tmp_path / "pairs", rows)
    _, record = run(inputs, tmp_path / "dpo", dataset=pairs, eval_strategy="epoch")
    assert record["counts"]["set_aside"] == {"unreadable_image": 1} and record["counts"]["steps"] == 3
    rejected = [json.loads(line)["id"] for line in (tmp_path / "dpo" / "rejected.jsonl").read_text().splitlines()]
    assert rejected == ["p3", "eval/p3"]
    assert "1 rejected from the evaluation data" in capsys.readouterr().out


def test_all_weights_of_an_adapter_cannot_be_trained(inputs, tmp_path):
    with pytest.raises(UserError, match="use_lora is false, but .*sft is an adapter"):
        run(inputs, tmp_path / "dpo", use_lora=False)
    assert not (tmp_path / "dpo" / "stage.json").exists()
