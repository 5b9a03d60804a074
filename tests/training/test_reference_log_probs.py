# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Training with cached reference log-probabilities: equal results, less memory, and a cache per reference."""

import gc
import json
import shutil
import subprocess
import weakref
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import launch_script
from datasets import Dataset
from datasets.features.image import Image as ImageFeature
from PIL import Image
from tiny_dpo import adapter_policy, make_trainer, pair, text, trained_weights
from tiny_run import small_policy

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_jsonl
from medst_trl.data.images import image_id
from medst_trl.training.dpo import MultimodalDPOConfig, MultimodalDPOTrainer
from medst_trl.training.preference_collator import DataCollatorForMultimodalPreference
from medst_trl.training.reference_log_probs import hash_of_reference, pair_key, sharing_weights
from medst_trl.training.settings import check_sharding, sharding_kind


TIMING_METRICS = ("runtime", "per_second", "flos", "data_wait")


@pytest.fixture
def computed(monkeypatch):
    """List of the number of pairs in each forward pass of the reference."""
    batches, compute = [], MultimodalDPOTrainer.compute_ref_log_probs

    def counted(self, model, inputs):
        chosen, rejected = compute(self, model, inputs)
        batches.append(len(chosen))
        return chosen, rejected

    monkeypatch.setattr(MultimodalDPOTrainer, "compute_ref_log_probs", counted)
    return batches


def cached_trainer(output_dir, **overrides) -> MultimodalDPOTrainer:
    return make_trainer(output_dir, precompute_ref_log_probs=True, **overrides)


def cache_files(output_dir) -> list[Path]:
    return sorted((output_dir / "reference_log_probs").glob("*"))


def metrics(trainer) -> list[dict[str, float]]:
    entries = [*trainer.state.log_history, trainer.evaluate()]
    entries[0].pop("rewards/accuracies")  # the first step has only ties
    return [
        {name: x for name, x in entry.items() if not any(timing in name for timing in TIMING_METRICS)}
        for entry in entries
    ]


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("continued_adapter", {}),
        ("continued_adapter", {"share_prefix": False, "ld_alpha": 0.5, "max_length": 44}),
        ("new_adapter", {"gradient_checkpointing": True}),
        ("full", {"loss_type": ["ipo"]}),
    ],
)
def test_training_equals_that_with_a_live_reference(tmp_path, computed, policy, settings):
    settings |= {"policy": policy, "eval_rows": [pair(50), pair(51)]}
    live = make_trainer(tmp_path / "live", **settings)
    live.train()
    expected = metrics(live)
    first = cached_trainer(tmp_path, **settings, precompute_ref_batch_size=5)
    assert computed == [5, 5, 4]
    second = cached_trainer(tmp_path, **settings)
    assert len(computed) == 3
    for trainer in (first, second):
        assert trainer.args.precompute_ref_log_probs
        trainer.train()
        for ours, theirs in zip(metrics(trainer), expected, strict=True):
            assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), abs=1e-6)
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-5)  # log-ratios are differences of large numbers
        theirs = trained_weights(live)
        for name, weight in trained_weights(trainer).items():
            assert torch.allclose(weight, theirs[name], atol=2e-5), name
    assert len(computed) == 3


@pytest.mark.parametrize("policy", ["continued_adapter", "full"])
def test_the_reference_is_not_held_in_memory(tmp_path, monkeypatch, policy):
    references, compute = [], MultimodalDPOTrainer.compute_ref_log_probs

    def compute_and_track(self, model, inputs):
        references.append(weakref.ref(model))
        return compute(self, model, inputs)

    monkeypatch.setattr(MultimodalDPOTrainer, "compute_ref_log_probs", compute_and_track)

    def count_parameters():
        parameters = [item for item in gc.get_objects() if isinstance(item, torch.nn.Parameter)]
        return sum(p.numel() for p in {p.data_ptr(): p for p in parameters}.values())

    gc.collect()
    before = count_parameters()
    live = make_trainer(tmp_path, policy=policy)  # noqa: F841 (keeps the model in memory)
    gc.collect()
    parameters_of_live = count_parameters() - before
    trainer = cached_trainer(tmp_path, policy=policy)
    gc.collect()
    parameters_of_cached = count_parameters() - before - parameters_of_live
    model = trainer.model
    assert trainer.ref_model is None and list(getattr(model, "peft_config", {"default": 0})) == ["default"]
    assert references and all(reference() is None for reference in references)
    assert parameters_of_cached == sum(parameter.numel() for parameter in model.parameters()) < parameters_of_live


