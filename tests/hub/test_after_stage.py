# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A stage with push_to_hub: refused before the work, pushed after it, by one process."""

import pytest
from fake_hub import client, serve_hub

from medst_trl.base.errors import UserError
from medst_trl.hub import push
from medst_trl.hub.after_stage import HubArguments, PushAfterStage, check_push, push_after_stage


@pytest.fixture
def calls(monkeypatch):
    made = []

    def push_folder(folder, repo_id, **settings):
        made.append((folder, repo_id, settings))
        return push.Pushed("https://hub/org/name", "adapter", "c0ffee" * 7, 3, 10)

    monkeypatch.setattr(push, "push_folder", push_folder)
    return made


@pytest.mark.parametrize(("repo_id", "said"), [(None, "add hub_model_id"), ("name", "hub_model_id is 'name'")])
def test_where_to(monkeypatch, repo_id, said):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef0123")
    check_push("org/name", "hub_model_id")
    with pytest.raises(UserError, match=said):
        check_push(repo_id, "hub_model_id")


def test_no_token(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        check_push("org/name", "hub_model_id")


def test_the_first_process_pushes(calls, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    push_after_stage("runs/dpo", "org/name", private=True)
    assert not calls
    monkeypatch.setenv("RANK", "0")
    push_after_stage("runs/dpo", "org/name", private=True)
    assert calls == [("runs/dpo", "org/name", {"private": True})]
    assert "https://hub/org/name" in capsys.readouterr().out


def test_a_failed_push_says_that_the_work_is_kept(monkeypatch):
    def refuse(*_, **__):
        raise UserError("The token may not write.")

    monkeypatch.setattr(push, "push_folder", refuse)
    with pytest.raises(UserError, match=r"is finished, but was not pushed. The token may not write.\n.*medst push"):
        push_after_stage("runs/dpo", "org/name")


class Settings:
    def __init__(self, **values):
        vars(self).update(values)


def test_a_trainer_never_sees_that_it_is_to_push(calls, monkeypatch, tmp_path):
    monkeypatch.setattr("medst_trl.hub.push.check_token", lambda: None)
    training = Settings(
        push_to_hub=True, hub_model_id="org/aligned", hub_private_repo=None, hub_revision="v2", output_dir=tmp_path
    )
    after = PushAfterStage(("",), [Settings(dataset="x"), training])
    assert training.push_to_hub is False  # TRL would upload the whole folder of the run
    after.run()
    assert calls == [(tmp_path, "org/aligned", {"private": True, "revision": "v2"})]


def test_each_dataset_has_a_repository_and_those_not_made_have_none(calls, monkeypatch, tmp_path):
    monkeypatch.setattr("medst_trl.hub.push.check_token", lambda: None)
    for name in ("instruct", "images"):
        (tmp_path / name).mkdir()
    hub = HubArguments(push_to_hub=True, hub_dataset_id="org/vqa", hub_private_repo=False)
    PushAfterStage(("instruct", "benchmark", "images"), [Settings(output_dir=tmp_path), hub]).run()
    assert [(repo_id, settings["private"]) for _, repo_id, settings in calls] == [
        ("org/vqa-instruct", False), ("org/vqa-images", False),
    ]  # fmt: skip


def test_nothing_is_pushed_unasked(calls, tmp_path):
    PushAfterStage(("",), [Settings(output_dir=tmp_path, push_to_hub=False), HubArguments()]).run()
    assert not calls


def test_prepare_with_push_to_hub(tmp_path):
    with serve_hub() as hub:
        command = [
            "-m", "medst_trl.cli", "prepare", "--source", "phantoms", "--num_phantoms", "3", "--num_test_phantoms",
            "2", "--num_unlabelled_phantoms", "4", "--output_dir", str(tmp_path / "prepare"), "--push_to_hub", "true",
            "--hub_dataset_id", "me/scans",
        ]  # fmt: skip
        refused = client(hub.url, tmp_path / "home", *command, token=None, check=False)
        assert refused.returncode == 2 and "hf auth login" in refused.stderr and not (tmp_path / "prepare").exists()
        for _ in range(2):  # finished, it is pushed again if that has failed
            pushed = client(hub.url, tmp_path / "home", *command)
            assert pushed.returncode == 0, pushed.stderr
            assert pushed.stdout.count("The instruct dataset is at") == 1
        read = 'from datasets import load_dataset; print(len(load_dataset("me/scans-images", split="train")))'
        assert client(hub.url, tmp_path / "other_home", "-c", read).stdout.split()[-1] == "4"
