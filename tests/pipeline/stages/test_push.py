# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The stage `push`: its arguments and its record."""

import json
from dataclasses import replace

import pytest

from medst_trl import cli
from medst_trl.base.errors import UserError
from medst_trl.hub import PushArguments, push
from medst_trl.pipeline.stage import STAGES
from medst_trl.pipeline.stages.push import main


@pytest.fixture
def pushed(monkeypatch):
    """Calls of `push_directory`, which is replaced here. `tests/hub` tests it against a Hub."""
    calls = []

    def push_directory(args):
        calls.append(replace(args))
        return push.Pushed("https://hub/org/name", "preferences dataset", "c0ffee" * 7, 3, 1_500_000)

    monkeypatch.setattr(push, "push_directory", push_directory)
    return calls


def arguments(*given: str) -> PushArguments:
    return (
        STAGES.get("push")
        .make_parser()
        .parse_args_and_config(["--source", "data", "--repo_id", "org/name", *given])[0]
    )


def test_pushes_are_private_by_default(pushed, capsys):
    main(arguments())
    main(arguments("--private", "false", "--evaluation", "a", "b"))
    assert [args.private for args in pushed] == [True, False]
    assert pushed[1].evaluation == ["a", "b"]
    assert "https://hub/org/name (3 files, 1.5 MB), revision c0ffee" in capsys.readouterr().out


def test_no_argument_accepts_a_token(pushed, capsys):
    given = ["push", "--source", "data", "--repo_id", "org/name", "--token", "hf_0123456789abcdef0123"]
    assert cli.main(given) == 2 and not pushed
    printed = capsys.readouterr()
    assert "token" in printed.err and "hf_0123456789abcdef0123" not in printed.err + printed.out


def test_a_push_with_settings_of_earlier_versions_is_not_repeated(pushed, tmp_path):
    (tmp_path / "data").mkdir()
    args = PushArguments(str(tmp_path / "data"), "org/name", output_dir=str(tmp_path / "push"))
    main(args)
    path = tmp_path / "push" / "stage.json"
    record = json.loads(path.read_text())
    record["settings"] |= {"run": "runs/mine", "commit_message": "First version"}
    path.write_text(json.dumps(record))
    main(args)
    assert len(pushed) == 1


def test_a_recorded_push_is_repeated_only_with_overwrite_if_its_input_has_changed(pushed, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("1")
    args = PushArguments(str(tmp_path / "data"), "org/name", output_dir=str(tmp_path / "push"))
    main(args)
    main(args)
    record = json.loads((tmp_path / "push" / "stage.json").read_text())
    assert len(pushed) == 1 and record["url"] == "https://hub/org/name" and record["commit"].startswith("c0ffee")
    (tmp_path / "data" / "file").write_text("2")
    with pytest.raises(UserError, match="input source"):
        main(args)
    args.overwrite = True
    main(args)
    assert len(pushed) == 2


def test_a_failed_push_does_not_refuse_the_corrected_command(pushed, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("no")

    (tmp_path / "data").mkdir()
    args = PushArguments(str(tmp_path / "data"), "org/wrong", output_dir=str(tmp_path / "push"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no"):
        patch.setattr(push, "push_directory", refuse)
        main(args)
    args.repo_id = "org/right"
    main(args)
    assert [args.repo_id for args in pushed] == ["org/right"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "name"}, "repo_id is 'name'"),
        (
            {"repo_id": "org/name", "base_model_name_or_path": "runs/demo/base"},
            "'runs/demo/base', which is not a Hub id",
        ),
    ],
)
def test_names_that_are_not_hub_ids_are_refused_before_a_run(settings, message):
    with pytest.raises(UserError, match=message):
        STAGES.get("push").check(PushArguments("data", **settings))


def test_a_refused_push_is_not_recorded_as_finished(pushed, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("no")

    (tmp_path / "data").mkdir()
    args = PushArguments(str(tmp_path / "data"), "org/name", output_dir=str(tmp_path / "push"))
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(push, "push_directory", refuse)
        main(args)
    main(args)
    assert len(pushed) == 1
