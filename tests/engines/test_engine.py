# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test the engine interface and an engine from a plugin file."""

import json
import pkgutil
import subprocess
import sys

import pytest
from commands import run_medst

from medst_trl.base.errors import UserError
from medst_trl.base.settings import settings_among
from medst_trl.data.loading import load_records
from medst_trl.data.schema import text_of
from medst_trl.engines import kinds
from medst_trl.engines.engine import ENGINES, BatchEngine, Prompt, Reply, Request, Sampling, strip_pieces, to_answer
from medst_trl.engines.kinds.server import ServerSettings
from medst_trl.engines.kinds.transformers import TransformersSettings


PLUGIN = """
from dataclasses import dataclass, field

from medst_trl.engines.engine import ENGINES, BatchEngine, EngineKind, Reply


@dataclass
class EchoSettings:
    echo_ending: str = field(default="?", metadata={"help": "The end of every text."})


class Echo(BatchEngine):
    name, batch_size = "echo", 4

    def __init__(self, model, ending):
        self.model, self.ending = model, ending

    def write(self, prompts, sampling):
        return [Reply(f"What is number {prompt.stream or len(prompt.images)}{self.ending}") for prompt in prompts]

    def describe(self):
        return {"model": self.model, "engine": self.name, "ending": self.ending}


ENGINES.register(
    EngineKind(
        name="echo",
        summary="the number of each text",
        settings=EchoSettings,
        open=lambda model, settings: Echo(model, settings.echo_ending),
        address=lambda settings: f"nowhere, with {settings.echo_ending}",
    )
)
"""

RECIPE = """
output_dir: run
prepare:
  source: phantoms
  num_phantoms: 4
  num_unlabelled_phantoms: 6
  num_test_phantoms: 4
generate:
  engine: echo
  model_name_or_path: a model
  echo_ending: " here?"
evaluate:
  engine: echo
  model_name_or_path: a model
  bootstrap_samples: 0
"""


def medst_output(tmp_path, *arguments, code=0):
    """Run `medst` and return its output on one line."""
    result = run_medst(tmp_path, *arguments, code=code)
    return " ".join((result.stdout + result.stderr).split())


def test_an_engine_from_a_plugin_file_appears_everywhere(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    plugins = ("--plugins", "plugin.py")
    for stage in ("generate", "evaluate"):
        text = medst_output(tmp_path, stage, "--help", *plugins)
        assert "echo (the number of each text)" in text
        assert "settings of the engine echo:" in text and "--echo_ending" in text
    assert "mine.yaml is valid" in medst_output(tmp_path, "recipes", "validate", "mine.yaml", *plugins)
    assert "nowhere, with here?, model a model" in medst_output(tmp_path, "run", "mine.yaml", "--dry_run", *plugins)

    medst_output(tmp_path, "run", "mine.yaml", *plugins)
    generation = load_records(tmp_path / "run" / "generate" / "candidates", "train")["generation"]
    described = {"model": "a model", "engine": "echo", "ending": " here?"}
    assert all(described.items() <= json.loads(text).items() for text in generation)
    record = json.loads((tmp_path / "run" / "generate" / "stage.json").read_text())
    assert record["settings"]["echo_ending"] == " here?" and "dtype" not in record["settings"]
    lines = (tmp_path / "run" / "evaluate" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {(row["prediction"], row["generation"]["engine"]) for row in rows} == {("What is number 1?", "echo")}
    assert (tmp_path / "run" / "evaluate" / "predictions_shuffled.jsonl").is_file()

    text = medst_output(
        tmp_path, "run", "mine.yaml", "--stage", "generate", "--generate.echo_ending", "!", *plugins, code=2
    )
    assert "echo_ending" in text and "--overwrite" in text
    text = medst_output(tmp_path, "recipes", "validate", "mine.yaml", code=2)
    assert "echo_ending" in text, "without its plugin, the setting of the engine is unknown"


def test_an_unknown_engine_is_refused_with_the_closest_name():
    with pytest.raises(UserError, match="Unknown engine 'servr'. Did you mean 'server'.*Choose one of"):
        ENGINES.get("servr")


def test_listing_the_engines_imports_no_heavy_package():
    heavy = "('torch', 'transformers', 'openai', 'datasets', 'PIL')"
    script = "import sys; from medst_trl.engines.engine import ENGINES; print(list(ENGINES), "
    script += f"[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["['transformers',", "'server']", "[]"]


def test_an_engine_kind_finds_its_settings_among_those_of_all_engines():
    given = [ServerSettings(base_url="http://x/v1"), TransformersSettings(dtype="float32")]
    assert settings_among(given, ENGINES.get("transformers").settings).dtype == "float32"
    assert settings_among(given, ENGINES.get("server").settings).base_url == "http://x/v1"
    assert settings_among([], ENGINES.get("server").settings).server_kind == "vllm"


def test_every_module_in_the_directory_registers_an_engine():
    assert {module.name for module in pkgutil.iter_modules(kinds.__path__)} == set(ENGINES)


class Upper(BatchEngine):
    """Engine that returns each prompt in capitals and records its batches."""

    name, batch_size = "upper", 2

    def __init__(self):
        self.batches_written = []

    def write(self, prompts, sampling):
        texts = [text_of(prompt.messages[-1]["content"]) for prompt in prompts]
        self.batches_written.append((texts, sampling.temperature))
        return [Reply(text.upper()) for text in texts]


class DefaultBatches(BatchEngine):
    """Engine that does not set its batch size."""

    def write(self, prompts, sampling):
        return [Reply("") for _ in prompts]


def ask(text, temperature=0.0):
    return Request(Prompt(to_answer([], 0, text), []), Sampling(temperature=temperature), tag=text)


def test_a_batch_engine_answers_follow_up_requests_together():
    def then(request, reply):
        order.append(request.tag)
        return [ask(request.tag + "?", 1.0), ask(request.tag + "!")] if len(request.tag) == 1 else []

    engine, order = Upper(), []
    pairs = [(request.tag, reply.text) for request, reply in engine.run([map(ask, "abc")], then)]
    assert [tag for tag, _ in pairs] == order == ["a", "b", "c", "a?", "b?", "c?", "a!", "b!", "c!"]
    assert all(text == tag.upper() for tag, text in pairs)
    assert engine.batches_written == [
        (["a", "b", "c"], 0.0), (["a?", "b?", "c?"], 1.0), (["a!", "b!", "c!"], 0.0)]  # fmt: skip


def test_a_batch_engine_divides_prompts_by_its_batch_size():
    def prompt_of(number):
        raise AssertionError("the prompt is not needed")

    assert Upper().batches(5, prompt_of) == [[0, 1], [2, 3], [4]]
    assert [len(batch) for batch in DefaultBatches().batches(40, prompt_of)] == [16, 16, 8]


def test_an_engine_without_streaming_yields_the_whole_text():
    assert list(Upper().stream(ask("abc").prompt, Sampling())) == ["ABC"]


def test_pieces_of_a_stream_are_stripped_like_a_reply():
    for pieces in (["  a", " ", "b ", " c", "\n", " "], ["", " ", "\n"], ["abc"], [" a b "], [" ", "a", "", "b"]):
        assert "".join(strip_pieces(pieces)) == "".join(pieces).strip()
        assert "" not in list(strip_pieces(pieces))
