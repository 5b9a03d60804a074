# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A registered source is available in every command that uses sources."""

import json
import subprocess
import sys
from argparse import ArgumentError
from dataclasses import dataclass, fields

import pytest
from commands import run_medst

from medst_trl.base.errors import UserError
from medst_trl.data.source import SOURCES, Records, Source, SourceCard
from medst_trl.pipeline.stages.prepare import PrepareArguments, main


PLUGIN = """
from dataclasses import dataclass, field

from PIL import Image

from medst_trl.data.images import MemoryImages
from medst_trl.data.schema import image_part, message, text_part
from medst_trl.data.source import SOURCES, Conversation, Records, Source, SourceCard


@dataclass
class ToySettings:
    toy_scans: int = field(default=3, metadata={"help": "Number of grey squares."})


def read(request):
    names = [f"toy-{number}" for number in range(request.settings.toy_scans)]
    talks = [
        Conversation(
            name,
            (name,),
            [message("user", [image_part(), text_part("Shade?")]), message("assistant", [text_part("Grey.")])],
        )
        for name in names
    ]
    images = {name: Image.new("L", (8, 8), number) for number, name in enumerate(names)}
    return Records("toys", conversations=talks, images=MemoryImages(images))


SOURCES.register(
    Source(
        name="toys",
        summary="grey squares for this test",
        read=read,
        card=SourceCard("Grey squares", homepage="https://example.org/toys", licence="CC0 1.0", synthetic=True),
        settings=ToySettings,
        count=lambda settings, kind, split: settings.toy_scans if (kind, split) == ("instruct", "train") else None,
        needs_data=False,
    )
)
"""


def test_a_source_from_a_plugin_file_works_in_every_command(tmp_path):
    (tmp_path / "toys.py").write_text(PLUGIN)
    (tmp_path / "toys.yaml").write_text("output_dir: run\nprepare:\n  source: toys\n  toy_scans: 5\n")
    plugins = ("--plugins", "toys.py")

    text = run_medst(tmp_path, *plugins, "prepare", "--help").stdout
    assert "toys (grey squares for this test)" in " ".join(text.split())
    assert "settings of the source toys:" in text and "--toy_scans" in text

    assert "toys.yaml is valid" in run_medst(tmp_path, *plugins, "recipes", "validate", "toys.yaml").stdout
    assert "5 rows of instruct/train" in run_medst(tmp_path, *plugins, "run", "toys.yaml", "--dry_run").stdout

    text = run_medst(tmp_path, *plugins, "run", "toys.yaml").stdout
    assert "5 conversations" in text
    record = json.loads((tmp_path / "run" / "prepare" / "stage.json").read_text())
    assert record["counts"]["datasets"]["instruct/train"] == {"images": 5, "conversations": 5, "answers": 5}
    assert record["settings"]["toy_scans"] == 5 and "num_phantoms" not in record["settings"]
    assert record["source_card"]["title"] == "Grey squares" and record["source_card"]["licence"] == "CC0 1.0"

    script = "import sys; from pathlib import Path; from medst_trl.hub.cards import dataset_card; "
    script += "from medst_trl.hub.contents import find_contents; from medst_trl.base.registry import add_plugins; "
    script += "add_plugins(sys.argv[1:]); print(dataset_card(find_contents(Path('run/prepare/instruct')), 'org/toys'))"
    card = subprocess.run(
        [sys.executable, "-c", script, *plugins], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "[Grey squares](https://example.org/toys)" in card


def test_the_error_for_an_unknown_source_suggests_the_closest_name(tmp_path):
    with pytest.raises(UserError, match="Unknown source 'slak'. Did you mean 'slake'.*Choose one of .*llava"):
        main(PrepareArguments(output_dir=str(tmp_path / "out"), source="slak"))


def test_an_incomplete_source_is_refused():
    with pytest.raises(UserError, match="source 'toys' .* lacks card"):
        SOURCES.register(Source("toys", "grey squares", read=lambda request: None, card=None))
    assert "toys" not in SOURCES


def test_two_sources_with_settings_of_the_same_name_are_refused(monkeypatch):
    from medst_trl.pipeline.stages import prepare

    @dataclass
    class OtherSettings:
        language: str = "en"

    monkeypatch.setattr(SOURCES, "_objects", dict(SOURCES._objects))
    SOURCES.register(Source("other", "a test", lambda request: None, SourceCard("A test"), settings=OtherSettings))
    with pytest.raises(ArgumentError, match="conflicting option string: --language"):
        prepare.STAGE.make_parser()


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_a_card_and_help_for_its_settings(name):
    source = SOURCES.get(name)
    assert source.summary and source.card.title
    settings = fields(source.settings) if source.settings else ()
    assert all(item.metadata["help"] for item in settings)


def test_records_with_the_settings_of_other_sources_are_resumed(tmp_path, capsys):
    """An earlier version recorded the settings of all sources."""
    arguments = PrepareArguments(output_dir=str(tmp_path / "out"), source="phantoms", num_workers=1)
    settings = SOURCES.get("phantoms").settings_from({"num_phantoms": 2, "num_test_phantoms": 1})
    main(arguments, settings)
    path = tmp_path / "out" / "stage.json"
    record = json.loads(path.read_text())
    others = {"language": "zh", "image_pattern": "{img_id}.png", "release_path": None}
    path.write_text(json.dumps(record | {"settings": record["settings"] | others}))
    main(arguments, settings)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="num_phantoms: 2 before, 3 now"):
        main(arguments, SOURCES.get("phantoms").settings_from({"num_phantoms": 3, "num_test_phantoms": 1}))


def test_the_first_records_are_selected_by_image_and_by_conversation():
    from medst_trl.data.source import Conversation, Question

    questions = [Question(str(n), (f"{n // 2}.png",), "test", "What?", "That.", "open") for n in range(6)]
    records = Records("x", conversations=[Conversation(str(n), (), []) for n in range(5)], questions=questions)
    first = records.first(2)
    assert len(first.conversations) == 2 and [question.id for question in first.questions] == ["0", "1", "2", "3"]
    assert records.first(None) is records
