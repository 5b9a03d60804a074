# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameter counts and memory formulas match those of the real trainer, and of real forward and backward passes."""

import json

import pytest
import tiny_dpo
import tiny_run
import torch
import transformers.masking_utils
from family_models import base_model
from live_bytes import LiveBytes
from peft import get_peft_model
from recipe_models import CONFIGS, config_directory, trainable_parameters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.utils import add_fused_lm_head

from medst_trl import adapter_config
from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.pipeline.launch import Batch, Hardware
from medst_trl.pipeline.plan.memory import (
    BUCKET,
    NotKnownYet,
    Policy,
    Precision,
    activation_bytes,
    frozen_bytes,
    meta_model,
    model_at,
    patches_of,
    policy_of,
    quantized_layers,
    state_bytes,
    tower_bytes,
    training_memory,
)
from medst_trl.pipeline.plan.steps import stage_arguments
from medst_trl.pipeline.recipe import Step, read_recipe
from medst_trl.pipeline.stage import STAGES
from medst_trl.policy.families import model_parts
from medst_trl.policy.loading import prepare_policy
from medst_trl.policy.vusr import add_vusr


LLAVA = "llava-hf/llava-1.5-7b-hf"
KINDS = ["not distributed", "DDP", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3", "FSDP2"]


# What a step trains


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


def model_step(stage, **settings):
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
    counted = trainable_parameters(model_step("sft", model_name_or_path=base, **settings))
    assert counted == trainer(tmp_path, **trainer_settings).trainable_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counts_of_each_family_match_the_trainer(family, tmp_path):
    model, processor = base_model(family)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    counted = trainable_parameters(model_step("sft", model_name_or_path=str(tmp_path / "base")))
    config = adapter_config(model, vusr_token_id=add_vusr(processor), **RANKS)
    made = tiny_run.make_trainer(
        tmp_path / "run", policy=(tiny_run.prepare_policy(model, processor), processor, config)
    )
    assert counted == made.trainable_parameters()


def test_stage_2_trains_the_planned_adapter_of_stage_1_further(base, tmp_path):
    made = tiny_dpo.make_trainer(tmp_path).trainable_parameters()
    sft = model_step("sft", model_name_or_path=base)
    dpo = model_step("dpo", model_name_or_path="runs/sft", lora_r=128)  # ranks apply only to a new adapter
    assert trainable_parameters(dpo, [sft, dpo]) == made
    frozen = model_step("dpo", model_name_or_path="runs/sft", train_vision=False)
    assert trainable_parameters(frozen, [sft]) == {name: n for name, n in made.items() if name != "vision"}
    again = model_step("dpo", model_name_or_path="runs/dpo")  # the next round loads the adapter again
    assert trainable_parameters(again, [sft, frozen]) == made
    assert policy_of(dpo, [sft, dpo]).continues_adapter and not policy_of(sft).continues_adapter


def test_an_adapter_on_disk_has_the_counts_of_the_planned_one(base, tmp_path):
    model, _ = tiny_dpo.adapter_policy(save_to=tmp_path)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    on_disk = trainable_parameters(model_step("dpo", model_name_or_path=str(tmp_path / "adapter")))
    stage_1 = model_step("sft", model_name_or_path=base)
    assert on_disk == trainable_parameters(model_step("dpo", model_name_or_path="runs/sft"), [stage_1])


def test_an_adapter_keeps_its_rank(base):
    first = model_step("sft", model_name_or_path=base)
    second = model_step("sft", model_name_or_path="runs/sft", lora_r=16)
    assert trainable_parameters(second, [first]) == trainable_parameters(first)


def test_a_merged_model_has_the_shape_of_the_base(base):
    steps = [model_step("sft", model_name_or_path=base)]
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
        trainable_parameters(model_step("sft", model_name_or_path="runs/convert"), [convert])
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
    counts = trainable_parameters(model_step("sft", model_name_or_path="runs/convert"), [convert])
    assert counts["language"] == 2 * 8 * (4 * (48 + 48) + 3 * (48 + 96)) + (0 if text_role else 48)
    assert counts["vision"] == 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
    assert counts["projector"] > 0


def test_a_local_model_is_not_searched_on_the_hub(base, monkeypatch):
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *args, **options: pytest.fail(f"asked the Hub: {args}"))
    assert not policy_of(model_step("sft", model_name_or_path=base)).continues_adapter