def test_a_policy_with_a_tied_head_is_supported(tmp_path):
    trainer = cached_trainer(tmp_path, policy=adapter_policy(tie_word_embeddings=True), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_given_reference_is_used_unchanged_and_released(tmp_path, computed, dtype, tolerance):
    reference, _ = adapter_policy()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    reference = reference.merge_and_unload().to(dtype).requires_grad_(True)
    live = make_trainer_with_reference(
        tmp_path / "live", {"policy": adapter_policy(), "ref_model": deepcopy(reference)}
    )
    live.train()
    settings = {"policy": adapter_policy(), "ref_model": reference, "precompute_ref_log_probs": True}
    trainer = make_trainer_with_reference(tmp_path, settings)
    assert computed == [4, 4, 4] and trainer.ref_model is None
    assert {parameter.dtype for parameter in reference.parameters()} == {dtype}
    trainer.train()
    ours, theirs = (t.state.log_history[0]["loss"] for t in (trainer, live))
    assert ours == pytest.approx(theirs, abs=tolerance) and abs(ours - 0.6931) > 5e-2


def make_trainer_with_reference(output_dir, settings) -> MultimodalDPOTrainer:
    """Make a trainer with a `ref_model`, which [`make_trainer`] does not accept."""
    (model, processor), reference = settings.pop("policy"), settings.pop("ref_model")
    return MultimodalDPOTrainer(
        model=model,
        ref_model=reference,
        args=MultimodalDPOConfig(
            output_dir=str(output_dir), per_device_train_batch_size=4, max_steps=1, logging_steps=1, seed=3,
            report_to="none", gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, **settings,
        ),
        train_dataset=Dataset.from_list([pair(number) for number in range(12)]),
        processing_class=processor,
    )  # fmt: skip


def test_several_evaluation_sets_are_scored_by_the_reference(tmp_path, computed):
    sets = {"one": Dataset.from_list([pair(50)]), "other": Dataset.from_list([pair(51), pair(0)])}

    def make_trainer_with_sets(directory, **settings):
        model, processor = adapter_policy()
        args = MultimodalDPOConfig(
            output_dir=str(directory),
            report_to="none",
            per_device_train_batch_size=4,
            disable_tqdm=True,
            max_steps=2,
            save_strategy="no",
            learning_rate=1e-3,
            **settings,
        )
        train = Dataset.from_list([pair(number) for number in range(4)])
        return MultimodalDPOTrainer(
            model=model, args=args, train_dataset=train, eval_dataset=sets, processing_class=processor
        )

    trainer = make_trainer_with_sets(tmp_path, precompute_ref_log_probs=True)
    assert sum(computed) == 6  # one of the evaluation pairs is also a training pair
    live = make_trainer_with_sets(tmp_path / "live")
    for each in (trainer, live):
        each.train()
    ours, theirs = trainer.evaluate(), live.evaluate()
    for name in ("eval_one_loss", "eval_other_loss"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5) and abs(ours[name] - 0.6931) > 1e-3


def test_images_are_decoded_once_for_the_reference(tmp_path, monkeypatch):
    count, decode = [], ImageFeature.decode_example

    def counted(self, value, *args, **kwargs):
        count.append(isinstance(value, dict))
        return decode(self, value, *args, **kwargs)

    monkeypatch.setattr(ImageFeature, "decode_example", counted)
    rows = [pair(number) for number in range(12)]
    rows = [row | {"image_ids": [image_id(row["images"][0])]} for row in rows]
    cached_trainer(tmp_path, rows=rows)
    assert 12 <= sum(count) <= 12 + 2  # TRL reads the first example
    count.clear()
    cached_trainer(tmp_path, rows=rows)
    assert sum(count) <= 2


def test_a_collator_of_your_own_gets_the_same_examples_in_both_passes(tmp_path):
    columns = []
    model, processor = adapter_policy()
    collate = DataCollatorForMultimodalPreference(processor)

    def own_collator(examples):
        columns.extend(sorted(example) for example in examples)
        return collate(examples)

    rows = [pair(number) for number in range(4)]
    dataset = Dataset.from_list([{**row, "image": row.pop("images")[0]} for row in rows])
    trainer = MultimodalDPOTrainer(
        model=model,
        args=MultimodalDPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, precompute_ref_log_probs=True, share_prefix=False,
        ),
        train_dataset=dataset,
        processing_class=processor,
        data_collator=own_collator,
    )  # fmt: skip
    trainer.train()
    assert columns == [columns[0]] * 8 and {"chosen", "id", "images", "prompt", "rejected"} <= set(columns[0])


