# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import math
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import tiny_run
import torch
from commands import launch_script
from datasets import Dataset
from transformers import EarlyStoppingCallback

from medst_trl.base.errors import UserError
from medst_trl.data.schema import instruct_features, text_of
from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.families import model_parts
from medst_trl.policy.loading import load_policy
from medst_trl.policy.vusr import add_vusr
from medst_trl.training.collator import DataCollatorForSelfQuestioning, usable_conversations
from medst_trl.training.encoding import IGNORED
from medst_trl.training.sft import SelfQuestioningConfig, SelfQuestioningTrainer


RATES = {"learning_rate": 1e-2, "vision_learning_rate": 1e-3, "projector_learning_rate": 1e-4}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_group_trains_at_its_own_learning_rate_and_other_weights_do_not_change(tmp_path, lora, tied):
    gradients = {}

    def record_gradient(
        name, parameter
    ):  # LoRA's A gets its first gradient in the second step, when B is no longer zero
        gradients[name] = max(gradients.get(name, 0), parameter.grad.abs().max().item())

    trainer = tiny_run.make_trainer(
        tmp_path,
        lora=lora,
        max_steps=2,
        weight_decay=0.0,
        max_grad_norm=0.0,
        model={"tie_word_embeddings": tied},
        **RATES,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(record_gradient, name))
    trainer.train()

    parts, change = model_parts(trainer.model), {}
    for name, parameter in trainer.model.named_parameters():
        change[name] = (parameter - before[name]).abs().max().item()
        if not parameter.requires_grad:
            assert change[name] == 0, f"{name} is frozen but changed"
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    # In full training, the last layer and the output norm of the vision tower are unused.
    unused = {n for n in trained if "vision_tower.encoder.layers.2." in n or "post_layernorm" in n or "post_norm" in n}
    assert not (lora and unused)
    for name in trained - unused:
        assert gradients.get(name, 0) > 0, f"{name} has no gradient"
        assert change[name] > 0, f"{name} did not change"
    if lora:
        kinds = {"lora_A": 0, "lora_B": 0, "modules_to_save": 0, "trainable_tokens_delta": 0}
        for name in trained:
            kinds[next(kind for kind in kinds if kind in name)] += 1
        assert all(kinds.values()) and kinds["trainable_tokens_delta"] == 1
    # Adam's first steps change a weight by its learning rate, independent of the size of the gradient
    for part, rate in {"language": 1e-2, "vision": 1e-3, "projector": 1e-4}.items():
        largest = max(change[name] for name in trained if parts.part_of(name) == part)
        assert 1.0 * rate < largest < 2.1 * rate, part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_are_kept_in_full_precision(tmp_path, dtype):
    """At the paper's projector learning rate, most updates are smaller than the spacing of 16-bit numbers."""
    model, processor = tiny_run.small_policy()
    model.to(dtype)
    config = adapter_config(model, vusr_token_id=add_vusr(processor), r=4, vision_r=2)
    settings = {"bf16": True, "use_cpu": True} if dtype == torch.bfloat16 else {}
    policy = (model, processor, config)
    trainer = tiny_run.make_trainer(tmp_path, max_steps=3, learning_rate=2e-5, policy=policy, **settings)
    before = tiny_run.trained_weights(trainer)
    assert all(weight.dtype == torch.float32 for weight in before.values())
    if dtype == torch.float16:  # also outside autocast: inputs are cast to the projector's type
        batch = trainer.data_collator([tiny_run.conversation(0)])
        batch.pop("question_mask")
        assert trainer.model(**batch).loss.isfinite()
    trainer.train()
    after = tiny_run.trained_weights(trainer)
    change = {n: (after[n] != before[n]).float().mean() for n in before if "projector" in n and n.endswith("weight")}
    assert change and min(change.values()) > 0.9


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, use_reentrant):
    settings = {"max_steps": 2, "lora_dropout": 0.0}
    plain = tiny_run.make_trainer(tmp_path / "plain", **settings)
    plain.train()
    trainer = tiny_run.make_trainer(
        tmp_path / "checkpointed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        **settings,
    )
    trainer.train()
    expected = tiny_run.trained_weights(plain)
    for name, weight in tiny_run.trained_weights(trainer).items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_an_unreadable_image_is_rejected_and_training_continues(tmp_path, strategy):
    rows = [tiny_run.conversation(number) for number in range(8)]
    for row in rows:
        file = BytesIO()
        row["images"][0].save(file, "PNG")
        row["images"] = [{"bytes": file.getvalue(), "path": None}]
    for number, size in ((3, 40), (5, 0)):  # without pixels, and empty
        rows[number]["images"][0]["bytes"] = rows[number]["images"][0]["bytes"][:size]
    features = instruct_features()
    features.pop("image_ids")
    trainer = tiny_run.make_trainer(
        tmp_path, rows=rows, features=features, max_steps=2, train_sampling_strategy=strategy
    )
    trainer.train()
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in rejected} == {"r3": "unreadable_image", "r5": "unreadable_image"}


