# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""DPO training: the reference is a frozen copy of the policy, the intended parts train, and logs are correct."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import tiny_dpo
import torch
from commands import launch_script
from datasets import Dataset, DatasetDict
from tiny_dpo import adapter_policy, make_trainer, pair, trained_weights
from transformers import TrainerCallback

from medst_trl.base.errors import UserError
from medst_trl.data.schema import text_of
from medst_trl.policy.adapters import freeze_vision
from medst_trl.training.dpo import MultimodalDPOConfig, MultimodalDPOTrainer
from medst_trl.training.prefix_sharing import with_images_twice


def reference_parameters(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "ref" in name.split(".")}


def name_in_policy(name: str) -> str:
    return ".".join("default" if part == "ref" else part for part in name.split("."))


@pytest.mark.parametrize("tied", [False, True])
def test_the_reference_is_the_whole_policy_and_the_first_loss_is_ln_2(tmp_path, tied):
    trainer = make_trainer(tmp_path, policy=adapter_policy(tie_word_embeddings=tied), max_steps=1)
    parameters, reference = dict(trainer.model.named_parameters()), reference_parameters(trainer.model)
    kinds = ("lora_A", "lora_B", "multi_modal_projector", "trainable_tokens_delta")
    assert all(any(kind in name for name in reference) for kind in kinds)
    for name, parameter in reference.items():
        assert torch.equal(parameter, parameters[name_in_policy(name)]), name
        assert not parameter.requires_grad
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_training_updates_every_part_of_the_policy_but_not_the_reference(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    reference = set(reference_parameters(trainer.model))
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert not changed & reference
    assert changed <= set(trained_weights(trainer))
    # No prompt of stage 2 contains `<vusr>`, so its row has no gradient
    for kind in ("language_model", "vision_tower", "multi_modal_projector"):
        assert any(kind in name for name in changed), kind
    assert trainer.state.log_history[-2]["rewards/margins"] > 0


def test_each_part_has_its_own_learning_rate(tmp_path):
    rates = {"learning_rate": 1e-3, "vision_learning_rate": 2e-3, "projector_learning_rate": 3e-3}
    trainer = make_trainer(tmp_path, max_steps=4, lr_scheduler_type="linear", **rates)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["learning_rate"] for entry in logged] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    for entry in logged:  # the three rates of an entry belong to the same step
        assert entry["learning_rate_vision"] == pytest.approx(2 * entry["learning_rate"])
        assert entry["learning_rate_projector"] == pytest.approx(3 * entry["learning_rate"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_vision_tower_does_not_change_and_has_no_gradient(tmp_path, checkpointing):
    model, processor = adapter_policy()
    freeze_vision(model)
    trainer = make_trainer(tmp_path, policy=(model, processor), max_steps=2, gradient_checkpointing=checkpointing)
    with_gradient = set()

    class RecordGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            with_gradient.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)

    trainer.add_callback(RecordGradients())
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not any("vision_tower" in name for name in changed | with_gradient)
    assert not any("ref" in name.split(".") for name in with_gradient)


@pytest.mark.parametrize("kind", ["new_adapter", "full"])
def test_without_an_adapter_the_model_itself_is_the_reference(tmp_path, kind):
    trainer = make_trainer(tmp_path, policy=kind, max_steps=3)
    reference = trainer.ref_model if kind == "full" else trainer.model.get_base_model()
    frozen = {name: p.clone() for name, p in reference.named_parameters() if not p.requires_grad}
    assert frozen
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.state.log_history[1]["loss"] < math.log(2)
    assert all(torch.equal(p, frozen[name]) for name, p in reference.named_parameters() if name in frozen)


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    model, processor = adapter_policy()
    model.requires_grad_(False)
    with pytest.raises(UserError, match="is_trainable=True"):
        make_trainer(tmp_path, policy=(model, processor))


def test_pairs_that_cannot_be_trained_on_are_rejected(tmp_path):
    rows = [pair(number) for number in range(6)]
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["prompt"][0]["content"][1]["text"] = "long " * 400
    rows[3]["images"] = rows[3]["images"] * 2
    trainer = make_trainer(tmp_path, rows=rows, max_length=100, max_steps=1, per_device_train_batch_size=3)
    assert trainer.usable["train"].rejected_records == {
        "p1": "chosen_equals_rejected",
        "p2": "too_long",
        "p3": "malformed",
    }
    trainer.train()

    with pytest.raises(UserError, match="the train dataset can be used: 1 chosen_equals_rejected .both answers"):
        make_trainer(tmp_path, rows=[rows[1]])


@pytest.mark.parametrize("form", ["texts", "implicit prompt"])
@pytest.mark.parametrize("precomputes", [False, True])
def test_plain_trl_pairs_train_as_ours_do(tmp_path, form, precomputes):
    def plain(row):
        prompt, chosen, rejected = (text_of(row[name][0]["content"]) for name in ("prompt", "chosen", "rejected"))
        if form == "texts":
            return {"image": row["images"][0], "prompt": prompt, "chosen": chosen, "rejected": rejected}
        asked = {"role": "user", "content": prompt}
        answers = ([asked, {"role": "assistant", "content": text}] for text in (chosen, rejected))
        return {"image": row["images"][0]} | dict(zip(("chosen", "rejected"), answers))

    ours, losses = [pair(number) for number in range(6)], []
    for number, rows in enumerate((ours, list(map(plain, ours)))):
        evaluation = {"eval_rows": rows[:2], "eval_strategy": "steps", "eval_steps": 2}
        settings = {"max_steps": 2, "precompute_ref_log_probs": precomputes, "share_prefix": True, **evaluation}
        trainer = make_trainer(tmp_path / str(number), rows=rows, **settings)
        trainer.train()
        log = trainer.state.log_history
        losses.append([entry.get("loss", entry.get("eval_loss")) for entry in log])
        assert not trainer.rejected_records and len(trainer.train_dataset) == 6
    assert losses[0] == losses[1] and None not in losses[0][:3]


def test_rejected_pairs_of_evaluation_are_listed(tmp_path):
    good, bad = pair(50), pair(51)
    bad["rejected"] = bad["chosen"]
    trainer = make_trainer(tmp_path, eval_rows=[good, bad])
    assert (
        trainer.rejected_records == {"eval/p51": "chosen_equals_rejected"}
        and not trainer.usable["train"].rejected_records
    )
    with pytest.raises(UserError, match="the eval dataset can be used"):
        make_trainer(tmp_path, eval_rows=[bad])


def test_answers_that_do_not_fit_are_truncated_and_counted(tmp_path):
    rows = [pair(number) for number in range(4)]
    rows[2]["chosen"][0]["content"][0]["text"] = "long " * 40
    trainer = make_trainer(tmp_path, rows=rows, max_length=110, max_steps=1)
    trainer.train()
    assert trainer.usable["train"].truncated == 1 and not trainer.usable["train"].rejected_records


def test_logs_have_lengths_and_log_ratios(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, beta=0.5, eval_rows=[pair(50), pair(51)])
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["lengths/chosen"] > first["lengths/rejected"] > 1  # the chosen answers of these pairs are longer
    assert second["logratios/chosen"] == pytest.approx(second["rewards/chosen"] / 0.5)
    assert "eval_lengths/chosen" in trainer.evaluate()


@pytest.mark.parametrize("loss_type", [["sigmoid", "sft"], ["ipo"], ["hinge"], ["robust"]])
def test_losses_of_trl_and_their_sums_can_be_trained(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, max_steps=1, loss_type=loss_type, label_smoothing=0.1)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"loss_type": ["nonsense"]}, "nonsense"),
        ({"train_sampling_strategy": "group_by_lenght"}, "Did you mean 'group_by_length'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "Unknown train_sampling_strategy 'batch_rebalance'"),
    ],
)
def test_invalid_settings_are_refused_before_a_model_is_loaded(tmp_path, settings, message):
    with pytest.raises((ValueError, UserError), match=message):
        MultimodalDPOConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_every_sampling_strategy_trains_on_every_pair(tmp_path, strategy):
    trainer = make_trainer(tmp_path, train_sampling_strategy=strategy, max_steps=-1, num_train_epochs=1)
    assert sorted(trainer._get_train_sampler()) == list(range(12))
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_evaluation_sets_are_each_checked(tmp_path, monkeypatch, kind):
    bad = pair(52)
    bad["rejected"] = bad["chosen"]
    sets = kind(one=Dataset.from_list([pair(50), pair(51)]), other=Dataset.from_list([bad, pair(53), pair(54)]))
    trainer = trainer_with_datasets(tmp_path, None, sets, eval_strategy="steps", eval_steps=2, max_steps=2)
    assert {name: len(dataset) for name, dataset in trainer.eval_dataset.items()} == {"one": 2, "other": 2}
    trainer.train()
    alone = trainer_with_datasets(tmp_path, None, Dataset.from_list([pair(53), pair(54)]), max_steps=2)
    alone.train()
    log = trainer.state.log_history
    assert len([entry for entry in log if "eval_one_loss" in entry]) == 1
    (other,) = [entry for entry in log if "eval_other_loss" in entry]
    expected = alone.evaluate()
    assert other["eval_other_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    assert other["eval_logps/chosen"] == pytest.approx(expected["eval_logps/chosen"], abs=1e-4)


def trainer_with_datasets(output_dir, train, evaluation, **settings) -> MultimodalDPOTrainer:
    model, processor = adapter_policy()
    args = MultimodalDPOConfig(
        output_dir=str(output_dir), report_to="none", save_strategy="no", disable_tqdm=True, seed=3,
        gradient_checkpointing=False, per_device_train_batch_size=4, **settings,
    )  # fmt: skip
    train = Dataset.from_list([pair(number) for number in range(12)]) if train is None else train
    return MultimodalDPOTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=evaluation, processing_class=processor
    )


