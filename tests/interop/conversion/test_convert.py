# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that a converted checkpoint gives the logits of the original, or that it is refused with a reason."""

import json
import os
import pickle

import original_checkpoints as original
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from medst_trl.base.errors import UserError
from medst_trl.interop.conversion.convert import original_config
from medst_trl.interop.conversion.weights import model_name, open_weights


CLIP = "vision_model."
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is the USER there?"}]}]
ROWS = len(original.PIECES)


def full_model(kind="mlp2x_gelu", rows=ROWS):
    """Return all weights under their original names, including the vision tower."""
    return original.language_weights(rows) | original.projector_weights(kind) | original.vision_weights(original.TOWER)


def split_tower(weights):
    """Split the weights into those without the vision tower and those of the tower under the names of CLIP."""
    tower = {name.replace(original.TOWER, CLIP): t for name, t in weights.items() if name.startswith(original.TOWER)}
    return {name: t for name, t in weights.items() if not name.startswith(original.TOWER)}, tower


def assert_same_logits(directory, weights, kind):
    """Check that the converted model gives the logits of the original forward pass."""
    # In float32, the extractor may choose another of two equally similar centers.
    dtype = torch.float64 if kind == "cluster" else torch.float32
    model, info = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(directory)
    image = Image.effect_noise((150, 90), 80).convert("RGB")
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(text=text, images=image, return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((inputs["input_ids"] == image_id).sum()) == 17**2 and image_id == model.config.image_token_id
    inputs["pixel_values"], weights = inputs["pixel_values"].to(dtype), {n: t.to(dtype) for n, t in weights.items()}
    expected = original.forward(weights, kind, inputs["input_ids"][0], inputs["pixel_values"], image_id)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
    rows = expected.shape[1]
    assert expected.std() > 0.1
    assert (logits[:, :rows] - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    return model, processor


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "cluster"])
@pytest.mark.parametrize("form", ["bin", "sharded-bin", "safetensors", "sharded-safetensors"])
def test_full_models_in_every_format_give_the_same_logits(tmp_path, kind, form):
    weights = full_model(kind)
    if form.startswith("sharded"):
        body, tower = split_tower(weights)
        original.write_clip(tmp_path / "clip", tower, form.removeprefix("sharded-"))
    else:  # the checkpoint contains the tower: only the configuration is read from the directory of CLIP
        body = weights | {
            f"{original.TOWER}embeddings.position_ids": torch.arange(290)[None],
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5),
        }
        original.write_clip(tmp_path / "clip")
    source = original.write_checkpoint(tmp_path / "source", body, kind, form)
    converted = original.convert(str(source), tmp_path / "out", max_shard_size="40KB")
    assert converted["model_type"] == {"mlp2x_gelu": "llava", "cluster": "prototype_llava"}[kind]
    assert len(converted["left_out"]) == (5 if form.startswith("sharded") else 2)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert_same_logits(tmp_path / "out", weights, kind)


@pytest.mark.parametrize("base_form", ["original", "converted"])
@pytest.mark.parametrize("prefixes", [("model.vision_tower.vision_tower."), ("vision_tower.")])
def test_a_training_output_is_merged_with_its_base(tmp_path, base_form, prefixes):
    weights = full_model("mlp2x_gelu")
    original.write_clip(tmp_path / "clip")
    base = original.write_checkpoint(tmp_path / "base", weights)
    if base_form == "converted":
        original.convert(str(base), tmp_path / "converted")
        base = tmp_path / "converted"
    lora = original.lora_weights(original.language_weights(), "base_model.model.")
    tower = original.vision_weights("vision_model.")
    start = f"base_model.model.{prefixes}"
    vision_lora = original.lora_weights(tower, start, seed=4)
    projector = original.projector_weights("cluster", seed=5)
    output = original.write_training_output(
        tmp_path / "output", lora, {f"base_model.model.{name}": t for name, t in projector.items()}, vision_lora
    )
    converted = original.convert(str(output), tmp_path / "out", base=str(base))
    assert converted["vusr_role"] == "text" and converted["changed"] == (len(lora) + len(vision_lora)) // 2

    merged = original.merged(original.language_weights(), lora, "base_model.model.")
    merged_tower = original.merged(tower, vision_lora, start)
    merged |= {name.replace(CLIP, original.TOWER): tensor for name, tensor in merged_tower.items()} | projector
    assert_same_logits(tmp_path / "out", merged, "cluster")


