# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file

from medst_trl import load_policy
from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.pipeline.stages import _training, sft
from medst_trl.training.collator import DataCollatorForSelfQuestioning


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base model and an instruct dataset with both splits, as written by `base` and `prepare`."""
    directory = tmp_path_factory.mktemp("inputs")
    model, processor = tiny_llava(**tiny_run.SMALL)
    model.save_pretrained(directory / "base")
    processor.save_pretrained(directory / "base")
    tiny_run.write_instruct(directory / "instruct", range(12))
    tiny_run.write_instruct(directory / "instruct", range(100, 104), "validation")
    return directory


def _run(inputs, output_dir, **options):
    options = {
        "model_name_or_path": inputs / "base", "dataset": inputs / "instruct", "output_dir": output_dir,
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lora_r": 4, "vision_lora_r": 2,
        "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    arguments = [piece for key, value in options.items() for piece in (f"--{key}", str(value))]
    sft.STAGE.main(*sft.STAGE.make_parser().parse_args_and_config(arguments))
    weights = "adapter_model.safetensors" if options.get("use_lora", True) else "model.safetensors"
    return load_file(output_dir / weights), json.loads((output_dir / "stage.json").read_text())


def new_file_mode(directory):
    (directory / "new").touch()
    return (directory / "new").stat().st_mode & 0o777


def test_a_run_writes_an_adapter_and_its_record(inputs, tmp_path, capsys):
    weights, record = _run(inputs, tmp_path / "sft")
    assert record["status"] == "complete"
    assert record["counts"] == {"records": 12, "set_aside": {}, "truncated": 0, "steps": 3}
    assert record["metrics"]["loss_question"] > 0 and record["metrics"]["loss_answer"] > 0
    kinds = ("language_model", "vision_tower", "multi_modal_projector", "trainable_tokens")
    assert all(any(kind in name for name in weights) for kind in kinds)
    assert not list((tmp_path / "sft").glob("*.incomplete")) and not list((tmp_path / "sft").rglob("*.bin"))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "sft").glob("*.*")} == {new_file_mode(tmp_path)}
    printed = capsys.readouterr().out
    assert "Training" in printed and "projector" in printed and "Stage 1 is done" in printed


def test_the_text_role_needs_no_token(inputs, tmp_path):
    weights, _ = _run(inputs, tmp_path / "sft", vusr_role="text", max_steps=1)
    assert not any("trainable_tokens" in name for name in weights)
    bare = [{"role": "user", "content": [{"type": "text", "text": "<vusr>"}]}]
    assert load_policy(str(tmp_path / "sft"))[1].apply_chat_template(bare).endswith(" VUSER:")


def test_a_run_that_would_train_on_nothing_is_refused_and_can_be_corrected(inputs, tmp_path):
    with pytest.raises(UserError, match="No example of the train dataset can be used: 12 too_long .*=10 "):
        _run(inputs, tmp_path / "sft", max_length=10)
    assert not (tmp_path / "sft" / "stage.json").exists()
    _run(inputs, tmp_path / "sft", max_length=400, max_steps=1)


def test_settings_that_this_machine_cannot_run_are_refused_before_anything_is_read(inputs, tmp_path):
    with pytest.raises(UserError, match=r"(?s)report_to no_such_logger: .*optim lomo"):
        _run(inputs, tmp_path / "sft", report_to="no_such_logger", optim="lomo", dataset="no/such/dataset")
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize(
    "given, problem",
    [
        ("{out}/../other/checkpoint-2", "is not a checkpoint in output_dir"),
        ("{out}", "is not a checkpoint in output_dir"),
        ("{out}/checkpoint-7", "trainer_state.json is missing"),
        ("true", "no complete checkpoint"),
        ("checkpoint-7", "is not a checkpoint in output_dir"),
    ],
)
def test_resume_from_checkpoint_that_cannot_be_resumed_is_refused(inputs, tmp_path, given, problem, monkeypatch):
    monkeypatch.setattr("medst_trl.policy.loading.load_policy", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(UserError, match=problem):
        _run(inputs, tmp_path / "sft", resume_from_checkpoint=given.format(out=tmp_path / "sft"))
    with pytest.raises(UserError, match="overwrite deletes"):
        _run(inputs, tmp_path / "sft", resume_from_checkpoint=given, overwrite=True)
    assert not (tmp_path / "sft" / "stage.json").exists()


@pytest.mark.parametrize("checkpoint", ["{out}/sft/checkpoint-2", "checkpoint-2"])
def test_an_interrupted_stage_resumes_from_the_given_checkpoint(inputs, tmp_path, monkeypatch, capsys, checkpoint):
    expected, _ = _run(inputs, tmp_path / "uninterrupted", max_steps=4)
    options = {"max_steps": 4, "save_steps": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_training, "save_result", _interrupt)
        _run(inputs, tmp_path / "sft", **options)
    capsys.readouterr()
    weights, _ = _run(inputs, tmp_path / "sft", **options, resume_from_checkpoint=checkpoint.format(out=tmp_path))
    assert "Resuming after step 2 of 4." in capsys.readouterr().out
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def _interrupt(trainer):
    raise KeyboardInterrupt


def test_a_finished_run_is_skipped_and_a_changed_setting_is_refused(inputs, tmp_path):
    before, _ = _run(inputs, tmp_path / "sft")
    modified = (tmp_path / "sft" / "adapter_model.safetensors").stat().st_mtime_ns
    _run(inputs, tmp_path / "sft", logging_steps=1, dataloader_num_workers=1)  # these do not change the result
    _run(inputs, tmp_path / "sft", report_to="no_such_logger")  # as if it had been trained on another machine
    assert (tmp_path / "sft" / "adapter_model.safetensors").stat().st_mtime_ns == modified
    with pytest.raises(UserError, match="projector_learning_rate"):
        _run(inputs, tmp_path / "sft", projector_learning_rate=1e-5)
    after, _ = _run(inputs, tmp_path / "sft", projector_learning_rate=1e-5, overwrite=True)
    assert not torch.equal(*(next(v for k, v in w.items() if "projector" in k) for w in (before, after)))


def test_an_interrupted_run_resumes(inputs, tmp_path, monkeypatch):
    uninterrupted, _ = _run(inputs, tmp_path / "uninterrupted", save_steps=2)
    from medst_trl.training.sft import SelfQuestioningTrainer

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SelfQuestioningTrainer, "save_model", _once_then(SelfQuestioningTrainer.save_model, interrupt))
        with pytest.raises(KeyboardInterrupt):
            _run(inputs, tmp_path / "interrupted", save_steps=2)
    assert json.loads((tmp_path / "interrupted" / "stage.json").read_text())["status"] == "running"
    resumed, _ = _run(inputs, tmp_path / "interrupted", save_steps=2)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def _once_then(first, second):
    """Return a function that calls `first` once and `second` from then on."""
    calls = iter([first])
    return lambda *args, **kwargs: next(calls, second)(*args, **kwargs)


def test_an_adapter_is_trained_further(inputs, tmp_path):
    first, _ = _run(inputs, tmp_path / "first")
    second, _ = _run(inputs, tmp_path / "second", model_name_or_path=tmp_path / "first")
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_base_with_settings_that_cannot_be_saved_trains_in_full(inputs, tmp_path):
    """With sampling values and a processor as in older exports: both are saved with every checkpoint."""
    base = tmp_path / "base"
    shutil.copytree(inputs / "base", base)
    generation = json.loads((base / "generation_config.json").read_text()) | {"temperature": 0.9, "top_p": 0.6}
    (base / "generation_config.json").write_text(json.dumps(generation))
    processor = json.loads((base / "processor_config.json").read_text())
    (base / "processor_config.json").write_text(json.dumps(processor | {"num_additional_image_tokens": 0}))
    _run(inputs, tmp_path / "sft", model_name_or_path=base, use_lora=False, save_steps=1, save_strategy="steps")
    for directory in (tmp_path / "sft", *(tmp_path / "sft").glob("checkpoint-*")):
        saved = json.loads((directory / "generation_config.json").read_text())
        assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.9, 0.6)
        assert json.loads((directory / "processor_config.json").read_text()) == processor
    load_policy(str(tmp_path / "sft"))


def test_the_best_checkpoint_by_evaluation_loss_is_kept(inputs, tmp_path):
    weights, _ = _run(
        inputs, tmp_path / "sft", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, early_stopping_patience=1,
    )  # fmt: skip
    state = json.loads((tmp_path / "sft" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = Path(state["best_model_checkpoint"])
    assert best.name == f"checkpoint-{min(losses, key=losses.get)}" and state["best_metric"] == min(losses.values())
    assert weights.keys() == (kept := load_file(best / "adapter_model.safetensors")).keys()
    assert all(torch.equal(weight, kept[name]) for name, weight in weights.items())


def test_only_the_best_checkpoints_are_saved_by_an_accuracy(inputs, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    _run(inputs, tmp_path / "sft", metric_for_best_model="answer_accuracy", **settings)
    state = json.loads((tmp_path / "sft" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(entry.get("eval_answer_accuracy", 0) for entry in state["log_history"])
    assert list((tmp_path / "sft").glob("checkpoint-*"))
    figures = {key[5:] for entry in state["log_history"] for key in entry if key.startswith("eval_")}
    figures -= {"runtime", "samples_per_second", "steps_per_second", "question_tokens", "answer_tokens", "num_tokens"}
    assert figures == {*sft.SftArguments.best_metrics}  # each can be the metric


def test_settings_that_trl_refuses_are_reported_without_a_traceback(inputs, tmp_path):
    with pytest.raises(UserError, match="Cannot train with these settings: .*bogus"):
        _run(inputs, tmp_path / "sft", eos_token="bogus")


def test_early_stopping_without_its_settings_is_refused(inputs, tmp_path):
    with pytest.raises(UserError, match="load_best_model_at_end"):
        _run(inputs, tmp_path / "sft", early_stopping_patience=1)
    assert not (tmp_path / "sft").exists()


def test_a_missing_split_is_reported(inputs, tmp_path):
    with pytest.raises(UserError, match="dev"):
        _run(inputs, tmp_path / "sft", train_split="dev")
    _run(inputs, tmp_path / "sft")  # the corrected command runs


def test_the_projector_can_be_trained_alone(inputs, tmp_path):
    alone = {"lora_r": 0, "vision_lora_r": 0, "train_vusr": False}
    weights, _ = _run(inputs, tmp_path / "sft", **alone)
    assert weights and all("multi_modal_projector" in name for name in weights)
    base = load_file(inputs / "base" / "model.safetensors")
    assert not any(torch.equal(weight, other) for weight in weights.values() for other in base.values())
    further, _ = _run(inputs, tmp_path / "further", **alone, model_name_or_path=tmp_path / "sft")
    assert further.keys() == weights.keys() and any(not torch.equal(further[n], weights[n]) for n in weights)
    model, processor = load_policy(str(tmp_path / "sft"))
    batch = DataCollatorForSelfQuestioning(processor)([tiny_run.conversation(1)])
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        adapted, merged = model(**batch).logits, model.merge_and_unload()(**batch).logits
    assert torch.equal(adapted, merged)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"lora_r": 0}, {"vision_tower", "multi_modal_projector", "trainable_tokens"}),
        ({"lora_r": 0, "vision_lora_r": 0}, {"multi_modal_projector", "trainable_tokens"}),
        ({"train_vusr": False}, {"language_model", "vision_tower", "multi_modal_projector"}),
    ],
    ids=["frozen_language_model", "projector_and_token", "frozen_token"],
)
def test_the_trained_parts_can_be_selected(inputs, tmp_path, options, parts):
    weights, _ = _run(inputs, tmp_path / "sft", **options, max_steps=1)
    kinds = ("vision_tower", "multi_modal_projector", "trainable_tokens", "language_model")
    assert {next(kind for kind in kinds if kind in name) for name in weights} == parts


def test_gradient_accumulation_does_not_change_the_result(inputs, tmp_path, capsys):
    options = {"max_steps": 2, "effective_batch_size": 6, "lora_dropout": 0.0, "optim": "sgd", "learning_rate": 1e-2}
    whole, _ = _run(inputs, tmp_path / "whole", **options, per_device_train_batch_size=6)
    assert "6 conversations per step: 6 x 1 process x 1 accumulated." in capsys.readouterr().out
    accumulated, _ = _run(inputs, tmp_path / "accumulated", **options, per_device_train_batch_size=2)
    assert "6 conversations per step: 2 x 1 process x 3 accumulated." in capsys.readouterr().out
    assert all(torch.allclose(whole[name], accumulated[name], atol=1e-5) for name in whole)
    _run(inputs, tmp_path / "whole", **options, per_device_train_batch_size=3)  # the same run, which is finished
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="effective_batch_size: 6 before, 12 now"):
        _run(inputs, tmp_path / "whole", **options | {"effective_batch_size": 12}, per_device_train_batch_size=6)
    with pytest.raises(UserError, match="effective_batch_size 6 is not a multiple of 4"):
        _run(inputs, tmp_path / "other", **options, per_device_train_batch_size=4)
    assert not (tmp_path / "other").exists()


def test_a_run_resumes_with_another_per_device_batch_size(inputs, tmp_path, monkeypatch):
    options = {
        "max_steps": 4, "effective_batch_size": 6, "lora_dropout": 0.0, "save_steps": 1, "optim": "sgd",
        "learning_rate": 1e-2, "train_sampling_strategy": "group_by_length",
    }  # fmt: skip
    uninterrupted, _ = _run(inputs, tmp_path / "uninterrupted", **options, per_device_train_batch_size=6)
    from medst_trl.training.sft import SelfQuestioningTrainer

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # in the middle of an epoch of two steps
        patch.setattr(SelfQuestioningTrainer, "save_model", _once_then(SelfQuestioningTrainer.save_model, interrupt))
        with pytest.raises(KeyboardInterrupt):
            _run(inputs, tmp_path / "interrupted", **options, per_device_train_batch_size=6)
    resumed, _ = _run(inputs, tmp_path / "interrupted", **options, per_device_train_batch_size=2)
    assert all(torch.allclose(uninterrupted[name], resumed[name], atol=1e-5) for name in uninterrupted)


def test_a_failed_summary_does_not_lose_the_adapter(inputs, tmp_path, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(sft.SftArguments, "summarize", fail)
    with pytest.raises(ZeroDivisionError):
        _run(inputs, tmp_path / "sft", max_steps=1)
    assert (tmp_path / "sft" / "adapter_model.safetensors").exists()
