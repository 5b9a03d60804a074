# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the card of a merged model says: of what, how exactly, and who can load it."""

import json

import pytest

from medst_trl.hub.cards import model_card
from medst_trl.hub.contents import find_contents
from medst_trl.hub.merged import merged_from
from medst_trl.policy.chat_template import MARK, TEXT_ROLE_MARK


def merged(folder, model_type="llava", template=MARK, **facts):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "chat_template.jinja").write_text(template)
    proof = {"float32_difference": 2e-6, "stored_difference": 0.03}
    record = {
        "stage": "merge", "inputs": {"model_name_or_path": [{"hub_id": "org/adapter", "revision": "abc"}]},
        "settings": {}, "merged": {
            "base": "org/base", "base_revision": "0123456789abcdef", "adapter_revision": "fedcba9876543210",
            "dtype": "float16", "trained_in_4bit": False, "proof": proof, **facts,
        },
    }  # fmt: skip
    (folder / "stage.json").write_text(json.dumps(record))
    return model_card(find_contents(folder), "org/name")


def test_both_sources_with_their_revisions(tmp_path):
    card = merged(tmp_path)
    assert "Merged from `org/base` (revision 0123456789ab) and `org/adapter` (revision fedcba987654)" in card
    assert "to 2e-06 in float32, and to 3e-02 as stored" in card and "4 bits" not in card
    assert "base_model: org/base\n" in card
    assert "4 bits" in merged(tmp_path, trained_in_4bit=True)


@pytest.mark.parametrize("template", [MARK, TEXT_ROLE_MARK])
def test_plain_tools_are_told_first(tmp_path, template):
    card = merged(tmp_path, template=template)
    assert 'pipeline("image-text-to-text", model="org/name")' in card and "load_policy" not in card


def test_an_architecture_of_our_own(tmp_path):
    card = merged(tmp_path, model_type="prototype_llava")
    assert 'load_policy("org/name")' in card and "other engines cannot load it" in card


def test_other_models_are_not_merged_ones(tmp_path):
    merged(tmp_path)
    for record in ("{", "{}", '{"merged": {}, "inputs": {}}'):
        (tmp_path / "stage.json").write_text(record)
        assert merged_from(tmp_path) is None
        assert "Merged from" not in model_card(find_contents(tmp_path), "org/name")