def test_a_damaged_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{ broken")
    with pytest.raises(UserError, match="adapter_config.json of the adapter .* cannot be read"):
        policy_of(model_step("dpo", model_name_or_path=str(tmp_path)))


def hardware(kind, processes=4, on_gpu=True):
    return Hardware("some.yaml", kind, processes, on_gpu)


# Weights, gradients, optimizer


def test_the_state_of_a_real_trainer_matches_the_formula(tmp_path):
    trainer = tiny_run.make_trainer(tmp_path, max_steps=1)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = []
    for p in trained:
        p.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.nbytes))
    trainer.train()
    adam = [value for state in trainer.optimizer.state.values() for key, value in state.items() if key != "step"]
    counted = {
        "weights": sum(p.nbytes for p in trainer.model.parameters() if not p.requires_grad),
        "trained": sum(p.nbytes for p in trained),
        "gradients": sum(gradients),
        "optimizer": sum(value.nbytes for value in adam),
    }
    policy = Policy(trainer.model, "")
    number = sum(p.numel() for p in trained)
    assert state_bytes(number, frozen_bytes(policy, 4), hardware("not distributed", 1, on_gpu=False)) == counted


def test_each_kind_of_training_shards_the_right_parts():
    n, trained, frozen = 4, 10**9, 14e9
    parts = {kind: state_bytes(trained, frozen, hardware(kind, n), compute=2) for kind in KINDS}
    alone, ddp, zero2, zero3, fsdp = parts.values()
    assert ddp == alone | {"buckets": 4 * trained}  # everything on each GPU
    assert zero2["weights"] == alone["weights"] and zero2["gradients"] == 2 * trained / n
    assert zero2["optimizer"] == (alone["optimizer"] + 4 * trained) / n  # optimizer state and float32 weights
    for sharded in (zero3, fsdp):
        assert sharded["weights"] == alone["weights"] / n
    assert {name: size for name, size in zero3.items() if name != "buckets"} == {
        name: size / (1 if name in ("gradients", "optimizer") else n)
        for name, size in zero2.items()
        if name != "buckets"
    }
    assert fsdp == {name: size / n for name, size in alone.items()}
    assert zero2["buckets"] == zero3["buckets"] == 2 * BUCKET


@pytest.mark.parametrize("kind", KINDS[2:])
def test_sharding_over_more_gpus_needs_less_memory_per_gpu(kind):
    totals = [sum(state_bytes(10**9, 14e9, hardware(kind, n), compute=2).values()) for n in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4


# Activations


@pytest.mark.parametrize(
    ("lora", "dropout", "checkpointing", "bf16"),
    [
        (True, 0.0, False, False),
        (True, 0.05, False, True),
        (True, 0.05, True, True),
        (False, 0.0, False, False),
        (False, 0.0, True, False),
    ],
)
def test_the_activations_of_a_real_step_match_the_formula(lora, dropout, checkpointing, bf16):
    """The formula is within 25% of the peak of a forward and backward pass with the fused head."""
    batch, length = 8, 192
    sizes = {"image_size": 64, "patch_size": 8, "vision_layers": 4, "text_size": 256, "text_layers": 6}
    model, processor = tiny_llava(**sizes)
    prepare_policy(model, processor)
    if lora:
        config = adapter_config(model, vusr_token_id=add_vusr(processor), r=16, vision_r=8, lora_dropout=dropout)
        model = get_peft_model(model.to(torch.bfloat16) if bf16 else model, config)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, "")
    add_fused_lm_head(policy.base_model)
    tokens = patches_of(policy.base_model) - 1
    ids = torch.full((batch, length), 300)
    ids[:, 1 : 1 + tokens] = model.config.image_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(batch, 3, 64, 64)}
    with LiveBytes() as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = model(**inputs, labels=ids, fused_lm_head=True)
        kept = live.now
        (-output.log_probs.sum()).backward()
    precision = Precision(2 if bf16 else 4, 2 if bf16 else 4, autocast=bf16, on_gpu=False)
    of_formula = {"sequences": batch, "length": length, "precision": precision}
    estimate = activation_bytes(policy, **of_formula, checkpointing=checkpointing)
    assert 0.8 * live.peak < estimate < 1.25 * live.peak
    if not checkpointing:  # what the towers keep between the passes
        parts, sizes = model_parts(model), (batch * (tokens + 1), batch * length)
        towers = zip((parts.vision_tower, parts.language_model), sizes)
        saved = sum(tower_bytes(policy, name, size, precision, checkpointing) for name, size in towers)
        assert 0.85 * kept < saved < 1.2 * kept