def test_the_evaluation_loss_excludes_rejected_examples(tmp_path):
    rows = [tiny_run.conversation(i) for i in range(4)]
    rows[2]["messages"][1]["content"][0]["text"] = "very " * 200
    settings = {"max_length": 100, "per_device_eval_batch_size": 1}
    with_long = tiny_run.make_trainer(tmp_path, eval_dataset=Dataset.from_list(rows), **settings).evaluate()
    del rows[2]
    without = tiny_run.make_trainer(tmp_path, eval_dataset=Dataset.from_list(rows), **settings).evaluate()
    assert with_long["eval_loss"] == pytest.approx(without["eval_loss"], abs=1e-6)
    tokens = {kind: without[f"eval_{kind}_tokens"] for kind in ("question", "answer")}
    mean = sum(without[f"eval_loss_{kind}"] * n for kind, n in tokens.items()) / sum(tokens.values())
    assert without["eval_loss"] == pytest.approx(mean, abs=1e-6)


def test_a_replaced_chat_template_is_refused(tmp_path):
    with pytest.raises(UserError, match="chat_template"):
        tiny_run.make_trainer(tmp_path, chat_template_path="other.jinja")


def _trainer_with_dataset(output_dir, dataset, **settings) -> SelfQuestioningTrainer:
    model, processor = tiny_run.small_policy()
    eval_dataset = settings.pop("eval_dataset", None)
    args = SelfQuestioningConfig(
        output_dir=str(output_dir), report_to="none", max_steps=1, per_device_train_batch_size=4, disable_tqdm=True,
        save_strategy="no", logging_steps=1, **settings,
    )  # fmt: skip
    return SelfQuestioningTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=eval_dataset, processing_class=processor
    )


def test_the_error_for_a_missing_images_column_says_how_to_add_it(tmp_path):
    dataset = Dataset.from_list([tiny_run.conversation(i, with_image=False) for i in range(4)]).remove_columns(
        "images"
    )
    for data in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(UserError, match=r"add `images: \[\]`"):
            _trainer_with_dataset(tmp_path, data, train_sampling_strategy="group_by_length")
    trainer = _trainer_with_dataset(tmp_path, dataset.add_column("images", [[]] * len(dataset)))
    trainer.train()
    assert trainer.state.log_history[0]["answer_tokens"] > 0


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_a_streamed_dataset_is_trained_on_in_order_with_a_warning_for_other_strategies(tmp_path, caplog, strategy):
    dataset = Dataset.from_list([tiny_run.conversation(i) for i in range(8)]).to_iterable_dataset()
    _trainer_with_dataset(tmp_path, dataset, train_sampling_strategy=strategy).train()
    warnings = [record for record in caplog.records if "group_by_length" in record.message]
    assert len(warnings) == (strategy == "group_by_length")


@pytest.mark.parametrize("settings", [{}, {"pack_sequences": True}, {"train_sampling_strategy": "group_by_length"}])
def test_plain_trl_conversations_train_as_ours_do(tmp_path, settings):
    ours = [tiny_run.conversation(i) for i in range(8)]
    plain = [
        {
            "id": row["id"],
            "image": row["images"][0],
            "messages": [
                {"role": turn["role"], "content": text_of(turn["content"]), "name": "x"} for turn in row["messages"]
            ],
        }
        for row in ours
    ]
    losses = []
    for dataset in (Dataset.from_list(ours), Dataset.from_list(plain), Dataset.from_list(plain).to_iterable_dataset()):
        if isinstance(dataset, Dataset) or not settings:
            trainer = _trainer_with_dataset(tmp_path, dataset, **settings)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1] and all(math.isfinite(loss) for loss in losses)


def test_another_collator_keeps_all_examples(tmp_path):
    model, processor = tiny_run.small_policy()
    args = SelfQuestioningConfig(output_dir=str(tmp_path), report_to="none", max_length=80)
    dataset = Dataset.from_list([tiny_run.conversation(i, turns=1 + i % 2) for i in range(4)])
    collate = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)
    trainer = SelfQuestioningTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=processor, data_collator=lambda x: collate(x)
    )
    assert len(trainer.train_dataset) == 4


