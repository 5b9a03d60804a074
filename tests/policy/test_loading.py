# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading a policy: base, adapter, processor, `<vusr>`, the Hub, and the language model in 4 bits (QLoRA)."""

import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys

import pytest
import tiny_dpo
import tiny_run
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline
from transformers.quantizers import quantizer_bnb_4bit

from medst_trl.base.errors import UserError
from medst_trl.data.schema import preference_features
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.engines.decoding import chat_inputs
from medst_trl.pipeline.stages import dpo, sft
from medst_trl.policy.adapters import BASE_FILE, adapter_config, retie_lm_head, write_base_file
from medst_trl.policy.loading import load_policy
from medst_trl.policy.vusr import VUSR


def save_base(directory, **kwargs):
    model, processor = tiny_llava(**tiny_run.SMALL, **kwargs)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model, processor


def prompt_inputs(processor, question):
    content = [{"type": "image", "image": Image.new("RGB", (16, 16), "gray")}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_resizing_does_not_change_the_logits(tmp_path):
    base, base_processor = save_base(tmp_path)
    model, processor = load_policy(str(tmp_path))
    token = processor.tokenizer.convert_tokens_to_ids(VUSR)
    assert model.get_input_embeddings().num_embeddings == token + 1 == len(base_processor.tokenizer) + 1
    inputs = prompt_inputs(processor, "What is it?")
    with torch.no_grad():
        assert torch.equal(
            model(**inputs).logits[..., :token], base(**prompt_inputs(base_processor, "What is it?")).logits
        )


def test_loading_twice_gives_the_same_weights(tmp_path):
    save_base(tmp_path)
    first, second = (dict(load_policy(str(tmp_path))[0].named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_spare_row_is_used_before_the_vocabulary_grows(tmp_path):
    base, _ = save_base(tmp_path, spare_rows=8)
    model, processor = load_policy(str(tmp_path))
    assert model.get_input_embeddings().weight.shape == base.get_input_embeddings().weight.shape
    assert processor.tokenizer.convert_tokens_to_ids(VUSR) < model.get_input_embeddings().num_embeddings


def test_generation_stops_at_terminators_and_never_writes_the_token(tmp_path):
    save_base(tmp_path)
    model, processor = load_policy(str(tmp_path))
    token = processor.tokenizer.convert_tokens_to_ids(VUSR)
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id
    with torch.no_grad():
        model.get_output_embeddings().weight[token] = 100 * model.get_output_embeddings().weight.abs().max()
    torch.manual_seed(0)
    generated = model.generate(
        **prompt_inputs(processor, "What?"), do_sample=True, max_new_tokens=20, num_return_sequences=8
    )
    assert token not in generated[:, -20:]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spare_rows", [0, 8])
def test_an_adapter_reloads_with_its_token_and_template(tmp_path, tied, spare_rows):
    base_directory, adapter_directory = tmp_path / "base", tmp_path / "adapter"
    save_base(base_directory, tie_word_embeddings=tied, spare_rows=spare_rows)
    model, processor = load_policy(str(base_directory))
    token = processor.tokenizer.convert_tokens_to_ids(VUSR)
    model = get_peft_model(model, adapter_config(model, vusr_token_id=token, r=4, vision_r=2))
    retie_lm_head(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(adapter_directory, save_embedding_layers=False)
    processor.save_pretrained(adapter_directory)

    loaded, loaded_processor = load_policy(str(adapter_directory))
    assert loaded_processor.chat_template == processor.chat_template
    assert not any(p.requires_grad for p in loaded.parameters())
    for question in ("What is it?", VUSR):
        inputs = prompt_inputs(loaded_processor, question)
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, loaded(**inputs).logits)

    trainable, _ = load_policy(str(adapter_directory), is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == trained


def test_an_adapter_without_a_processor_uses_the_processor_of_its_base(tmp_path):
    base_directory, adapter_directory = tmp_path / "base", tmp_path / "adapter"
    save_base(base_directory)
    model, processor = load_policy(str(base_directory))
    get_peft_model(model, adapter_config(model, r=4, vision_r=0)).save_pretrained(adapter_directory)
    _, loaded = load_policy(str(adapter_directory))
    assert loaded.chat_template == processor.chat_template


def test_an_adapter_with_a_relative_base_loads_from_another_working_directory(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    save_base("runs/base")
    model, _ = load_policy("runs/base")
    adapter = get_peft_model(model, adapter_config(model, r=4, vision_r=0))
    adapter.save_pretrained("runs/adapter")
    write_base_file(adapter, "runs/adapter")
    assert json.loads((tmp_path / "runs/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == (
        "runs/base"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for adapter in (str(tmp_path / "runs/adapter"), "../runs/adapter"):
        loaded, _ = load_policy(adapter)
        assert loaded.get_base_model().name_or_path == str(tmp_path / "runs/base")
    assert not caplog.messages
    (tmp_path / "runs/adapter" / BASE_FILE).unlink()  # as the adapters of others
    with pytest.raises(UserError, match="from 'runs/base', which is not a directory here"):
        load_policy("../runs/adapter")
    assert load_policy("../runs/adapter", base_model_name_or_path="../runs/base")


def test_a_moved_base_must_be_given(tmp_path):
    base_directory, adapter_directory, elsewhere = tmp_path / "base", tmp_path / "adapter", tmp_path / "elsewhere"
    save_base(base_directory)
    model, processor = load_policy(str(base_directory))
    get_peft_model(model, adapter_config(model, r=4, vision_r=0)).save_pretrained(adapter_directory)
    processor.save_pretrained(adapter_directory)
    base_directory.rename(elsewhere)
    with pytest.raises(UserError, match="base_model_name_or_path"):
        load_policy(str(adapter_directory))
    assert load_policy(str(adapter_directory), base_model_name_or_path=str(elsewhere))


@pytest.mark.parametrize("name", ["missing/directory", "org/model-that-is-not-here"])
def test_a_missing_model_is_refused(name):
    with pytest.raises(UserError, match=name):
        load_policy(name)


def test_the_pipeline_leaves_a_bare_turn_open(tmp_path, monkeypatch):
    save_base(tmp_path)
    model, processor = load_policy(str(tmp_path))
    prompts, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: prompts.append(kwargs["input_ids"]) or generate(**kwargs))
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": Image.new("RGB", (16, 16), "gray")}, {"type": "text", "text": VUSR}]
    generated = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4)
    assert prompts[0][0, -1] == processor.tokenizer.convert_tokens_to_ids(VUSR)
    assert generated[0]["generated_text"]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="float17"):
        load_policy("nowhere", dtype="float17")


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_base(directory)
    return directory


@pytest.fixture
def base(saved_base, tmp_path):
    return shutil.copytree(saved_base, tmp_path / "base")


def change_weights(base, change):
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused(base):
    def without_one(weights):
        del weights[next(name for name in weights if name.endswith("linear_1.weight"))]

    change_weights(base, without_one)
    with pytest.raises(
        UserError, match=r"its files lack 1 weight such as model\.multi_modal_projector\.linear_1\.weight\. Download"
    ):
        load_policy(str(base))


def test_weights_of_another_shape_are_refused(base):
    change_weights(base, lambda weights: weights.update({sorted(weights)[5]: torch.ones(3, 3)}))
    with pytest.raises(UserError, match="No vision-language model could be loaded .*ignore_mismatched_sizes"):
        load_policy(str(base))


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors", ""),
        ("model.safetensors", "{}"),
        ("config.json", "[]"),
        ("processor_config.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
    ],
)
def test_damaged_or_unrelated_files_are_refused(base, name, content):
    (base / name).write_text(content)
    with pytest.raises(UserError, match=f"could be loaded from '{base}'"):
        load_policy(str(base))


def test_a_checkpoint_in_the_original_layout_is_refused(base):
    config = json.loads((base / "config.json").read_text())
    original = {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (base / "config.json").write_text(json.dumps(config | original))
    with pytest.raises(UserError, match=rf"medst convert --source {base}"):
        load_policy(str(base))


SCRIPT = """
import sys
from medst_trl import load_policy
from medst_trl.base.errors import UserError
try:
    load_policy(sys.argv[1])
except UserError as error:
    print(error)
"""


@pytest.fixture
def unreachable_url():
    """URL of a local port without a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_an_unreachable_model_is_refused_without_retries(unreachable_url, tmp_path):
    # In a separate process, because huggingface_hub reads the variables on import. Without the check it retries.
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": unreachable_url, "HF_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, "org/not-here"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert "'org/not-here' is not a directory" in process.stdout and unreachable_url in process.stdout
    assert "Retry" not in process.stderr


def test_directories_offline_mode_and_cached_models_are_accepted(unreachable_url, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    from medst_trl.base.errors import UserError
    from medst_trl.base.hub_ids import check_reachable

    check_reachable("org/not-here")  # the tests run in offline mode: transformers reports it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", unreachable_url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check_reachable(str(tmp_path))
    with pytest.raises(UserError, match="the local cache has no copy of it"):
        check_reachable("org/here")
    (tmp_path / "models--org--here" / "snapshots").mkdir(parents=True)
    check_reachable("org/here")
    assert "HF_HUB_OFFLINE=1" in capsys.readouterr().out


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra qlora)"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    model, processor = tiny_run.small_policy(text_size=64)
    model.save_pretrained(directory / "base")
    processor.save_pretrained(directory / "base")
    tiny_run.write_instruct(directory / "instruct", range(12))
    judged = {"image_ids": ["x"], "score_chosen": 9.0, "score_rejected": 2.0, "judge": "{}"}
    pairs = Dataset.from_list([tiny_dpo.pair(n) | judged for n in range(12)], features=preference_features())
    (directory / "preferences").mkdir()
    pairs.to_parquet(directory / "preferences" / "train-00000-of-00001.parquet")
    return directory


def train(stage, output_dir, **options):
    options = {
        "output_dir": output_dir, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "load_in_4bit": True, **options,
    }  # fmt: skip
    arguments = [argument for key, value in options.items() for argument in (f"--{key}", str(value))]
    stage.STAGE.main(*stage.STAGE.make_parser().parse_args_and_config(arguments))
    return load_file(output_dir / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapter(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "sft"
    paths = {"model_name_or_path": inputs / "base", "dataset": inputs / "instruct"}
    train(sft, directory, **paths, lora_r=4, vision_lora_r=2, bf16=True, use_cpu=True)
    return directory


@needs_bitsandbytes
def test_only_the_language_model_is_quantized(inputs):
    from bitsandbytes.nn import Linear4bit

    model, _ = load_policy(str(inputs / "base"), load_in_4bit=True)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, module in linear.items() if isinstance(module, Linear4bit)}
    assert quantized == {name for name in linear if name.startswith("model.language_model.")}
    assert len(quantized) == 14 and len(linear) > 30
    layer = linear["model.language_model.layers.0.mlp.up_proj"]
    assert layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested
    assert layer.weight.quant_type == "nf4"


@needs_bitsandbytes
def test_trained_weights_are_in_full_precision_and_load_with_either_base(inputs, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    kinds = ("language_model", "vision_tower", "multi_modal_projector", "trainable_tokens")
    assert all(any(kind in name for name in weights) for kind in kinds)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    row, logits = tiny_run.conversation(3), {}
    for four_bit in (True, False):
        model, processor = load_policy(str(adapter), load_in_4bit=four_bit, dtype="float32")
        model_inputs = chat_inputs(processor, [row["messages"][:1]], [row["images"]])
        with torch.no_grad():
            logits[four_bit] = model(**model_inputs).logits.flatten()
    similarity = torch.nn.functional.cosine_similarity(logits[True], logits[False], dim=0).item()
    assert 0.9 < similarity < 0.9999  # the precision of 4 bits


@needs_bitsandbytes
@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_starts_at_the_reference(inputs, adapter, tmp_path, precompute):
    paths = {"model_name_or_path": adapter, "dataset": inputs / "preferences", "ref_log_probs_dir": tmp_path / "ref"}
    weights = train(dpo, tmp_path / "dpo", **paths, precompute_ref_log_probs=precompute)
    log = json.loads((tmp_path / "dpo" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    before = load_file(adapter / "adapter_model.safetensors")
    assert weights.keys() == before.keys()
    for part in ("language_model", "vision_tower", "multi_modal_projector"):
        assert any(part in name and not torch.equal(weights[name], before[name]) for name in weights)


@needs_bitsandbytes
def test_full_finetuning_in_4_bits_is_refused(inputs, tmp_path):
    paths = {"model_name_or_path": inputs / "base", "dataset": inputs / "instruct"}
    with pytest.raises(UserError, match="use_lora: false"):
        train(sft, tmp_path / "sft", **paths, use_lora=False)


def test_the_error_for_a_missing_package_names_it(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    paths = {"model_name_or_path": inputs / "base", "dataset": inputs / "instruct"}
    with pytest.raises(UserError, match="No vision-language model .* requires bitsandbytes: .pip install"):
        train(sft, tmp_path / "sft", **paths)