class _FlashAttention(torch.autograd.Function):
    """Save what FlashAttention saves. On the meta device, torch would compute the full attention matrix instead."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activations_of_7b_layers_on_the_meta_device_match_the_formula(checkpointing, tmp_path, monkeypatch):
    """Four layers of the real width in pure bfloat16, as under DeepSpeed. The rule is within 20%."""
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda positions: None)
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda module, q, k, v, mask, **kwargs: (_FlashAttention.apply(q, k, v).transpose(1, 2).contiguous(), None),
    )
    config = CONFIGS[LLAVA]()
    config.text_config.num_hidden_layers = 4
    config.save_pretrained(tmp_path)
    base = meta_model(str(tmp_path)).to(torch.bfloat16)
    model = get_peft_model(base, adapter_config(base, lora_dropout=0.0), low_cpu_mem_usage=True).to(torch.bfloat16)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, length = 2, 512
    inputs = torch.empty(batch, length, 4096, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes() as live:
        output = base.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
    policy, name, precision = Policy(model, ""), model_parts(model).language_model, Precision(2, 2, autocast=False)
    saved = tower_bytes(policy, name, batch * length, precision, checkpointing)
    if checkpointing:
        layers = tower_bytes(policy, name, batch * length, precision, checkpointing=False)
        saved -= layers / 4  # the layer that is recomputed
        saved += batch * length * 4096 * 4  # the norm after the last layer
    assert output.shape == inputs.shape
    assert 0.9 * live.now < saved < 1.2 * live.now


# A whole step


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Directory of a configuration with the real widths and few layers."""
    config = CONFIGS[LLAVA]()
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 2, 3
    directory = tmp_path_factory.mktemp("llava")
    config.save_pretrained(directory)
    return str(directory)


def step(stage, model, **settings):
    settings = {"model_name_or_path": model, "dataset": "d", "output_dir": f"runs/{stage}"} | settings
    return Step(STAGES.get(stage), stage, {"per_device_train_batch_size": 8} | settings, "")


def memory(planned, kind="DeepSpeed ZeRO-2", steps=()):
    arguments = stage_arguments(planned)
    machine = hardware(kind, 1 if kind == "not distributed" else 4)
    batch, length = Batch(8, 1, machine.processes), arguments[1].max_length
    return training_memory(policy_of(planned, steps, arguments), arguments, batch, machine, length)


def test_the_memory_of_a_7b_model_under_zero_2_equals_hand_computed_values(tmp_path):
    parts = memory(step("sft", str(config_directory(LLAVA, tmp_path))))
    lora = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert lora == 319_815_680
    trained = lora + 4096 + 13_565_952 + 20_979_712  # <vusr>, ViT, projector
    assert parts["weights"] == 2 * 7_063_427_072 and parts["trained"] == 2 * trained
    assert parts["gradients"] == 2 * trained / 4 and parts["optimizer"] == 12 * trained / 4
    # Checkpointing keeps at least the input of each layer: 8 x 2048 tokens of 4096 values in bfloat16.
    assert 32 * 8 * 2048 * 4096 * 2 < parts["activations"] < 3 * 32 * 8 * 2048 * 4096 * 2


