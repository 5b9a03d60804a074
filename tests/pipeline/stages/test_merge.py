# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`medst merge` after `medst sft`: the merged model is checked on the training data and served by a real server."""

import base64
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import tiny_run
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from serving import serve

from medst_trl import load_policy
from medst_trl.base.fingerprints import fingerprint
from medst_trl.cli import main as medst
from medst_trl.data.schema import preference_features
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.engines.decoding import chat_inputs, write_texts
from medst_trl.hub.contents import find_contents
from medst_trl.pipeline.recipe import read_recipe
from medst_trl.pipeline.stages import sft
from medst_trl.pipeline.stages.merge import MergeArguments, _examples
from medst_trl.policy.vusr import VUSR


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run directory in which stage 1 has memorised a few questions and answers."""
    directory = tmp_path_factory.mktemp("run")
    model, processor = tiny_llava(**tiny_run.SMALL)
    model.save_pretrained(directory / "base")
    processor.save_pretrained(directory / "base")
    tiny_run.write_instruct(directory / "instruct", range(4), turns=1)
    options = {
        "model_name_or_path": directory / "base", "dataset": directory / "instruct", "output_dir": directory / "sft",
        "max_steps": 80, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lora_r": 8, "lora_alpha": 16,
        "vision_lora_r": 4, "vision_lora_alpha": 8, "lora_dropout": 0.0, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1000, "gradient_checkpointing": False,
    }  # fmt: skip
    sft.STAGE.main(
        *sft.STAGE.make_parser().parse_args_and_config([word for pair in options.items() for word in _words(*pair)])
    )
    return directory


def _words(name, value):
    return f"--{name}", str(value)


def _merge(adapter, output_dir, *options):
    return medst(["merge", "--model_name_or_path", str(adapter), "--output_dir", str(output_dir), *options])


@pytest.fixture(scope="module")
def merged(run):
    assert _merge(run / "sft", run / "merged") == 0
    return run / "merged"


def test_the_record_and_the_model_card_describe_the_merge(run, merged, capsys):
    record = json.loads((merged / "stage.json").read_text())
    proof = record["merged"]["proof"]
    assert record["status"] == "complete" and record["metrics"]["float32_difference"] <= 1e-4
    assert proof["examples"] == 4 and proof["tokens"] > 50
    assert record["merged"]["base"] == str(run / "base")
    card = (merged / "README.md").read_text()
    assert "Merged from a local base and a local adapter" in card and "medst_trl import" not in card
    assert "### sft" in card and str(run) not in card.replace(str(merged), "")
    assert find_contents(merged).kind == "model" and "generation_config.json" in find_contents(merged).files
    modified = (merged / "model.safetensors").stat().st_mtime_ns
    assert _merge(run / "sft", merged) == 0 and "nothing to do" in capsys.readouterr().out
    assert (merged / "model.safetensors").stat().st_mtime_ns == modified
    assert _merge(run / "sft", merged, "--dtype", "bfloat16") == 2


def test_the_ids_of_the_training_images_stay_with_the_model(run, merged):
    """They are hashes of pixels. The files have nothing else that describes an image or a patient."""
    for directory in (run / "sft", merged):
        content = json.loads((directory / "training_images.json").read_text())
        assert content == {"complete": True, "image_ids": [f"{number:064x}" for number in range(4)]}
        assert "training_images.json" in find_contents(directory).files
        [data] = json.loads((directory / "stage.json").read_text())["trained_on"]
        assert data == fingerprint(run / "instruct") | {"stage": "sft", "splits": ["train"]}
        assert "## Training images" in (directory / "README.md").read_text()


def test_the_output_shows_which_examples_were_used(run, tmp_path, capsys):
    _merge(run / "sft", tmp_path / "recorded")
    assert f"(4 conversations, {run / 'instruct'})" in capsys.readouterr().out
    _merge(run / "sft", tmp_path / "one", "--num_examples", "1")
    assert f"(1 conversation, {run / 'instruct'})" in capsys.readouterr().out
    elsewhere = tmp_path / "sft"
    elsewhere.mkdir()
    for path in (run / "sft").iterdir():
        (elsewhere / path.name).symlink_to(path)
    record = json.loads((run / "sft" / "stage.json").read_text())
    (elsewhere / "stage.json").unlink()
    record["inputs"]["dataset"][0]["path"] = str(tmp_path / "gone")
    record["settings"]["load_in_4bit"] = True
    (elsewhere / "stage.json").write_text(json.dumps(record))
    _merge(elsewhere, tmp_path / "drawn", "--dtype", "bfloat16")
    printed = capsys.readouterr().out
    assert "images of noise" in printed and "in bfloat16" in printed
    assert "4 bits" in (tmp_path / "drawn" / "README.md").read_text()


def test_preferences_can_provide_examples(tmp_path):
    prompt, chosen, *_ = ([message] for message in tiny_run.conversation(0)["messages"])
    pair = {
        "id": "p", "images": [Image.new("RGB", (16, 16), "gray")], "image_ids": ["a" * 64], "prompt": prompt,
        "chosen": chosen, "rejected": chosen, "score_chosen": 2.0, "score_rejected": 1.0, "judge": "{}",
    }  # fmt: skip
    Dataset.from_list([pair], features=preference_features()).to_parquet(tmp_path / "dev-00000-of-00001.parquet")
    args = MergeArguments(model_name_or_path="adapter", output_dir="out")
    trained = {"inputs": {"dataset": [{"path": str(tmp_path)}]}, "settings": {"train_split": "dev"}}
    [example], source = _examples(args, trained)
    assert example["id"] == "p" and len(example["images"]) == 1 and source == str(tmp_path)
    assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
    assert _examples(args, trained | {"settings": {}})[1] == "images of noise"  # there is no split train


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        ("base", (), "no adapter to merge"),
        ("sft", ("--num_examples", "0"), "num_examples is 0"),
        ("sft", ("--dtype", "int8"), "int8"),
        ("missing", (), "missing"),
    ],
)
def test_a_refused_merge_writes_nothing(run, tmp_path, capsys, adapter, options, message):
    assert _merge(run / adapter, tmp_path / "out", *(word.format(run=run) for word in options)) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".stage.lock"]


KILLED = """
import os, sys
replace = os.replace
def replace_and_kill(source, target):
    replace(source, target)
    if str(target).endswith("model.safetensors"):
        os.kill(os.getpid(), 9)
