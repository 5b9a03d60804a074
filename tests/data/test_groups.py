# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Group ids are keyed hashes, and what shares an image, a near copy or a group is not divided."""

import hashlib
import hmac
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.base.errors import UserError
from medst_trl.data.groups import GroupIds, Grouping, group_id, read_salt, salt_of


def test_an_id_is_a_keyed_hash_behind_the_digits_of_its_salt(tmp_path):
    salt = bytes(range(32))
    digest = hmac.new(salt, b"P-17", hashlib.sha256).hexdigest()
    assert group_id(salt, " P-17 ") == f"{hashlib.sha256(b'check' + salt).hexdigest()[:6]}-{digest[:20]}"
    other = group_id(bytes(32), "P-17")
    assert salt_of(other) != salt_of(group_id(salt, "P-17")) == salt_of(group_id(salt, "P-18"))
    assert other.rpartition("-")[2] != digest[:20]
    # Patients and studies have other digits: they cannot be compared.
    kinds = [GroupIds(tmp_path / "salt", kind) for kind in ("patient", "study", "directory", "directory:1")]
    assert len({salt_of(ids.of_key("")) for ids in kinds}) == 4
    assert len({ids.of_key("P-17").rpartition("-")[2] for ids in kinds}) == 1
    # Any column has patients, as DICOM files and datasets that `prepare` did not make.
    assert GroupIds(tmp_path / "salt", "study", "Patient ID").of_key("P") == kinds[0].of_key("P")


@given(st.text(), st.text())
def test_names_in_any_encoding_have_ids_of_their_own(one, other):
    one += "\udc80"  # as in the name of a directory that is not UTF-8
    ids = [group_id(bytes(32), name) for name in (one, other)]
    assert (ids[0] == ids[1]) == (one.strip() == other.strip()) and all(len(name) == 27 for name in ids)


def test_a_salt_is_made_once_and_readable_by_the_user_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("MEDST_GROUP_SALT", raising=False)
    path = tmp_path / "medst_trl" / "group_salt"
    ids = GroupIds()
    assert ids.of_key(None) is None and not path.exists()  # not needed yet
    first = ids.of_key("P1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_bytes()) == 32
    assert str(path) in capsys.readouterr().out
    assert GroupIds().of_key("P1") == first != GroupIds().of_key("P2") and capsys.readouterr().out == ""
    monkeypatch.setenv("MEDST_GROUP_SALT", str(tmp_path / "other"))
    assert GroupIds().of_key("P1") != first and (tmp_path / "other").exists()
    assert GroupIds(path).of_key("P1") == first


def test_a_salt_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"secret\n")
    with pytest.raises(UserError, match="7 bytes"):
        read_salt(tmp_path / "short")
    with pytest.raises(UserError, match="--group_salt"):
        read_salt(tmp_path / "short" / "salt")
    with pytest.raises(UserError, match="--group_salt"):
        read_salt(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            read_salt(other)


def test_a_salt_that_others_can_read_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    read_salt("~/salt")
    assert "WARNING" not in capsys.readouterr().out
    (tmp_path / "salt").chmod(0o644)
    read_salt("~/salt")
    assert f"chmod 600 {tmp_path}/salt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("group_by", "key"),
    [
        ("patient", "P"),
        ("study", "St"),
        ("directory", "ward/P"),
        ("directory:1", "ward"),
        ("directory:5", "ward/P"),
        (None, "P"),
    ],
)
def test_images_are_grouped_by_what_is_chosen(tmp_path, group_by, key):
    ids = GroupIds(tmp_path / "salt", group_by or "patient")
    header = {"patient": "P", "study": "St", "series": "Se"}
    assert ids.of_image("ward/P/3.dcm", header) == ids.of_image("ward\\P\\3.dcm", header) == ids.of_key(key)
    assert ids.of_image("3.png", {}) is None


def test_files_beside_each_other_in_the_directory_of_images_are_no_group(tmp_path):
    ids = GroupIds(tmp_path / "salt", "directory")
    assert ids.of_image("1.png", {}) is None
    assert ids.of_image("stack.tif#1", {"series": "Se"}) == ids.of_key("Se")  # but the frames of a file are


def near(pairs) -> dict[str, set[str]]:
    return {one: {b for a, b in pairs if a == one} for one, _ in pairs}


records = st.lists(
    st.tuples(st.lists(st.sampled_from("0123456789"), max_size=3), st.lists(st.sampled_from("PQRS"), max_size=2)),
    max_size=12,
)
copies = st.lists(st.tuples(st.sampled_from("0123456789"), st.sampled_from("0123456789")), max_size=3)


@given(records, copies, st.sets(st.sampled_from("0123456789"), max_size=3))
def test_records_belong_together_if_a_chain_of_shared_images_copies_and_groups_connects_them(records, copies, plain):
    grouping = Grouping(records, near(copies), plain)
    groups_of = {
        name: {group for images, groups in records if name in images for group in groups} for name in "0123456789"
    }
    is_copy = [not groups_of[a] or not groups_of[b] or groups_of[a] & groups_of[b] for a, b in copies]
    sets = [{*images} - (plain if groups else set()) | {*groups} for images, groups in records]
    connected = []  # slow and plain
    for one in [*sets, *(set(pair) for pair, joins in zip(copies, is_copy) if joins)]:
        touching = [other for other in connected if other & one]
        connected = [other for other in connected if not other & one] + [one.union(*touching)]
    names = [grouping.of(images, next(iter(groups), None), "alone") for images, groups in records]
    for one, name in zip(sets, names):
        for other, its_name in zip(sets, names):
            if one and other:
                assert (name == its_name) == any(one <= whole and other <= whole for whole in connected)
        images = {item for whole in connected if one and one <= whole for item in whole if item.isdigit()}
        assert name == (min(images) if images else name), "the name depends on the salt"
        assert one or name == "alone"


def test_black_slices_and_similar_pages_do_not_join_patients():
    """Otherwise a hospital would be one group, which is drawn as a whole."""
    records = [([f"{patient}{n}" for n in "ab"] + ["black"], [patient]) for patient in "PQR"]
    records += [(["alone"], [None]), (["black"], [None])]
    grouping = Grouping(records, near([("Pa", "Qa"), ("Ra", "alone")]), {"black"})
    names = [grouping.of(images, group, "") for images, [group] in records]
    assert len(set(names[:3])) == 3 and names[3] == names[2] and names[4] == "black"


def test_records_that_share_a_group_or_an_image_get_one_group_whatever_near_copies_they_have():
    records = [(["a"], ["P"]), (["a"], ["Q"]), (["b"], ["Q"]), (["b", "c"], [None]), (["d"], ["R"]), (["e"], [None])]
    records += [(["black", "f"], ["P"]), (["black", "g"], ["R"]), (["black"], [None])]
    grouping = Grouping(records, near([("c", "e"), ("a", "d")]), {"black"})
    assert [grouping.group(*record) for record in records] == ["P"] * 4 + ["R", None, "P", "R", None]