def test_a_frozen_part_stays_frozen_and_the_cache_does_not_change(tmp_path):
    from medst_trl.policy.adapters import freeze_vision

    model, processor = adapter_policy()
    freeze_vision(model)
    trainer = cached_trainer(tmp_path, policy=(model, processor))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    (path,) = cache_files(tmp_path)
    content = path.read_bytes()
    trainer.train()
    changed_names = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed_names and not any("vision_tower" in name for name in changed_names)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    cached_trainer(tmp_path)  # the untrained policy again, so the same file
    assert cache_files(tmp_path) == [path] and path.read_bytes() == content


@pytest.fixture(scope="module")
def cached_run(tmp_path_factory):
    """Run directory with the cached log-probabilities of twelve pairs."""
    directory = tmp_path_factory.mktemp("cached_run")
    cached_trainer(directory)
    return directory


def key_of(change=None, policy=adapter_policy, **settings) -> str:
    """Return the hash of a policy, after changing it."""
    model, processor = policy()
    if change is not None:
        with torch.no_grad():
            change(model, processor)
    args = MultimodalDPOConfig(output_dir="none", use_cpu=True, **settings)
    collator = DataCollatorForMultimodalPreference(processor, max_length=args.max_length)
    return hash_of_reference(model, processor, collator, args)


def change_template(model, processor):
    processor.chat_template = processor.chat_template + "{# as before, but for this #}"


def change_image_mean(model, processor):
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]


def add_token(model, processor):
    processor.tokenizer.add_tokens("radiograph")


def change_adapter(model, processor):
    next(p for name, p in model.named_parameters() if "lora_B" in name).view(-1)[0] += 1e-4


def change_base(model, processor):
    next(p for name, p in model.named_parameters() if "base_layer" in name).view(-1)[0] += 1e-4


def change_alpha(model, processor):
    model.peft_config["default"].lora_alpha *= 2


def change_layer(model, processor):
    model.get_base_model().config.vision_feature_layer = -1


@pytest.mark.parametrize(
    "other",
    [
        {"change": change_adapter},
        {"change": change_base},
        {"change": change_alpha},
        {"change": change_layer},
        {"change": change_template},
        {"change": change_image_mean},
        {"change": add_token},
        {"policy": small_policy},
        {"max_length": 44},
        {"max_length": None},
        {"ld_alpha": 0.5},
        {"bf16": True},
    ],
)
def test_another_reference_or_setting_uses_another_file(other):
    assert key_of(**other) != key_of()


def relocate(model, processor):
    model.get_base_model().config._name_or_path = "/elsewhere/model"
    model.peft_config["default"].base_model_name_or_path = "/elsewhere/model"
    processor.tokenizer(["one", "two or three"], padding=True, truncation=True, max_length=3)


@pytest.mark.parametrize(
    "other",
    [{"change": relocate}, {"beta": 0.5}, {"share_prefix": False}, {"learning_rate": 1.0}, {"pad_to_multiple_of": 8}],
)
def test_settings_that_do_not_affect_the_log_probs_use_the_same_file(other):
    assert key_of(**other) == key_of()


@pytest.mark.parametrize("change", [{"policy": change_adapter}, {"max_length": 44}])
def test_log_probs_of_another_reference_or_setting_are_not_used(cached_run, tmp_path, computed, change):
    shutil.copytree(cached_run, tmp_path, dirs_exist_ok=True)
    if "policy" in change:
        policy = adapter_policy()
        with torch.no_grad():
            change["policy"](*policy)
        change = {"policy": policy}
    cached_trainer(tmp_path, **change)
    assert sum(computed) == 12 and len(cache_files(tmp_path)) == 2


