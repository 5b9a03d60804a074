# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The prototype extractor matches the published code, and the Auto classes load the LLaVA model that uses it."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny_run
import torch
from family_models import tiny_model
from live_bytes import LiveBytes
from plain_extractor import plain
from safetensors import safe_open
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


def make_extractor(channels=8, out=12, seed=0, **settings) -> PrototypeExtractor:
    torch.manual_seed(seed)
    extractor = PrototypeExtractor(channels, out, **settings).double()
    with torch.no_grad():
        extractor.sim_alpha.fill_(1.7)
        extractor.sim_beta.fill_(-0.4)
    return extractor


def test_the_extractor_matches_the_published_code(shared_data):
    path = shared_data.parent / "golden" / "prototype_extractor.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden values at {path}")
    with safe_open(path, "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sizes = [int(file.metadata()[name]) for name in ("channels", "channels_out", "num_centers", "iterations")]
    extractor = PrototypeExtractor(*sizes).double()
    prefix = "weights."
    extractor.load_state_dict({n.removeprefix(prefix): v for n, v in golden.items() if n.startswith(prefix)})
    x = golden["input"].requires_grad_()
    output = extractor(x)
    output.backward(golden["grad_output"])
    results = {
        "output": output, "grad_input": x.grad, "grad_sim_alpha": extractor.sim_alpha.grad,
        "grad_weights_f": extractor.f.weight.grad,
    }  # fmt: skip
    for name, value in results.items():
        torch.testing.assert_close(value, golden[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("length", "num_centers", "iterations"),
    [(36, 9, 2), (10, 4, 2), (7, 7, 1), (3, 8, 2), (1, 5, 3), (576, 256, 2)],
    ids=[
        "pools equal",
        "pools overlap",
        "one position per center",
        "fewer positions than centers",
        "one position",
        "as published",
    ],
)
def test_the_extractor_matches_the_plain_implementation(length, num_centers, iterations):
    extractor = make_extractor(num_centers=num_centers, iterations=iterations)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for implementation in (extractor, lambda x: plain(extractor, x)):
        output = implementation(x)
        inputs = [x, *extractor.parameters()]
        weights = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output)
        results.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_ties_go_to_the_first_center():
    extractor = make_extractor(num_centers=6)
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 6, 8)  # all centers are equal
    torch.testing.assert_close(extractor(x), plain(extractor, x), rtol=1e-9, atol=1e-10)


def test_every_parameter_of_the_extractor_trains_and_the_unused_layer_is_saved():
    extractor = make_extractor(num_centers=4)
    extractor(torch.randn(2, 9, 8, dtype=torch.float64)).square().sum().backward()
    parameters = dict(extractor.named_parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    assert set(extractor.state_dict()) - set(parameters) == {"ln_1.weight", "ln_1.bias"}


def test_the_extractor_runs_in_half_precision():
    extractor = make_extractor(channels=32, num_centers=16).to(torch.bfloat16)
    x = torch.randn(2, 36, 32, dtype=torch.bfloat16, requires_grad=True)
    output = extractor(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and x.grad.isfinite().all()
    exact = extractor.double()(x.double())
    # a position between two centers may choose the other one
    assert (output - exact).norm() < 0.05 * exact.norm()


def test_the_extractor_needs_a_twentieth_of_the_memory_of_the_plain_implementation():
    """One image with the published numbers of centers and positions and a quarter of the channels."""
    torch.manual_seed(0)
    extractor = PrototypeExtractor(256, 256)
    x = torch.randn(1, 576, 256, requires_grad=True)
    peaks = []
    for implementation in (extractor, lambda x: plain(extractor, x)):
        extractor.zero_grad()
        with LiveBytes() as memory:
            implementation(x).sum().backward()
        peaks.append(memory.peak)
    assert 20 * peaks[0] < peaks[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prototype_llava")
    model, processor = tiny_model("prototype-llava")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForImageTextToText; import medst_trl",
        "import medst_trl; from transformers import LlavaConfig, AutoModelForImageTextToText",
        "import medst_trl; from transformers import LlamaForCausalLM, AutoModelForImageTextToText",
    ],
    ids=["last", "before a configuration", "before a model"],
)
def test_the_auto_class_loads_the_model_in_any_order_of_imports(directory, imports):
    code = f"{imports}; print(type(AutoModelForImageTextToText.from_pretrained({str(directory)!r})).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "PrototypeLlavaForConditionalGeneration\n", result.stderr


def test_the_registered_configuration_can_be_loaded_before_the_model_is_imported(directory):
    code = (
        "import medst_trl; from transformers import CONFIG_MAPPING; "
        f"print(CONFIG_MAPPING['prototype_llava'].from_pretrained({str(directory)!r}).num_centers)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "3\n", result.stderr


def test_a_loaded_model_equals_the_saved_model(directory):
    saved = tiny_model("prototype-llava")[0]
    config = AutoConfig.from_pretrained(directory)
    assert type(config) is PrototypeLlavaConfig and (config.num_centers, config.iterations) == (3, 2)
    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert type(model) is PrototypeLlavaForConditionalGeneration
    assert not any(report.values())
    assert saved.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.state_dict().items())
    projector = "model.multi_modal_projector"
    names = {n.removeprefix(f"{projector}.") for n in model.state_dict() if n.startswith(projector)}
    assert names == set(PrototypeExtractor(1, 1).state_dict())


def test_the_other_auto_classes_load_it(directory, tmp_path):
    assert type(AutoModel.from_pretrained(directory)) is PrototypeLlavaModel
    without_processor_class = shutil.copytree(directory, tmp_path / "without_processor_class")
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((without_processor_class / name).read_text())
        settings.pop("processor_class", None)
        (without_processor_class / name).write_text(json.dumps(settings))
    assert isinstance(AutoProcessor.from_pretrained(without_processor_class), LlavaProcessor)


def test_missing_weights_are_initialized_as_documented():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(tiny_model("prototype-llava")[0].config)
    model.to_empty(device="cpu").init_weights()
    projector = model.model.multi_modal_projector
    assert (projector.sim_alpha.item(), projector.sim_beta.item()) == (1.0, 0.0)
    assert torch.equal(projector.ln_1.weight, torch.ones(32)) and not projector.ln_1.bias.any()


def test_the_model_runs_in_half_precision():
    model, processor = tiny_model("prototype-llava")
    batch = DataCollatorForSelfQuestioning(processor)([tiny_run.conversation(0)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        exact = model(**inputs).logits
        half = model.to(torch.bfloat16)(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}).logits
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.25 * exact.norm()  # 1.4 for unrelated logits


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"bf16": True, "use_cpu": True}], ids=str)
def test_gradient_checkpointing_and_half_precision_train_like_full_precision(tmp_path, settings):
    losses = []
    for name, overrides in (("plain", {}), ("overrides", settings)):
        model, processor = tiny_model("prototype-llava")
        config = adapter_config(model, vusr_token_id=add_vusr(processor), r=4, vision_r=2, lora_dropout=0.0)
        torch.manual_seed(0)
        policy = (model, processor, config)
        trainer = tiny_run.make_trainer(tmp_path / name, policy=policy, n=4, max_steps=3, **overrides)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6 if "bf16" not in settings else 0.05)
