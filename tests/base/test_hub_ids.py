# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test which names are Hub ids, and which are paths of this machine."""

import pytest

from medst_trl.base.hub_ids import (
    can_be_hub_id,
    is_hub_id,
    is_repo_id,
    looks_local,
    public_name,
    split_revision,
)


@pytest.mark.parametrize(
    ("name", "is_id", "is_repository"),
    [
        ("org/name", True, True),
        ("org/name@main", True, False),
        ("org/name@refs/pr/1", True, False),
        ("name", False, False),
        ("a/b/c", False, False),
        ("../name", False, False),
        ("/data/name", False, False),
        ("org/na me", False, False),
        ("org/größe", False, False),
    ],
)
def test_a_hub_id_has_an_owner_and_perhaps_a_revision(name, is_id, is_repository):
    assert (is_hub_id(name), is_repo_id(name)) == (is_id, is_repository)


def test_a_path_that_exists_is_not_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/sft") and split_revision("runs/sft@a") == ("runs/sft", "a")
    (tmp_path / "runs" / "sft@a").mkdir(parents=True)
    assert not is_hub_id("runs/sft@a") and split_revision("runs/sft@a") == ("runs/sft@a", None)


def test_old_hub_ids_have_no_owner():
    assert can_be_hub_id("gpt2") and can_be_hub_id("gpt2@main")
    assert not can_be_hub_id(".hidden") and not can_be_hub_id("./gpt2") and not can_be_hub_id("a/b/c")


@pytest.mark.parametrize("name", ["/data/x", "~/x", "./x", "../x", "runs/demo/sft", "C:\\models\\x", "file:/x"])
def test_paths_look_local(name):
    assert looks_local(name)


@pytest.mark.parametrize("name", ["gpt-4o", "org/name", "org/name@main", "some judge"])
def test_hub_ids_and_names_do_not_look_local(name):
    assert not looks_local(name)


def test_only_the_last_part_of_a_path_is_public(tmp_path):
    assert public_name(str(tmp_path / "jones" / "judge")) == "judge" and public_name(str(tmp_path)) == tmp_path.name
    for name in ("gpt-4o", "org/judge", "org/judge@main", "accounts/provider/models/judge", ""):
        assert public_name(name) == name