def test_settings_that_save_memory_lower_the_estimate(llava):
    default = memory(step("sft", llava, max_length=1024))
    assert memory(step("sft", llava, max_length=1024), "DeepSpeed ZeRO-3")["weights"] == default["weights"] / 4
    assert memory(step("sft", llava))["activations"] > 1.5 * default["activations"]
    kept = memory(step("sft", llava, max_length=1024, gradient_checkpointing=False))["activations"]
    assert kept > 1.4 * default["activations"]  # both layers instead of one
    less = memory(step("sft", llava, max_length=1024, optim="adamw_8bit"))
    assert less["optimizer"] == default["optimizer"] / 2  # the other half are float32 weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fully_trained_weights_keep_their_dtype(llava, dtype, tmp_path):
    settings = {"use_lora": False, "dtype": dtype, "bf16": True}
    parts = memory(step("sft", llava, **settings), "not distributed")
    model, processor = tiny_run.small_policy()
    policy = (model.to(getattr(torch, dtype)), processor, None)
    trainer = tiny_run.make_trainer(tmp_path, policy=policy, lora=False, max_steps=1)
    trainer.train()
    (state, *_), weights = trainer.optimizer.state.values(), list(trainer.model.parameters())
    adam = {value.dtype for key, value in state.items() if key != "step"}
    assert {weight.dtype for weight in weights} == adam == {getattr(torch, dtype)}
    total = meta_model(llava).num_parameters() * getattr(torch, dtype).itemsize
    assert [parts[name] for name in ("trained", "gradients", "optimizer")] == [total, total, 2 * total]


def test_only_the_language_model_is_quantized(llava):
    policy = Policy(meta_model(llava), "")
    policy.model.requires_grad_(False)
    quantized = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert sum(layer.weight.numel() for layer in quantized_layers(policy)) == quantized
    rest = policy.model.num_parameters() - quantized
    assert frozen_bytes(policy, 2, in_4_bit=True) == 2 * rest + quantized * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert frozen_bytes(policy, 2) == 2 * policy.model.num_parameters()


def test_the_reference_needs_memory_only_if_it_is_a_copy(llava):
    sft = step("sft", llava)
    adapter = sum(p.numel() for p in policy_of(sft).model.parameters() if p.requires_grad)

    def reference(kind="not distributed", model="runs/sft", **settings):
        return memory(step("dpo", model, **settings), kind, [sft]).get("reference", 0)

    assert reference() == 4 * adapter
    assert reference(train_vision=False) == 4 * adapter  # the whole adapter is copied
    assert reference("DeepSpeed ZeRO-2") == 2 * adapter
    assert reference(precompute_ref_log_probs=True) == 0
    assert reference(model=llava) == 0  # a new adapter is disabled instead of copied
    assert reference(model=llava, use_lora=False) == 4 * meta_model(llava).num_parameters()


def test_the_reference_adapter_of_a_real_trainer_has_the_size_of_the_adapter(tmp_path):
    trainer = tiny_dpo.make_trainer(tmp_path)
    parts = {kind: [] for kind in ("default", "ref")}
    for name, parameter in trainer.model.named_parameters():
        for kind in parts.keys() & set(name.split(".")):
            parts[kind].append(parameter.nbytes)
    assert sum(parts["ref"]) == sum(parts["default"]) > 0


def test_sharing_the_prompt_saves_activations(llava):
    shared = memory(step("dpo", llava))["activations"]
    separate = memory(step("dpo", llava, share_prefix=False))["activations"]
    assert 1.4 * shared < separate < 2 * shared