def test_a_training_output_is_merged_with_a_language_model_and_clip(tmp_path):
    """The LoRA weights of LLaVA-1.5 are published in this form, for Vicuna and CLIP."""
    body, tower = split_tower(full_model())
    projector = {f"base_model.model.{name}": body.pop(name) for name in list(body) if "mm_projector" in name}
    base = original.write_checkpoint(tmp_path / "vicuna", body, None, model_type="llama", mm_vision_tower=None)
    original.write_clip(tmp_path / "clip", tower)
    lora = original.lora_weights(original.language_weights(), "base_model.model.")
    output = original.write_training_output(tmp_path / "output", lora, projector, kind="mlp2x_gelu")
    parts = {"base": str(base), "vision_tower": str(tmp_path / "clip")}
    assert original.convert(str(output), tmp_path / "out", **parts)["vusr_role"] == "token"
    assert_same_logits(tmp_path / "out", full_model() | original.merged(body, lora, "base_model.model."), "mlp2x_gelu")


def test_separately_published_parts_are_combined(tmp_path):
    weights = full_model("cluster")
    body, tower = split_tower(weights)
    projector = {name: body.pop(name) for name in list(body) if "mm_projector" in name}
    source = original.write_checkpoint(tmp_path / "llm", body, "cluster", mm_vision_tower="/home/author/clip")
    original.write_clip(tmp_path / "vit", tower, "safetensors")
    torch.save(projector, tmp_path / "mm_projector.bin")
    parts = {"projector": str(tmp_path / "mm_projector.bin"), "vision_tower": str(tmp_path / "vit")}
    original.convert(str(source), tmp_path / "out", **parts)
    assert_same_logits(tmp_path / "out", weights, "cluster")
    with pytest.raises(UserError, match="14 tensors are missing"):
        original.convert(str(source), tmp_path / "no", vision_tower=parts["vision_tower"])


@pytest.mark.parametrize("rows", [ROWS, ROWS + 1, ROWS + 100])
def test_every_token_has_a_row_of_the_embedding(tmp_path, rows):
    weights = full_model(rows=rows)
    original.write_clip(tmp_path / "clip")
    source = original.write_checkpoint(tmp_path / "source", weights, vocab_size=len(original.PIECES))
    original.convert(str(source), tmp_path / "out")
    model, processor = assert_same_logits(tmp_path / "out", weights, "mlp2x_gelu")
    assert len(processor.tokenizer) == len(original.PIECES) + 2 < model.get_input_embeddings().num_embeddings
    assert (
        processor.tokenizer.pad_token == "<pad>" and model.generation_config.pad_token_id == len(original.PIECES) + 1
    )


