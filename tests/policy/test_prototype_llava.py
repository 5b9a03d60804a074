# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What test_any_vlm.py does not ask of it: the Auto classes know it, in any order of imports, and half precision."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny_run
import torch
from family_models import tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.prototype_llava import (
    PrototypeExtractor,
    PrototypeLlavaConfig,
    PrototypeLlavaForConditionalGeneration,
    PrototypeLlavaModel,
)
from medst_trl.policy.vusr import add_vusr
from medst_trl.training.collator import DataCollatorForSelfQuestioning


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prototype_llava")
    model, processor = tiny_model("prototype-llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForImageTextToText; import medst_trl",
        "import medst_trl; from transformers import LlavaConfig, AutoModelForImageTextToText",
        "import medst_trl; from transformers import LlamaForCausalLM, AutoModelForImageTextToText",
    ],
    ids=["last", "before a configuration", "before a model"],
)
def test_the_auto_class_loads_it_in_any_order_of_imports(folder, imports):
    code = f"{imports}; print(type(AutoModelForImageTextToText.from_pretrained({str(folder)!r})).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "PrototypeLlavaForConditionalGeneration\n", result.stderr


def test_what_is_saved_is_what_was_loaded(folder):
    saved = tiny_model("prototype-llava")[0]
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is PrototypeLlavaConfig and (config.num_centers, config.iterations) == (3, 2)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model) is PrototypeLlavaForConditionalGeneration
    assert not any(report.values())
    assert saved.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.state_dict().items())
    projector = "model.multi_modal_projector"
    names = {n.removeprefix(f"{projector}.") for n in model.state_dict() if n.startswith(projector)}
    assert names == set(PrototypeExtractor(1, 1).state_dict())


def test_the_other_auto_classes(folder, tmp_path):
    assert type(AutoModel.from_pretrained(folder)) is PrototypeLlavaModel
    unnamed = shutil.copytree(folder, tmp_path / "unnamed")
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((unnamed / name).read_text())
        settings.pop("processor_class", None)
        (unnamed / name).write_text(json.dumps(settings))
    assert isinstance(AutoProcessor.from_pretrained(unnamed), LlavaProcessor)


def test_weights_that_are_missing_are_drawn_as_described():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(tiny_model("prototype-llava")[0].config)
    model.to_empty(device="cpu").init_weights()
    projector = model.model.multi_modal_projector
    assert (projector.sim_alpha.item(), projector.sim_beta.item()) == (1.0, 0.0)
    assert torch.equal(projector.ln_1.weight, torch.ones(32)) and not projector.ln_1.bias.any()


def test_half_precision():
    model, processor = tiny_model("prototype-llava")
    batch = DataCollatorForSelfQuestioning(processor)([tiny_run.conversation(0)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        exact = model(**inputs).logits
        half = model.to(torch.bfloat16)(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}).logits
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.25 * exact.norm()  # of unrelated logits it would be 1.4


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"bf16": True, "use_cpu": True}], ids=str)
def test_training_with_recomputed_layers_and_in_half_precision(tmp_path, settings):
    losses = []
    for name, changed in (("plain", {}), ("changed", settings)):
        model, processor = tiny_model("prototype-llava")
        config = adapter_config(model, vusr_token_id=add_vusr(processor), r=4, vision_r=2, lora_dropout=0.0)
        torch.manual_seed(0)
        policy = (model, processor, config)
        trainer = tiny_run.make_trainer(tmp_path / name, policy=policy, n=4, max_steps=3, **changed)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6 if "bf16" not in settings else 0.05)