os.replace = replace_and_kill
from medst_trl.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_merge_resumes(run, merged, tmp_path):
    words = ["merge", "--model_name_or_path", str(run / "sft"), "--output_dir", str(tmp_path / "merged")]
    assert subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True).returncode == -signal.SIGKILL
    written = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "model.safetensors" in written and "config.json" not in written
    assert medst(words) == 0
    again, first = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", merged))
    assert again.keys() == first.keys() and all(first[name].equal(again[name]) for name in first)
    assert {path.name for path in merged.iterdir()} == {path.name for path in (tmp_path / "merged").iterdir()}


def test_a_recipe_merges_after_the_last_round(tmp_path):
    path = tmp_path / "r.yaml"
    sections = "base:\nprepare: {source: phantoms}\nsft:\ngenerate: {max_records: 9}\njudge: {model: m}\nmerge:\n"
    path.write_text(f"output_dir: out\n{sections}evaluate:\n")
    steps = {step.label: step.settings for step in read_recipe(path).steps()}
    assert steps["merge"]["model_name_or_path"] == "out/sft" == steps["evaluate"]["model_name_or_path"]
    assert steps["merge"]["output_dir"] == "out/merge"
    path.write_text(f"output_dir: out\nrounds: 2\n{sections}dpo:\nevaluate:\n  - {{name: m, model_name_or_path: x}}\n")
    steps = {step.label: step.settings for step in read_recipe(path).steps()}
    assert steps["merge"]["model_name_or_path"] == "out/round_2/dpo" and "round_1/merge" not in steps
    assert list(steps).index("merge") > list(steps).index("round_2/dpo")


def test_a_report_covers_a_run_with_a_merged_model(run, merged, tmp_path):
    assert medst(["report", "--run", str(run), "--output_dir", str(tmp_path / "report")]) == 0
    assert "merge" in (tmp_path / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def served(merged):
    with serve(str(merged)) as url:
        yield openai.OpenAI(base_url=url, api_key="none")


def _reply(client, model: Path, image, text, **settings):
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model=str(model), messages=messages, max_tokens=24, **settings)
    return reply.choices[0].message.content.strip()


def test_the_served_model_answers_and_asks_like_the_adapter(run, merged, served):
    model, processor = load_policy(str(run / "sft"))
    questions = set()
    for number in range(4):
        example = tiny_run.conversation(number, turns=1)
        image, (question, answer) = example["images"][0], (m["content"][-1]["text"] for m in example["messages"])
        part = [{"type": "image"}]
        to_answer = [{"role": "user", "content": [*part, {"type": "text", "text": question}]}]
        to_ask = [{"role": "user", "content": part, "vusr": True}]
        expected = [
            write_texts(model, processor, chat_inputs(processor, [messages], [[image]]), 24)[0][0]
            for messages in (to_answer, to_ask)
        ]
        assert [_reply(served, merged, image, text, temperature=0) for text in (question, VUSR)] == expected
        assert expected[0] == answer and expected[1].startswith("What about")
        questions.add(expected[1])
    assert len(questions) > 1, "the question depends on the image"


def test_a_server_samples_at_the_requested_temperature(merged, served):
    """`transformers serve` never enables sampling; the saved generation config does."""
    image = tiny_run.conversation(0)["images"][0]
    assert len({_reply(served, merged, image, VUSR, temperature=5.0, seed=seed) for seed in range(4)}) > 1
    assert len({_reply(served, merged, image, VUSR, temperature=0, seed=seed) for seed in range(2)}) == 1