def test_log_probs_do_not_depend_on_training_settings(cached_run, tmp_path, computed):
    shutil.copytree(cached_run, tmp_path, dirs_exist_ok=True)
    cached_trainer(tmp_path, share_prefix=False, per_device_train_batch_size=3, beta=0.5)
    assert not computed and len(cache_files(tmp_path)) == 1


def test_only_new_pairs_are_computed(cached_run, tmp_path, computed):
    shutil.copytree(cached_run, tmp_path, dirs_exist_ok=True)
    rows = [pair(number) for number in range(12)]
    rows[3]["chosen"] = [{"role": "assistant", "content": text("It is quite dark.")}]
    rows[5]["images"][0].putpixel((2, 2), (9, 9, 9))
    rows[7]["id"] = rows[8]["id"]  # ids do not matter
    rows += [pair(30), {**pair(30), "id": "p31"}, pair(2)]  # the same content is computed once
    del rows[:2]
    trainer = cached_trainer(tmp_path, rows=rows, max_steps=4)
    assert sum(computed) == 3
    assert sorted(len(read_jsonl(path)) for path in cache_files(tmp_path)) == [11, 12]  # one file for each dataset
    trainer.train()
    live = make_trainer(tmp_path / "live", rows=rows, max_steps=4)
    live.train()
    for ours, theirs in zip(trainer.state.log_history[:4], live.state.log_history[:4], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


def test_share_prefix_gives_the_same_log_probs(cached_run, tmp_path):
    cached_trainer(tmp_path, share_prefix=False)
    (shared,), (separate,) = cache_files(cached_run), cache_files(tmp_path)
    assert shared.name == separate.name
    for ours, theirs in zip(read_jsonl(shared), read_jsonl(separate), strict=True):
        assert ours["id"] == theirs["id"]
        assert (ours["chosen"], ours["rejected"]) == pytest.approx((theirs["chosen"], theirs["rejected"]), rel=1e-6)


def test_a_new_adapter_and_full_training_share_one_reference(tmp_path, computed):
    cached_trainer(tmp_path, policy="new_adapter")
    cached_trainer(tmp_path, policy="full")
    assert sum(computed) == 12 and len(cache_files(tmp_path)) == 1


def test_an_interrupted_computation_resumes_where_it_stopped(tmp_path, monkeypatch, computed, capsys):
    counted = MultimodalDPOTrainer.compute_ref_log_probs

    def interrupt(self, model, inputs):
        if len(computed) == 2:
            raise KeyboardInterrupt
        return counted(self, model, inputs)

    monkeypatch.setattr(MultimodalDPOTrainer, "compute_ref_log_probs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached_trainer(tmp_path)
    assert [path.suffix for path in cache_files(tmp_path)] == [".incomplete"]
    capsys.readouterr()
    monkeypatch.setattr(MultimodalDPOTrainer, "compute_ref_log_probs", counted)
    cached_trainer(tmp_path)
    assert computed == [4, 4, 4]
    assert "8 of 12 pairs are known" in capsys.readouterr().out
    assert [path.suffix for path in cache_files(tmp_path)] == [".jsonl"]
    cached_trainer(tmp_path)
    assert computed == [4, 4, 4] and "12 of 12 pairs" in capsys.readouterr().out


def test_a_run_killed_before_the_file_exists_loses_nothing(tmp_path, monkeypatch, computed):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("medst_trl.base.files.merge_rows", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        cached_trainer(tmp_path)
    computed.clear()
    cached_trainer(tmp_path)
    assert not computed and [path.suffix for path in cache_files(tmp_path)] == [".jsonl"]


def test_two_runs_can_compute_the_same_pairs(tmp_path, monkeypatch, computed):
    compute = MultimodalDPOTrainer.compute_ref_log_probs

    def after_another_run(self, model, inputs):
        monkeypatch.setattr(MultimodalDPOTrainer, "compute_ref_log_probs", compute)
        cached_trainer(tmp_path)
        return compute(self, model, inputs)

    monkeypatch.setattr(MultimodalDPOTrainer, "compute_ref_log_probs", after_another_run)
    trainer = cached_trainer(tmp_path, max_steps=1)
    (path,) = (path for path in cache_files(tmp_path) if path.suffix == ".jsonl")
    assert sum(computed) == 24 and len(read_jsonl(path)) == 12
    trainer.train()


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_damaged_file_is_completed(cached_run, tmp_path, computed, damage):
    shutil.copytree(cached_run, tmp_path, dirs_exist_ok=True)
    (path,) = cache_files(tmp_path)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    cached_trainer(tmp_path)
    assert 0 < sum(computed) <= 12 and cache_files(tmp_path) == [path]
    assert [row["id"] for row in read_jsonl(path)] == [json.loads(line)["id"] for line in content.splitlines()]


def test_a_damaged_file_is_completed_from_those_of_other_pairs(cached_run, tmp_path, computed):
    shutil.copytree(cached_run, tmp_path, dirs_exist_ok=True)
    (path,) = cache_files(tmp_path)
    content = path.read_bytes()
    cached_trainer(tmp_path, rows=[pair(number) for number in range(13)])
    path.write_bytes(content[: len(content) // 2])
    cached_trainer(tmp_path, max_steps=1).train()
    assert sum(computed) == 1 and path.read_bytes() == content


def test_non_finite_log_probs_stop_the_run(tmp_path, monkeypatch):
    def return_nan(self, model, inputs):
        rows = len(inputs["input_ids"]) // 2
        return torch.zeros(rows), torch.full((rows,), float("nan"))

    monkeypatch.setattr(MultimodalDPOTrainer, "compute_ref_log_probs", return_nan)
    with pytest.raises(UserError, match=r"Record 'p\d+': its log-probabilities under the reference are 0.0 .* nan"):
        cached_trainer(tmp_path)
    assert not [path for path in cache_files(tmp_path) if path.stat().st_size]


def test_the_error_for_a_pair_without_reference_log_probs_names_it(tmp_path):
    trainer = cached_trainer(tmp_path, max_steps=1)
    with pytest.raises(UserError, match="'p77' has no log-probabilities .* eval_dataset"):
        trainer.evaluate(Dataset.from_list([pair(77)]))


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [({"fsdp": "full_shard"}, {}, "FSDP"), ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP")],
)
def test_sharded_weights_are_refused(tmp_path, monkeypatch, settings, environment, message):
    args = MultimodalDPOConfig(output_dir=str(tmp_path), precompute_ref_log_probs=True)
    check_sharding(sharding_kind(args), args)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(UserError, match=message):
        check_sharding(sharding_kind(args), args)
    (model, processor), (reference, _) = adapter_policy(), adapter_policy()
    with pytest.raises(UserError, match=message):  # of a given reference, too
        MultimodalDPOTrainer(
            model, args, train_dataset=Dataset.from_list([pair(1)]), ref_model=reference, processing_class=processor
        )
    with monkeypatch.context() as zero3, pytest.raises(UserError, match="ZeRO-3"):
        zero3.setattr(args, "deepspeed_plugin", type("Plugin", (), {"zero_stage": 3}), raising=False)
        check_sharding(sharding_kind(args), args)


def test_deepspeed_does_not_round_reference_log_probs(tmp_path, monkeypatch):
    trainer = cached_trainer(tmp_path)
    config = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", config)
    batch = trainer.data_collator([trainer.train_dataset[1], trainer.train_dataset[2]])
    prepared = trainer._prepare_inputs(batch)
    assert prepared["pixel_values"].dtype == torch.bfloat16
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert torch.equal(prepared[name], batch[name]) and prepared[name].dtype == torch.float32


def test_a_reference_that_is_updated_during_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model"):
        MultimodalDPOConfig(output_dir=str(tmp_path), precompute_ref_log_probs=True, sync_ref_model=True)


def test_a_model_that_shares_weights_takes_no_memory():
    model, _ = adapter_policy()
    model.train()
    second = sharing_weights(model)
    assert {p.data_ptr() for p in second.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert not any(module.training for module in second.modules()) and model.training
    assert not {id(m) for m in second.modules()} & {id(m) for m in model.modules()}


SCRIPT = """
import json, os, signal, sys
import tiny_dpo
from medst_trl.base.processes import leave_peers
from medst_trl.training.dpo import MultimodalDPOTrainer
output_dir, batches = sys.argv[1], int(sys.argv[2])
compute, done = MultimodalDPOTrainer.compute_ref_log_probs, []
def counted(self, model, inputs):
    if len(done) == batches:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return compute(self, model, inputs)
MultimodalDPOTrainer.compute_ref_log_probs = counted
trainer = tiny_dpo.make_trainer(output_dir, precompute_ref_log_probs=True, precompute_ref_batch_size=2)
if trainer.accelerator.is_main_process:
    print("FORWARDS", len(done), trainer.accelerator.num_processes)
trainer.train()
trainer.accelerator.wait_for_everyone()
del trainer  # it holds the process group
leave_peers()
"""


def run_script(output_dir: Path, batches: int = 99, ranks: int = 1) -> subprocess.CompletedProcess:
    output_dir.mkdir(parents=True, exist_ok=True)
    script = output_dir.parent / "reference_run.py"
    script.write_text(SCRIPT)
    return launch_script(script, str(output_dir), str(batches), ranks=ranks)


@pytest.mark.slow
def test_a_killed_computation_loses_at_most_one_batch(tmp_path):
    assert run_script(tmp_path / "interrupted", batches=4).returncode == -9
    done = run_script(tmp_path / "interrupted")
    assert done.returncode == 0, done.stderr
    assert "8 of 12 pairs are known" in done.stdout and "FORWARDS 2 1" in done.stdout
    assert run_script(tmp_path / "uninterrupted").returncode == 0
    (interrupted,), (uninterrupted,) = cache_files(tmp_path / "interrupted"), cache_files(tmp_path / "uninterrupted")
    assert interrupted.read_bytes() == uninterrupted.read_bytes()


@pytest.mark.slow
def test_two_ranks_write_the_same_file_as_one(tmp_path):
    one, two = run_script(tmp_path / "one"), run_script(tmp_path / "two", ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert "FORWARDS 6 1" in one.stdout and "FORWARDS 3 2" in two.stdout
    (file_of_one,), (file_of_two,) = cache_files(tmp_path / "one"), cache_files(tmp_path / "two")
    assert file_of_one.name == file_of_two.name and file_of_one.read_bytes() == file_of_two.read_bytes()
    interrupted = run_script(tmp_path / "interrupted", ranks=2, batches=1)
    assert interrupted.returncode != 0
    resumed = run_script(tmp_path / "interrupted", ranks=2)
    # A rank may be terminated before its first batch.
    assert any(f"{known} of 12 pairs are known" in resumed.stdout for known in (2, 4)), resumed.stderr
    assert cache_files(tmp_path / "interrupted")[0].read_bytes() == file_of_one.read_bytes()


def changed_pair(**changes) -> dict:
    row = {**deepcopy(pair(1)), **changes}
    return row | {"image_ids": [image_id(image) for image in row["images"]]}


def changed_image() -> Image.Image:
    image = pair(1)["images"][0].copy()
    image.putpixel((3, 3), (1, 2, 3))
    return image


@pytest.mark.parametrize(
    "other",
    [
        changed_pair(chosen=[{"role": "assistant", "content": text("It is bright.")}]),
        changed_pair(rejected=[{"role": "assistant", "content": text("bright.")}]),
        changed_pair(prompt=[*pair(1)["prompt"], *pair(2)["chosen"], *pair(2)["prompt"]]),
        changed_pair(chosen=pair(1)["rejected"], rejected=pair(1)["chosen"]),
        changed_pair(images=[changed_image()]),
        changed_pair(images=[pair(1)["images"][0].resize((17, 15))]),
        changed_pair(images=pair(1)["images"] * 2),
        changed_pair(images=[]),
    ],
)
def test_the_key_of_a_pair_depends_on_its_content_and_not_on_its_id(other):
    assert other["id"] == "p1" and pair_key(other) != pair_key(changed_pair())


def test_pairs_with_the_same_content_have_the_same_key():
    grey = Image.new("L", (5, 4), 77)
    assert pair_key(changed_pair(id="another", score_chosen=3.0)) == pair_key(changed_pair())
    assert pair_key(changed_pair(images=[grey])) == pair_key(changed_pair(images=[grey.convert("RGB")]))