def test_weights_keep_their_type_and_lora_is_merged_in_float32(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in full_model().items()}
    original.write_clip(tmp_path / "clip")
    base = original.write_checkpoint(tmp_path / "base", weights)
    lora = original.lora_weights(original.language_weights(), "base_model.model.")
    output = original.write_training_output(tmp_path / "output", lora, {}, kind="mlp2x_gelu")
    assert original.convert(str(output), tmp_path / "out", base=str(base))["dtype"] == "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    expected = original.merged({name: weights[name].float()}, lora, "base_model.model.")[name].bfloat16()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("language_model.model.layers.0.mlp.up_proj.weight"), expected)
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_images_are_padded_as_in_training_at_every_stage(tmp_path):
    original.write_clip(tmp_path / "clip")
    source = original.write_checkpoint(tmp_path / "source", full_model())
    original.convert(str(source), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    wide = processor(Image.new("RGB", (272, 136), "white"), return_tensors="pt")["pixel_values"][0]
    assert wide.shape == (3, 136, 136)
    # the padding has the mean colour of this tower, which is about zero after normalization, unlike white
    assert wide[:, :30].abs().max() < 0.05 and wide[:, 60:76].min() > 1


def refusal_of(tmp_path, weights, **config):
    """Convert a checkpoint that must be refused, and return the message."""
    original.write_clip(tmp_path / "clip")
    source = original.write_checkpoint(tmp_path / "source", weights, **config)
    with pytest.raises(UserError) as refused:
        original.convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(refused.value)


def test_missing_unused_and_misshapen_tensors_are_listed(tmp_path):
    weights = full_model()
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.mm_projector.2.weight"] = torch.ones(7, 40)
    weights |= {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(56, 40) for layer in range(2, 30)}
    message = refusal_of(tmp_path, weights | {"optimizer.state": torch.ones(3)})
    assert "1 tensors are missing" in message and "model.language_model.layers.1.mlp.up_proj.weight" in message
    assert "model.mm_projector.2.weight [7, 40] in pytorch_model.bin, expected [40, 40]" in message
    assert "29 tensors have no place" in message and "optimizer.state" not in message


def test_a_lora_layer_of_another_model_is_refused(tmp_path):
    original.write_clip(tmp_path / "clip")
    base = original.write_checkpoint(tmp_path / "base", full_model())
    lora = {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 40)}
    lora["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = torch.ones(56, 4)
    lora["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(4, 41)
    lora["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] = torch.ones(56, 4)
    output = original.write_training_output(tmp_path / "output", lora, {}, kind="mlp2x_gelu")
    with pytest.raises(UserError, match=r"layers\.7(?s:.)*layers\.0.*expected \[56, 40\]"):
        original.convert(str(output), tmp_path / "out", base=str(base))
    with pytest.raises(UserError, match=r"--base.*/home/author/base"):
        original.convert(str(output), tmp_path / "out")


class Trap:
    """Object that creates a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, protocol):
    original.write_clip(tmp_path / "clip")
    source = original.write_checkpoint(tmp_path / "source", full_model())
    content, file = {"model.norm.weight": Trap(tmp_path / "created_by_pickle")}, source / "pytorch_model.bin"
    if protocol == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds more than tensors.*safetensors"):
        original.convert(str(source), tmp_path / "out")
    assert not (tmp_path / "created_by_pickle").exists() and not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(content))  # unpickling does create the directory
    assert (tmp_path / "created_by_pickle").exists()


def test_files_in_the_legacy_format_of_pytorch_are_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert open_weights(tmp_path / "old.bin")[0].tensor.tolist() == [1, 1]


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_damaged_and_incomplete_downloads_are_refused(tmp_path, form):
    original.write_clip(tmp_path / "clip")
    source = original.write_checkpoint(tmp_path / "source", full_model(), form=f"sharded-{form}")

    def refusal():
        with pytest.raises(UserError) as refused:
            original.convert(str(source), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(refused.value)

    shard = next(source.glob(f"*-00002-of-00002.{form}"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert shard.name in refusal() and "damaged or incomplete" in refusal()
    shard.unlink()
    assert f"lacks 1 of the 2 shards that its index lists: {shard.name}" in refusal()
    shard.write_bytes(whole)
    index = next(source.glob("*.index.json"))
    index_text = index.read_text()
    index.write_text(index_text.replace(shard.name, f"../{shard.name}"))
    original.convert(str(source), tmp_path / "within")  # the file of this name inside the directory
    index.unlink()
    assert "holds no weights" in refusal() and "shards with their index" in refusal()
    index.write_text(index_text)
    (source / "tokenizer.model").unlink()
    assert "cannot be read (FileNotFoundError" in refusal() and "Copy that of the language model" in refusal()
    original.write_tokenizer(source)
    (source / "config.json").write_text("{")
    assert "config.json is damaged" in refusal()
    (source / "config.json").unlink()
    assert "no config.json" in refusal()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'.*LLaVA-1.5, SQ-LLaVA or STLLaVA-Med"),
        ({"mm_projector_type": None}, "mm_projector_type is None"),
        ({"model_type": "llava_mistral"}, "'llava_mistral'.*llava_llama"),
        ({"model_type": "qwen2_vl"}, "'qwen2_vl'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_layer": 99}, "mm_vision_select_layer is 99"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer is '-2'"),
        ({"hidden_size": "forty"}, "impossible model.*hidden_size"),
        ({"num_attention_heads": 7}, "impossible model.*attention heads"),
        ({"num_attention_heads": 0}, "impossible model"),
        ({"mm_vision_tower": 3}, "names no mm_vision_tower"),
        ({"mm_vision_tower": "/home/author/clip"}, "--vision_tower"),
        ({"mm_vision_tower": None}, "names no mm_vision_tower"),
        ({"vocab_size": 5, "text_config": {}, "model_type": "llava"}, "Hugging Face layout already"),
    ],
)
def test_unsupported_models_are_refused(tmp_path, config, message):
    import re

    assert re.search(message, refusal_of(tmp_path, full_model(), **config))


@pytest.mark.parametrize(
    "part, message",
    [("text_config", "not the model that its config.json describes"), ("vision_config", "names no mm_vision_tower")],
)
def test_a_converted_base_with_a_damaged_configuration_is_refused(tmp_path, part, message):
    original.write_clip(tmp_path / "clip")
    base = original.write_checkpoint(tmp_path / "base", full_model())
    original.convert(str(base), tmp_path / "converted")
    path = tmp_path / "converted" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: None}))
    lora = original.lora_weights(original.language_weights(), "base_model.model.")
    output = original.write_training_output(tmp_path / "output", lora, {}, kind="mlp2x_gelu")
    with pytest.raises(UserError, match=message):
        original.convert(str(output), tmp_path / "out", base=str(tmp_path / "converted"))


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "multi_modal_projector.", "model.multi_modal_projector."])
def test_the_layers_of_the_projector_are_found_under_each_name(prefix):
    names = [model_name(f"{prefix}{layer}.bias") for layer in (0, 2)]
    assert names == [f"model.multi_modal_projector.linear_{number}.bias" for number in (1, 2)]


@pytest.mark.parametrize(
    "files, weights",
    [
        (["model-00001-of-00002.safetensors", "pytorch_model.bin"], {"*.safetensors"}),
        (["pytorch_model.bin"], {"*.safetensors", "*.bin"}),
        (["adapter_model.safetensors", "non_lora_trainables.bin"], {"*.safetensors", "*.bin"}),
    ],
)
def test_only_files_that_are_read_are_downloaded(tmp_path, monkeypatch, files, weights):
    import huggingface_hub

    from medst_trl.interop.conversion.convert import local_directory

    downloads = []
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: files)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: downloads.append((a, k)) or str(tmp_path)
    )
    assert local_directory("org/name@v1", "It") == tmp_path
    assert downloads[0][0] == ("org/name",) and downloads[0][1]["revision"] == "v1"
    assert set(downloads[0][1]["allow_patterns"]) == {"*.json", "*.model"} | weights
    local_directory("org/name", "It", weights=False)
    assert set(downloads[1][1]["allow_patterns"]) == {"*.json", "*.model"}


def test_a_missing_checkpoint_is_refused():
    with pytest.raises(UserError, match="neither a directory nor available on the Hub"):
        original.convert("org/is-not-there", "out")


@pytest.mark.parametrize("setting", ["source", "vision_tower", "vision_lora"])
def test_a_file_instead_of_a_directory_is_refused(tmp_path, setting):
    original.write_clip(tmp_path / "clip")
    source = original.write_checkpoint(tmp_path / "source", full_model())
    settings = {"source": str(source), setting: str(source / "pytorch_model.bin")}
    with pytest.raises(UserError, match=r"pytorch_model\.bin has no (adapter_)?config\.json"):
        original.convert(**settings, output_dir=tmp_path / "out")


def test_an_interrupted_conversion_starts_again(tmp_path, monkeypatch):
    from medst_trl.policy import merging

    original.write_clip(tmp_path / "clip")
    weights, out = full_model(), tmp_path / "out"
    other = original.write_checkpoint(tmp_path / "other", {name: tensor + 0.01 for name, tensor in weights.items()})
    original.convert(str(other), out, max_shard_size="40KB")
    source = original.write_checkpoint(tmp_path / "source", weights)

    def move_some_files(staging, target):
        for path in sorted(staging.glob("*.safetensors"))[:3]:
            path.rename(target / path.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merging, "move_files", move_some_files)
        with pytest.raises(KeyboardInterrupt):
            original.convert(str(source), out, max_shard_size="40KB")
    assert not (out / "config.json").exists() and len(list(out.glob("*.safetensors"))) == 3
    original.convert(str(source), out, max_shard_size="40KB")
    assert not list(out.glob(".*"))
    assert_same_logits(out, weights, "mlp2x_gelu")


def test_two_weights_that_share_memory_are_both_written(tmp_path):
    original.write_clip(tmp_path / "clip")
    weights = full_model()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    source = original.write_checkpoint(tmp_path / "source", weights)
    torch.save(weights, source / "pytorch_model.bin")
    original.convert(str(source), tmp_path / "out")
    assert_same_logits(tmp_path / "out", weights, "mlp2x_gelu")


def test_a_finished_stage_is_skipped_and_refuses_other_settings(tmp_path, capsys):
    from medst_trl.interop.convert_stage import ConvertArguments, main

    original.write_clip(tmp_path / "clip")
    original.write_checkpoint(tmp_path / "source", full_model("cluster"), "cluster")
    arguments = {"source": str(tmp_path / "source"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match="Unknown vusr_role 'word'"):
        main(ConvertArguments(**arguments, vusr_role="word"))
    main(ConvertArguments(**arguments))
    assert "with the role text" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["status"] == "complete" and record["vusr_role"] == "text"
    main(ConvertArguments(**arguments))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="dtype"):
        main(ConvertArguments(**arguments, dtype="bfloat16"))
    assert_same_logits(tmp_path / "out", full_model("cluster"), "cluster")


@pytest.mark.parametrize(
    "change, kind",
    [
        (torch.Tensor.to_sparse, "sparse_coo"),
        (torch.Tensor.char, "int8"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda tensor: tensor.to("meta"), "without numbers"),
    ],
)
def test_tensors_without_plain_numbers_are_listed(tmp_path, change, kind):
    weights = full_model()
    weights["model.norm.weight"] = change(weights["model.norm.weight"])
    message = refusal_of(tmp_path, {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"})
    assert "model.language_model.norm.weight" in message  # listed as missing
    torch.save(weights, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"not plain floating-point numbers.*\n  model\.norm\.weight.*: {kind}"):
        original.convert(str(tmp_path / "source"), tmp_path / "out")


def test_values_that_are_not_finite_are_refused(tmp_path):
    original.write_clip(tmp_path / "clip")
    weights = full_model()
    weights["model.norm.weight"][3] = 1e6
    source = original.write_checkpoint(tmp_path / "source", weights)
    with pytest.raises(UserError, match=r"norm\.weight has values that are too large for torch.float16"):
        original.convert(str(source), tmp_path / "out", dtype="float16")
    weights["model.norm.weight"][3] = float("nan")
    source = original.write_checkpoint(tmp_path / "source", weights)
    with pytest.raises(UserError, match=r"norm\.weight has values that are not finite"):
        original.convert(str(source), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_training_output_without_its_projector_is_refused(tmp_path):
    """The projector of the base has the same shape, but must not be used in its place."""
    original.write_clip(tmp_path / "clip")
    base = original.write_checkpoint(tmp_path / "base", full_model())
    lora = original.lora_weights(original.language_weights(), "base_model.model.")
    output = original.write_training_output(tmp_path / "output", lora, {}, kind="mlp2x_gelu")
    (output / "non_lora_trainables.bin").unlink()
    with pytest.raises(UserError, match=r"lacks the projector, .* in full \(non_lora_trainables\.bin\)"):
        original.convert(str(output), tmp_path / "out", base=str(base))


def test_a_converted_base_keeps_the_mean_colour_of_its_tower(tmp_path):
    original.write_clip(tmp_path / "clip")
    base = original.write_checkpoint(tmp_path / "base", full_model())
    original.convert(str(base), tmp_path / "converted")
    lora = original.lora_weights(original.language_weights(), "base_model.model.")
    output = original.write_training_output(tmp_path / "output", lora, {}, kind="mlp2x_gelu")
    original.convert(str(output), tmp_path / "out", base=str(tmp_path / "converted"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert tuple(processor.image_mean) == (0.4, 0.5, 0.6) and processor.do_pad


@pytest.mark.parametrize("pads", [True, False])
def test_a_base_with_the_processor_of_an_older_version_pads_as_before(tmp_path, pads):
    """Before transformers 4.46, preprocessor_config.json had the settings of images."""
    original.write_clip(tmp_path / "clip")
    base = original.write_checkpoint(tmp_path / "base", full_model())
    original.convert(str(base), tmp_path / "converted")
    path = tmp_path / "converted" / "processor_config.json"
    images = json.loads(path.read_text())["image_processor"] | {"do_pad": pads}
    path.unlink()
    (tmp_path / "converted" / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "output").mkdir()
    config = original_config(tmp_path / "output", tmp_path / "converted")
    assert config["image_aspect_ratio"] == ("pad" if pads else "square")


def test_a_directory_never_contains_two_models(tmp_path):
    original.write_clip(tmp_path / "clip")
    first, second = full_model(), {name: tensor + 0.01 for name, tensor in full_model().items()}
    one = original.write_checkpoint(tmp_path / "one", first)
    other = original.write_checkpoint(tmp_path / "other", second)
    original.convert(str(one), tmp_path / "out")
    original.convert(str(other), tmp_path / "out", max_shard_size="40KB")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_same_logits(tmp_path / "out", second, "mlp2x_gelu")
    with pytest.raises(UserError, match="is also the input"):
        original.convert(str(one), one)
    assert (one / "pytorch_model.bin").is_file()


@pytest.mark.parametrize("size", ["abc", "0", "1000"])
def test_an_invalid_shard_size_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=f"'{size}' is not a size"):
        original.convert(str(tmp_path), tmp_path / "out", max_shard_size=size)
