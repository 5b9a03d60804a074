# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameter counts from configurations equal those of the real trainer."""

import json

import pytest
import tiny_dpo
import tiny_run
from family_models import base_model
from recipe_models import trainable_parameters

from medst_trl import adapter_config
from medst_trl.base.errors import UserError
from medst_trl.pipeline.plan.policies import NotKnownYet, meta_model, model_at, policy_of
from medst_trl.pipeline.recipe import Step, read_recipe
from medst_trl.pipeline.stage import STAGES
from medst_trl.policy.vusr import add_vusr


FAMILIES = [
    "llava-1.5-hf",
    "llava-next",
    "qwen2.5-vl",
    "qwen3-vl",
    "gemma-3",
    "idefics3",
    "internvl",
    "prototype-llava",
]
RANKS = {"r": 8, "lora_alpha": 16, "vision_r": 4, "vision_lora_alpha": 8}


def step(stage, **settings):
    settings = {"dataset": "none", "output_dir": f"runs/{stage}", "lora_r": 8, "vision_lora_r": 4} | settings
    return Step(STAGES.get(stage), stage, settings, "test")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    for part in tiny_run.tiny_llava(**tiny_run.SMALL):
        part.save_pretrained(directory)
    return str(directory)


def trainer(tmp_path, lora=True, vusr=True, **ranks):
    if not lora:
        return tiny_run.make_trainer(tmp_path, lora=False)
    model, processor = tiny_run.small_policy()
    token = add_vusr(processor)
    config = adapter_config(model, vusr_token_id=token if vusr else None, **{**RANKS, **ranks})
    return tiny_run.make_trainer(tmp_path, policy=(model, processor, config))


@pytest.mark.parametrize(
    ("settings", "trainer_settings"),
    [
        ({}, {}),
        ({"vision_lora_r": 0}, {"vision_r": 0}),
        ({"train_vusr": False}, {"vusr": False}),
        ({"lora_r": 0, "vision_lora_r": 0, "train_vusr": False}, {"r": 0, "vision_r": 0, "vusr": False}),
        ({"use_lora": False}, {"lora": False}),  # includes the row added for `<vusr>`
        ({"load_in_4bit": True}, {}),
    ],
)
def test_the_counts_of_stage_1_match_its_trainer(settings, trainer_settings, base, tmp_path):
    counted = trainable_parameters(step("sft", model_name_or_path=base, **settings))
    assert counted == trainer(tmp_path, **trainer_settings).trainable_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counts_of_each_family_match_the_trainer(family, tmp_path):
    model, processor = base_model(family)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    counted = trainable_parameters(step("sft", model_name_or_path=str(tmp_path / "base")))
    config = adapter_config(model, vusr_token_id=add_vusr(processor), **RANKS)
    made = tiny_run.make_trainer(
        tmp_path / "run", policy=(tiny_run.prepare_policy(model, processor), processor, config)
    )
    assert counted == made.trainable_parameters()


def test_stage_2_trains_the_planned_adapter_of_stage_1_further(base, tmp_path):
    made = tiny_dpo.make_trainer(tmp_path).trainable_parameters()
    sft = step("sft", model_name_or_path=base)
    dpo = step("dpo", model_name_or_path="runs/sft", lora_r=128)  # ranks apply only to a new adapter
    assert trainable_parameters(dpo, [sft, dpo]) == made
    frozen = step("dpo", model_name_or_path="runs/sft", train_vision=False)
    assert trainable_parameters(frozen, [sft]) == {name: n for name, n in made.items() if name != "vision"}
    again = step("dpo", model_name_or_path="runs/dpo")  # the next round loads the adapter again
    assert trainable_parameters(again, [sft, frozen]) == made
    assert policy_of(dpo, [sft, dpo]).continues_adapter and not policy_of(sft).continues_adapter


def test_an_adapter_on_disk_has_the_counts_of_the_planned_one(base, tmp_path):
    model, _ = tiny_dpo.adapter_policy(save_to=tmp_path)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    on_disk = trainable_parameters(step("dpo", model_name_or_path=str(tmp_path / "adapter")))
    planned = trainable_parameters(step("dpo", model_name_or_path="runs/sft"), [step("sft", model_name_or_path=base)])
    assert on_disk == planned


def test_an_adapter_keeps_its_rank(base):
    first, second = step("sft", model_name_or_path=base), step("sft", model_name_or_path="runs/sft", lora_r=16)
    assert trainable_parameters(second, [first]) == trainable_parameters(first)


def test_a_merged_model_has_the_shape_of_the_base(base):
    steps = [step("sft", model_name_or_path=base)]
    steps.append(
        Step(STAGES.get("merge"), "merge", {"model_name_or_path": "runs/sft", "output_dir": "runs/merge"}, "")
    )
    merged = model_at("runs/merge", steps)
    assert merged.model.num_parameters() == meta_model(base).num_parameters() and not merged.is_adapter


def test_the_counts_of_the_demo_equal_hand_computed_values():
    steps = read_recipe("demo").steps()
    sft = next(step for step in steps if step.label == "sft")
    counts = trainable_parameters(sft, steps)
    size = 128  # width of both towers; their MLPs are twice as wide
    layer = 4 * (size + size) + 3 * (size + 2 * size)
    assert counts["language"] == 2 * 128 * layer + size  # two layers, and the row of <vusr>
    assert counts["vision"] == 2 * 32 * (4 * 2 * size + 2 * 3 * size)  # the last of three layers is not used
    assert counts["projector"] == 2 * (size + 1) * size


def test_unknown_models_are_reported(tmp_path):
    with pytest.raises(NotKnownYet, match="config not available offline: some-org/some-model"):
        meta_model("some-org/some-model")
    convert = Step(STAGES.get("convert"), "convert", {"source": "some-org/original", "output_dir": "runs/convert"}, "")
    with pytest.raises(NotKnownYet, match="before convert has run"):
        trainable_parameters(step("sft", model_name_or_path="runs/convert"), [convert])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="has no vision tower .*Give a vision-language model"):
        meta_model(str(tmp_path))


@pytest.mark.parametrize(("projector", "text_role"), [("mlp2x_gelu", False), ("cluster", True)])
def test_a_checkpoint_is_counted_before_its_conversion(projector, text_role, tmp_path):
    """The configuration files describe the vision tower, the language model, and whether it uses the text role."""
    tower = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {
        "model_type": "llava",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 70,
    }
    text |= {
        "num_attention_heads": 2,
        "mm_projector_type": projector,
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
    }
    for name, config in {"clip": tower, "original": text | {"mm_vision_tower": str(tmp_path / "clip")}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    settings = {"source": str(tmp_path / "original"), "output_dir": "runs/convert"}
    convert = Step(STAGES.get("convert"), "convert", settings, "")
    counts = trainable_parameters(step("sft", model_name_or_path="runs/convert"), [convert])
    assert counts["language"] == 2 * 8 * (4 * (48 + 48) + 3 * (48 + 96)) + (0 if text_role else 48)
    assert counts["vision"] == 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
    assert counts["projector"] > 0


def test_a_local_model_is_not_searched_on_the_hub(base, monkeypatch):
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *args, **options: pytest.fail(f"asked the Hub: {args}"))
    assert not policy_of(step("sft", model_name_or_path=base)).continues_adapter


def test_a_damaged_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{ broken")
    with pytest.raises(UserError, match="adapter_config.json of the adapter .* cannot be read"):
        policy_of(step("dpo", model_name_or_path=str(tmp_path)))