def test_datasets_that_cannot_be_checked_are_refused(tmp_path):
    pairs = Dataset.from_list([pair(number) for number in range(4)])
    args = MultimodalDPOConfig(output_dir=str(tmp_path), report_to="none", max_steps=1)
    for train, evaluation, name in [
        (pairs.to_iterable_dataset(), None, "train_dataset"),
        (DatasetDict(train=pairs), None, "train_dataset"),
        (pairs, pairs.to_iterable_dataset(), "eval_dataset"),
        (pairs, {"held_out": pairs.to_iterable_dataset()}, "held_out"),
    ]:
        with pytest.raises(UserError, match=f"{name}.*Dataset.*without streaming"):  # before a model is loaded
            MultimodalDPOTrainer("no/such-model", args, train_dataset=train, eval_dataset=evaluation)


def test_the_error_for_a_missing_images_column_says_how_to_add_it(tmp_path):
    rows = [pair(number) for number in range(4)]
    for row in rows:
        del row["images"], row["prompt"][0]["content"][0]
    with pytest.raises(UserError, match="add `images: \\[\\]`"):
        make_trainer(tmp_path, rows=rows)
    dataset = Dataset.from_list(rows)
    dataset = dataset.add_column("images", [[]] * len(dataset))  # as the message suggests
    trainer = trainer_with_datasets(tmp_path, dataset, None, max_steps=1, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_adapter_is_saved_without_its_reference_and_can_be_loaded(tmp_path):
    from medst_trl import load_policy

    model, processor = adapter_policy(save_to=tmp_path)
    trainer = make_trainer(tmp_path / "dpo", policy=(model, processor), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "ref").exists()
    loaded, _ = load_policy(str(tmp_path / "saved"))
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    inputs = with_images_twice({key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")})
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)


def run_training_script(
    directory: Path, *arguments: str, ranks: int = 1, zero_2: bool = False, **overrides
) -> subprocess.CompletedProcess:
    if zero_2:
        overrides["ddp_backend"] = "gloo"
    directory.mkdir(parents=True, exist_ok=True)
    kind = "zero2" if zero_2 else "ddp"
    return launch_script("tiny_dpo.py", str(directory), json.dumps(overrides), *arguments, ranks=ranks, kind=kind)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    uninterrupted = run_training_script(tmp_path / "uninterrupted", **settings)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert run_training_script(tmp_path / "interrupted", "--kill_after_step", "5", **settings).returncode == -9
    assert run_training_script(tmp_path / "interrupted", **settings).returncode == 0
    weights, expected = (torch.load(tmp_path / name / "weights.pt") for name in ("interrupted", "uninterrupted"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sigmoid", "sft"], ["my_sigmoid"]], ids="+".join)
@pytest.mark.parametrize("zero_2", [False, True], ids=["ddp", "zero_2"])
def test_two_ranks_give_the_losses_of_one(tmp_path, plugin, loss_type, zero_2):
    """Per-pair losses do not depend on how pairs are split; TRL's `sft` term is a mean over the tokens of a rank."""
    plugin(tiny_dpo.SIGMOID)
    if zero_2:
        pytest.importorskip("deepspeed")
    runs = {}
    for ranks in (1, 2):
        directory = tmp_path / str(ranks)
        settings = {"per_device_train_batch_size": 4 // ranks, "loss_type": loss_type, "optim": "sgd"}
        run = run_training_script(directory, ranks=ranks, zero_2=zero_2 and ranks == 2, **settings)
        assert run.returncode == 0, run.stderr
        runs[ranks] = json.loads((directory / "run.json").read_text())
        assert runs[ranks]["world_size"] == ranks
        assert runs[ranks]["kind"].endswith(("NO", "DEEPSPEED" if zero_2 else "CPU"))
    losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in runs.values()]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert difference < (0.05 if "sft" in loss_type else 1e-5)
