# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Every family completes every stage: adapter, stage 1, questions and answers, stage 2, saving, loading, merging.

The models of `family_models.py` are saved like a published base, without `<vusr>`, and loaded by `load_policy`. Each
family runs once, and the tests check its results.
"""

import json
import math
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import tiny_dpo
import tiny_run
import torch
from datasets import Dataset
from family_models import CROSS_ATTENTION, MODELS, base_model, tiny_model
from peft import PeftModel
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from medst_trl import CandidateGenerator, DataCollatorForSelfQuestioning, adapter_config, load_policy
from medst_trl.base.errors import UserError
from medst_trl.data.images import image_id
from medst_trl.data.schema import instruct_features, text_of
from medst_trl.engines.decoding import chat_inputs
from medst_trl.engines.engine import Sampling, to_answer, to_ask
from medst_trl.pipeline.stages.merge import batches_of
from medst_trl.policy.families import FAMILIES, model_parts
from medst_trl.policy.merging import merge_policy
from medst_trl.policy.vusr import VUSR
from medst_trl.selftrain.filters import QuestionFilter


TIED = {"gemma-3", "internvl"}  # by default in their configurations
RANKS = {"r": 8, "lora_alpha": 16, "vision_r": 4, "vision_lora_alpha": 12, "lora_dropout": 0.0}


def prompt_inputs(processor, vusr: bool = False):
    """Return the model inputs of a prompt about an image: a question to answer, or a bare `<vusr>`."""
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (24, 16, 3), dtype=np.uint8))
    messages = to_ask([], 1) if vusr else to_answer([], 1, "What about 3 in turn 0?")
    return chat_inputs(processor, [messages], [[image]])


def log_probs(model, processor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**prompt_inputs(processor, vusr)).logits[0] for vusr in (False, True)]).log_softmax(-1)


class Run:
    """A run of one family from base to merged model; each stage runs when it is first accessed."""

    def __init__(self, family: str, directory: Path):
        self.family, self.directory = family, directory
        self.base_model, processor = base_model(family)
        self.base_model.save_pretrained(directory / "base")
        processor.save_pretrained(directory / "base")

    @cached_property
    def policy(self):
        """The base with `<vusr>`, and its processor."""
        return load_policy(str(self.directory / "base"))

    @cached_property
    def sft(self):
        """The trainer of stage 1 after two steps. In the first, LoRA's B matrices are zero, so its A matrices get no
        gradient."""
        model, processor = self.policy
        token = processor.tokenizer.convert_tokens_to_ids(VUSR)
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        policy = (model, processor, adapter_config(model, vusr_token_id=token, **RANKS))
        rows = [tiny_run.conversation(number) for number in range(4)]
        trainer = tiny_run.make_trainer(
            self.directory / "run", policy=policy, rows=rows, max_steps=2, sq_ratio=1.0, per_device_train_batch_size=2
        )
        self.start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model(str(self.directory / "sft"))
        trainer.model.eval()
        return trainer

    @cached_property
    def dpo(self):
        """The trainer of stage 2 after two steps, from the saved adapter of stage 1."""
        assert self.sft
        policy = load_policy(str(self.directory / "sft"), is_trainable=True)
        rows = [tiny_dpo.pair(number) for number in range(4)]
        trainer = tiny_dpo.make_trainer(
            self.directory / "run2", policy=policy, rows=rows, max_steps=2, per_device_train_batch_size=2
        )
        self.dpo_start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model(str(self.directory / "dpo"))
        trainer.model.eval()
        return trainer


@pytest.fixture(scope="module", params=[*MODELS, *CROSS_ATTENTION])
def run(request, tmp_path_factory):
    return Run(request.param, tmp_path_factory.mktemp(request.param))


def test_the_base_loads_unchanged(run):
    model, processor = run.policy
    assert VUSR in processor.tokenizer.get_vocab()
    rows = run.base_model.get_input_embeddings().num_embeddings
    for name, parameter in run.base_model.named_parameters():
        loaded = model.get_parameter(name)
        assert torch.equal(loaded[: len(parameter)] if len(parameter) == rows else loaded, parameter), name
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == (run.family in TIED)


def test_the_adapter_is_on_exactly_the_layers_that_receive_gradients(run):
    """LoRA is expected on the linear layers of both towers that receive a gradient without an adapter."""
    plain, processor = tiny_model(run.family)
    output = plain(**prompt_inputs(processor))
    output.logits.square().sum().backward()
    parts = model_parts(plain)
    head = plain.get_output_embeddings()
    expected = {}
    for name, module in plain.named_modules():
        part = parts.part_of(f"{name}.weight")
        if not isinstance(module, torch.nn.Linear) or module is head or part == "projector":
            continue
        if module.weight.grad is not None and module.weight.grad.any():
            expected[name] = (4, 12 / 4) if part == "vision" else (8, 16 / 8)
    projector = {name for name, _ in plain.named_parameters() if parts.part_of(name) == "projector"}

    model = run.sft.model
    assert isinstance(model, PeftModel)
    found = {
        name.removeprefix("base_model.model."): (module.lora_A["default"].out_features, module.scaling["default"])
        for name, module in model.named_modules()
        if getattr(module, "lora_A", None)
    }
    assert found == expected
    assert {rank for rank, _ in found.values()} == {4, 8}
    other, rows = set(), []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "trainable_tokens_delta" in name:
            rows.append(tuple(parameter.shape))
        elif parameter.requires_grad and ".lora_" not in name:
            other.add(name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""))
    assert other == projector
    assert rows == [(1, run.base_model.get_input_embeddings().embedding_dim)]


def test_sft_changes_exactly_the_trainable_parameters(run):
    model = run.sft.model
    assert all(math.isfinite(entry["loss"]) for entry in run.sft.state.log_history if "loss" in entry)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, run.start[name]) != parameter.requires_grad, name


def test_the_reloaded_adapter_gives_the_same_log_probabilities(run):
    trainer = run.sft
    model, processor = load_policy(str(run.directory / "sft"))
    assert processor.chat_template == run.policy[1].chat_template
    assert torch.equal(log_probs(model, processor), log_probs(trainer.model, run.policy[1]))
    assert not torch.allclose(log_probs(model, processor), log_probs(*load_policy(str(run.directory / "base"))))


def test_the_policy_asks_questions_and_writes_two_answers(run):
    trainer = run.sft
    assert trainer
    model, processor = load_policy(str(run.directory / "sft"))
    model.generation_config.eos_token_id = [*model.generation_config.eos_token_id, *range(5, 400, 8)]
    pictures = [
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (16, 20, 3), dtype=np.uint8)) for n in (1, 2)
    ]
    records = [
        {"id": f"r{n}", "images": [image], "image_ids": [image_id(image)], "messages": []}
        for n, image in enumerate(pictures)
    ]
    generate = CandidateGenerator(
        model, processor, num_questions=4, num_answers=2, seed=3, question_sampling=Sampling(max_new_tokens=24),
        answer_sampling=Sampling(max_new_tokens=24), question_filter=QuestionFilter(min_words=1, english=False),
    )  # fmt: skip
    rows = list(generate(Dataset.from_list(records, features=instruct_features())))
    assert rows, generate.rejected
    for row in rows:
        question = text_of(row["prompt"][-1]["content"])
        assert question and len(set(row["answers"])) == 2
        assert not any(VUSR in text for text in (question, *row["answers"]))


def test_dpo_starts_at_ln_2_and_keeps_the_reference(run):
    trainer = run.dpo
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] != losses[0]
    reference = []
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, run.dpo_start[name])
        # Pairs never contain `<vusr>`; its row only matters in a tied output layer.
        trains = parameter.requires_grad and (run.family in TIED or "trainable_tokens" not in name)
        assert changed == trains, name
        reference += [changed] if "ref" in name.split(".") else []
    assert len(reference) == len(list(run.sft.model.parameters())) - len(run.before) and not any(reference)


def test_the_merged_model_gives_the_same_log_probabilities(run):
    trainer = run.dpo
    assert trainer
    model, processor = load_policy(str(run.directory / "dpo"))
    assert torch.equal(log_probs(model, processor), log_probs(trainer.model, run.policy[1]))
    facts = merge_policy(
        str(run.directory / "dpo"), run.directory / "merged", [tiny_run.conversation(7)], batches_of=batches_of
    )
    assert facts["proof"]["stored_difference"] <= 1e-4
    merged, merged_processor = load_policy(str(run.directory / "merged"))
    assert type(merged) is type(run.base_model)
    assert merged_processor.chat_template == processor.chat_template
    torch.testing.assert_close(log_probs(merged, merged_processor), log_probs(model, processor), rtol=0, atol=1e-4)
    token = merged_processor.tokenizer.convert_tokens_to_ids(VUSR)
    row = merged.get_input_embeddings().weight[token]
    assert not torch.equal(row, run.before[f"{model_parts(merged).embedding}.weight"][token])


def test_messages_list_exactly_the_tested_families():
    models = [base_model(family)[0] for family in [*MODELS, *CROSS_ATTENTION]]
    assert {model.config.model_type for model in models} == {
        model_type for family in FAMILIES.values() for model_type in family.model_types
    }


UNSUPPORTED = {  # type, settings, message
    "text only": ("llama", {}, "`llama`, which has no vision tower"),
    "Q-Former": ("blip-2", {"text_config": {"model_type": "opt"}}, "`blip-2`, which has a Q-Former or an encoder"),
    "Q-Former with text": (
        "instructblip",
        {"text_config": {"model_type": "opt"}},
        "has a Q-Former or an encoder",
    ),
    "encoder and decoder": ("florence2", {}, "`florence2`, which has a Q-Former or"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_are_refused_before_weights_are_read(tmp_path, kind):
    model_type, settings, message = UNSUPPORTED[kind]
    CONFIG_MAPPING[model_type](**settings).save_pretrained(tmp_path)  # without weights
    with pytest.raises(UserError, match=message) as error:
        load_policy(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "Tested families: Gemma 3" in str(error.value)


def test_an_unsupported_model_object_is_refused():
    config = CONFIG_MAPPING["blip-2"](text_config={"model_type": "opt"})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UserError, match="Q-Former"):
        adapter_config(model)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_processor_without_torchvision_names_the_package(tmp_path):
    model, processor = base_model("qwen2.5-vl")
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings |= {
        "processor_class": "Qwen2_5_VLProcessor", "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }  # fmt: skip
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="No processor could be loaded from .*Torchvision"):
        load_policy(str(tmp_path))


def test_a_processor_without_replacement_offsets_is_refused(monkeypatch):
    processor = tiny_model("llava-1.5-hf")[1]
    call = type(processor).__call__

    def call_without_offsets(self, *args, **kwargs):
        batch = call(self, *args, **kwargs)
        batch.pop("text_replacement_offsets")
        return batch

    monkeypatch.setattr(type(processor), "__call__", call_without_offsets)
    with pytest.raises(UserError, match="return_text_replacement_offsets.*Tested families"):
        DataCollatorForSelfQuestioning(processor)([tiny_run.conversation(0)])
