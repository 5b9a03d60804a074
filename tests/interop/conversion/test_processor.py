# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that a converted tokenizer gives the tokens of the original code, which splits a text at its images."""

import json

import original_checkpoints as original
import pytest

from medst_trl.base.errors import UserError
from medst_trl.interop.conversion import processor
from medst_trl.interop.conversion.processor import read_tokenizer
from medst_trl.policy.chat_template import VICUNA_SYSTEM


TEXT = (
    f"{VICUNA_SYSTEM} USER: <image>\nIs the USER there? ASSISTANT: It is.</s>VUSER: Why?</s> ASSISTANT: \nNo  é.</s>"
)


def tokenize_as_original(directory, tokenizer) -> list[int]:
    """Tokenize the parts before and after the image separately, without the first token of the second part."""
    plain = processor._from_sentencepiece(directory)
    before, after = TEXT.split("<image>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [*plain(before)["input_ids"], image, *plain(after)["input_ids"][1:]]


@pytest.mark.parametrize("legacy", [False, True])
def test_tokens_equal_those_of_the_original_code(tmp_path, legacy):
    original.write_tokenizer(tmp_path, legacy=legacy)
    tokenizer = read_tokenizer(tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == tokenize_as_original(tmp_path, tokenizer) and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == TEXT.replace("<image>\n", "<image> \n") or legacy
    position = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
    assert tokenizer.convert_ids_to_tokens(ids[position + 1 : position + 3]) == ["▁", "<0x0A>"]
    assert ("▁VUSER" in tokenizer.convert_ids_to_tokens(ids)) == legacy  # there is no space in `</s>VUSER`
    tokenizer.save_pretrained(tmp_path / "saved")
    assert read_tokenizer(tmp_path / "saved")(TEXT)["input_ids"] == ids  # from tokenizer.json


def test_the_llama_tokenizer_gives_known_tokens(shared_data, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((shared_data / "tokenizers" / "llama_tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    tokenizer = read_tokenizer(tmp_path)
    assert len(tokenizer) == 32002 and tokenizer.is_fast
    # the ids of this prompt in LLaVA-1.5, where the image has -200 instead of 32000
    ids = tokenizer("USER: <image>\nWhat is it? ASSISTANT:")["input_ids"]
    assert ids == [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618, 338, 372, 29973, 319, 1799, 9047, 13566, 29901]
    assert tokenizer(TEXT)["input_ids"] == tokenize_as_original(tmp_path, tokenizer)


def test_added_tokens_keep_their_ids(tmp_path):
    original.write_tokenizer(tmp_path)
    size = len(original.PIECES)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_patch>": size, "<im_start>": size + 1}))
    tokenizer = read_tokenizer(tmp_path)
    expected = {"<im_patch>": size, "<im_start>": size + 1, "<image>": size + 2, "<pad>": size + 3}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    gap = {"added_tokens_decoder": {str(size + 1): {"content": "<im_patch>", "special": True}}}
    for name, content in (("added_tokens.json", {"<im_patch>": size + 1}), ("tokenizer_config.json", gap)):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"id {size + 1} of the added token '<im_patch>' leaves a gap"):
            read_tokenizer(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("content", [b"", b"not one", original.sentencepiece(original.PIECES)[:-700], b"\x0a\xff"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="The tokenizer in .* cannot be read"):
        read_tokenizer(tmp_path)


def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(original.sentencepiece(["a", "b"], model_type=1))
    with pytest.raises(UserError, match="not a byte-pair model"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_tokenizer(tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    def without_packages(path):
        raise ImportError("requires the protobuf library")

    monkeypatch.setattr(processor, "SentencePieceExtractor", without_packages)
    original.write_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read \(ImportError: requires the protobuf library"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ['{"added_tokens_decoder": {"x": 3}}', '{"bos_token": 3}'])
def test_a_damaged_configuration_is_refused(tmp_path, content):
    original.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    weights = original.language_weights(200) | original.projector_weights("mlp2x_gelu")
    original.write_clip(tmp_path / "clip")
    source = original.write_checkpoint(tmp_path / "source", weights | original.vision_weights(original.TOWER))
    with pytest.raises(UserError, match="371 tokens and the embedding 200 rows"):
        original.convert(str(source), tmp_path / "out")