def test_prompts_with_completions_are_packed(tmp_path):
    rows = [tiny_run.conversation(i, turns=1) for i in range(8)]
    for row in rows:
        row["prompt"], row["completion"] = row["messages"][:1], row.pop("messages")[1:]
    trainer = _trainer_with_dataset(tmp_path, Dataset.from_list(rows), pack_sequences=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "token_mask" in batch and len(trainer.train_lengths) == 8
    trainer.train()
    assert "loss_question" not in trainer.state.log_history[0]


def test_a_prompt_is_no_target_and_a_completion_that_does_not_fit_is_rejected(tmp_path):
    rows = [tiny_run.conversation(i, turns=1) for i in range(8)]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": "word " * 60}]
        row["completion"] = [{"role": "assistant", "content": tiny_run.text("yes")}]
        del row["messages"]
    with pytest.raises(UserError, match="8 too_long"):
        _trainer_with_dataset(tmp_path, Dataset.from_list(rows), max_length=40)
    trainer = _trainer_with_dataset(tmp_path, Dataset.from_list(rows), max_length=400)
    trainer.train()
    assert trainer.state.log_history[0]["answer_tokens"] <= 4 * len("yes") + 4


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_question_alone_that_is_not_drawn_is_skipped_only_in_its_epoch(tmp_path, caplog, is_stream):
    rows = [tiny_run.conversation(number, turns=1) for number in range(8)]
    for row in rows[1:]:
        row["id"] += "-question"
        del row["messages"][1]
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    trainer = _trainer_with_dataset(tmp_path, dataset)
    trainer.train()
    skipped = [entry.message for entry in caplog.records if "is skipped as nothing_to_train" in entry.message]
    assert bool(skipped) == is_stream and not trainer.rejected_records


def test_only_map_style_datasets_have_lengths_and_several_datasets_can_be_evaluated(tmp_path):
    dataset = Dataset.from_list([tiny_run.conversation(i) for i in range(8)])
    collator = DataCollatorForSelfQuestioning(tiny_run.small_policy()[1])
    assert usable_conversations(dataset.to_iterable_dataset(), collator).lengths == []
    sets = {"one": dataset.select(range(3)), "other": dataset.to_iterable_dataset()}
    trainer = _trainer_with_dataset(tmp_path, dataset, train_sampling_strategy="group_by_length", eval_dataset=sets)
    trainer.train()
    assert {"eval_one_loss", "eval_other_loss"} <= trainer.evaluate().keys()


def test_the_log_contains_each_part_and_turn_kind(tmp_path):
    trainer = tiny_run.make_trainer(tmp_path, max_steps=2, **RATES)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert (entry["learning_rate"], entry["learning_rate_vision"], entry["learning_rate_projector"]) == (
        1e-2,
        1e-3,
        1e-4,
    )
    tokens = {kind: entry[f"{kind}_tokens"] for kind in ("question", "answer")}
    mean = sum(entry[f"loss_{kind}"] * n for kind, n in tokens.items()) / sum(tokens.values())
    assert entry["loss"] == pytest.approx(mean, abs=1e-5)
    for kind in tokens:
        assert 0 <= entry[f"{kind}_accuracy"] <= 1


def test_token_counts_match_the_batch(tmp_path):
    trainer = tiny_run.make_trainer(tmp_path, n=4, max_steps=1, sq_ratio=1.0)
    batch = trainer.data_collator([tiny_run.conversation(i) for i in range(4)])
    trainer.train()
    entry = trainer.state.log_history[0]
    questions = batch["question_mask"]
    assert entry["question_tokens"] == questions.sum()
    assert entry["answer_tokens"] == ((batch["labels"] != IGNORED) & ~questions).sum()


def test_the_question_weight_scales_only_the_question_loss(tmp_path):
    losses, entries = {}, {}
    for weight in (1.0, 0.0, 3.0):
        trainer = tiny_run.make_trainer(tmp_path, max_steps=1, question_loss_weight=weight)
        trainer.train()
        entries[weight] = trainer.state.log_history[0]
        losses[weight] = entries[weight]["loss"]
    plain = entries[1.0]
    tokens = plain["question_tokens"] + plain["answer_tokens"]
    question, answer = (plain[f"loss_{kind}"] * plain[f"{kind}_tokens"] / tokens for kind in ("question", "answer"))
    assert losses[0.0] == pytest.approx(answer, abs=1e-5)
    assert losses[3.0] == pytest.approx(3 * question + answer, abs=1e-5)


def test_weight_decay_is_not_applied_to_the_token_row(tmp_path):
    trainer = tiny_run.make_trainer(tmp_path, max_steps=1, weight_decay=0.1)
    trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            no_decay = "trainable_tokens" in name or name.endswith("bias")
            assert decay[id(parameter)] == (0.0 if no_decay else 0.1), name


def test_evaluation_asks_the_same_turns_in_every_epoch(tmp_path):
    rows = [tiny_run.conversation(i, turns=3) for i in range(8)]
    trainer = tiny_run.make_trainer(tmp_path, eval_dataset=Dataset.from_list(rows))
    first = trainer.evaluate()
    trainer.data_collator.set_epoch(5)
    second = trainer.evaluate()
    assert (
        first["eval_loss"] == second["eval_loss"]
        and first["eval_question_tokens"] == second["eval_question_tokens"] > 0
    )
    trainer.data_collator.seed += 1
    assert trainer.evaluate()["eval_question_tokens"] != first["eval_question_tokens"]


def test_the_best_checkpoint_is_kept_and_training_stops_early(tmp_path):
    rows = [tiny_run.conversation(i) for i in range(8)]
    for message in rows[0]["messages"][1::2]:  # not in the training data: the loss rises with overfitting
        message["content"] = tiny_run.text("zq xv wj zq")
    trainer = tiny_run.make_trainer(
        tmp_path, rows=rows[1:], eval_dataset=Dataset.from_list(rows[:1]), max_steps=40, learning_rate=0.01,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        save_total_limit=2, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step < 40
    assert min(losses) == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert losses[-1] > min(losses)


def test_a_rejected_example_is_written_once(tmp_path):
    rows = [tiny_run.conversation(i) for i in range(8)]
    rows[5]["messages"][1]["content"][0]["text"] = "very " * 200
    trainer = tiny_run.make_trainer(tmp_path, rows=rows, max_length=100, num_train_epochs=2, max_steps=-1)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert lines == [{"id": "r5", "reason": "too_long", "value": "max_length=100"}]


def test_a_saved_adapter_loads_as_the_same_policy(tmp_path):
    model, processor = tiny_run.small_policy()
    base = tmp_path / "base"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    from medst_trl import SelfQuestioningConfig, SelfQuestioningTrainer

    model, processor = load_policy(str(base))
    trainer = SelfQuestioningTrainer(
        model=model,
        args=SelfQuestioningConfig(
            str(tmp_path / "sft"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([tiny_run.conversation(i) for i in range(8)]),
        processing_class=processor,
        peft_config=adapter_config(model, vusr_token_id=add_vusr(processor), r=8, vision_r=4),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "sft"))
    names = {path.name for path in (tmp_path / "sft").iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt"))}

    loaded, _ = load_policy(str(tmp_path / "sft"))
    batch = trainer.data_collator([tiny_run.conversation(i) for i in range(3)])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "question_mask")}
    with torch.no_grad():
        expected, logits = trainer.model.eval()(**inputs).logits, loaded(**inputs).logits
        merged = loaded.merge_and_unload()(**inputs).logits
    assert torch.equal(expected, logits)
    assert (expected - merged).abs().max() < 1e-5


def _train_on_two_ranks(directory: Path, overrides: dict, *kill: str) -> dict | None:
    run = launch_script("tiny_run.py", str(directory), json.dumps(overrides), *kill)
    if kill:
        assert run.returncode != 0
        return None
    assert run.returncode == 0, run.stderr
    return json.loads((directory / "run.json").read_text())


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(tmp_path):
    """Full fine-tuning; tests/distributed covers adapters and other launch types."""
    # Some rows are text-only: a rank whose batch has no image must neither hang nor count differently.
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    settings = {"max_steps": 4, "lora": False, "optim": "sgd", "learning_rate": 1e-2}
    trainer = tiny_run.make_trainer(one, per_device_train_batch_size=4, **settings)
    trainer.train()
    result = _train_on_two_ranks(two, {"per_device_train_batch_size": 2, **settings})
    assert result["world_size"] == 2 and "MULTI_CPU" in result["kind"]
    names = (
        "loss",
        "loss_question",
        "loss_answer",
        "question_tokens",
        "answer_tokens",
        "question_accuracy",
        "grad_norm",
    )
    for ours, theirs in zip(trainer.state.log_history[:4], result["log"][:4], strict=True):
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, abs=2e-5)
    weights = torch.load(two / "weights.pt", weights_only=True)
    for name, weight in tiny_run.trained_weights(trainer).items():
        assert torch.allclose(weight, weights[name], atol=1e-5), name


@pytest.mark.slow
def test_two_ranks_that_are_killed_while_saving_resume_exactly(tmp_path):
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    for directory in (uninterrupted, interrupted):
        directory.mkdir()
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    _train_on_two_ranks(uninterrupted, settings)
    _train_on_two_ranks(interrupted, settings, "--kill_while_saving", "4")
    assert not (interrupted / "weights.pt").exists() and (interrupted / "checkpoint-4").exists()
    result = _train_on_two_ranks(interrupted, settings)
    assert result["world_size"] == 2 and (interrupted / "checkpoint-4.broken").exists()
    weights, expected = (
        torch.load(directory / "weights.pt", weights_only=True) for directory in (interrupted, uninterrupted)
    )
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) == 0
