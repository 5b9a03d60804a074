# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test with a local Hub that pushed content is unchanged when pulled, and that private content is not pushed."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import EXPIRED, READER, WRITER, FakeHub, client, serve_hub
from random_images import random_image

from medst_trl.base.errors import UserError
from medst_trl.data.images import store_image
from medst_trl.data.schema import benchmark_features, image_part, preference_features, text_part, write_split
from medst_trl.demo.tiny_model import CHAT_TEMPLATE
from medst_trl.hub import HubArguments, PushArguments
from medst_trl.hub.push import PushAfterStage, Pushed


@pytest.fixture(scope="module")
def hub():
    with serve_hub() as served:
        yield served


@pytest.fixture
def fresh_hub():
    with serve_hub() as served:
        yield served


def user(text: str) -> dict:
    return {"role": "user", "content": [image_part(), text_part(text)]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [text_part(text)]}


def stored_image(seed: int):
    return store_image(random_image(seed))


def pair(number: int, model: str = "judge-1") -> dict:
    image = stored_image(number)
    return {
        "id": f"p{number}", "images": [{"bytes": image.bytes, "path": None}], "image_ids": [image.image_id],
        "prompt": [user(f"What is {number}?")],
        "chosen": [assistant("Yes \U0001fac1 | a")], "rejected": [assistant("no")],
        "score_chosen": 8.0, "score_rejected": 3.5, "judge": json.dumps({"model": model, "orders": []}),
    }  # fmt: skip


def judge_directory(directory: Path, rows_per_shard: int = 2, **settings) -> Path:
    """Write the output of `medst judge` and the record of `generate` in a run directory."""
    for split, numbers in (("train", range(5)), ("validation", range(5, 7))):
        rows = [pair(number) for number in numbers]
        write_split(directory / "preferences", split, rows, dict, preference_features(), rows_per_shard)
    (directory / "rejected.jsonl").write_text('{"id": "patient-jones", "reason": "flip", "value": ""}\n')
    (directory / "judgements.jsonl").write_text('{"id": "patient-jones"}\n')
    generate = directory.parent / "generate"
    generate.mkdir()
    record = {"status": "complete", "versions": {"trl": "1.16"}, "counts": {"judge": {"flip_rate": 0.125}}}
    inputs = {"candidates": [{"path": str(generate / "candidates"), "sha256": sha256().hexdigest()}]}
    settings = {"model": "judge-1", "output_dir": str(directory), "api_key": "sk-0123456789abcdef0123"} | settings
    (directory / "stage.json").write_text(
        json.dumps(record | {"stage": "judge", "inputs": inputs, "settings": settings})
    )
    (generate / "candidates").mkdir()
    model = {"model_name_or_path": [{"hub_id": "org/model", "revision": "c0ffee"}]}
    asked = {"temperature": 1.2, "images": str(directory.parent / "images")}
    (generate / "stage.json").write_text(
        json.dumps(record | {"stage": "generate", "inputs": model, "settings": asked})
    )
    return directory


def push(hub: FakeHub, home: Path, source: Path, repo_id: str, *more: str, **kwargs):
    command = ["-m", "medst_trl.cli", "push", "--source", str(source), "--repo_id", repo_id, *more]
    return client(hub.url, home, *command, **kwargs)


PULL = """
import json, sys
from datasets import Image, List
from medst_trl.data.loading import load_records
from medst_trl.data.conform import conform
name, split, kind = sys.argv[1:]
dataset = load_records(name, split)
assert conform(dataset, kind) is dataset
rows = []
for row in dataset.remove_columns("group_id").cast_column("images", List(Image(decode=False))):
    row["images"] = [{"bytes": image["bytes"].hex(), "path": None} for image in row["images"]]
    rows.append(row)
print(json.dumps(rows))
"""


TRAINED_ON_HUB = """
import json, sys, tempfile
from pathlib import Path
from medst_trl.base.fingerprints import fingerprint
from medst_trl.pipeline.lineage import training_images
dataset = fingerprint(sys.argv[1]) | {"stage": "dpo", "splits": ["train", "validation"]}
with tempfile.TemporaryDirectory() as model:
    Path(model, "stage.json").write_text(json.dumps({"stage": "dpo", "trained_on": [dataset]}))
    print(json.dumps(sorted(training_images(model)[0])))
"""


def pull(hub: FakeHub, home: Path, name: str, split: str, **kwargs) -> list[dict]:
    result = client(hub.url, home, "-c", PULL, name, split, "preferences", **kwargs)
    rows = json.loads(result.stdout.splitlines()[-1])
    return [
        row | {"images": [image | {"bytes": bytes.fromhex(image["bytes"])} for image in row["images"]]} for row in rows
    ]


def test_a_dataset_is_unchanged_after_push_and_pull(hub, tmp_path):
    directory = judge_directory(tmp_path / "run" / "judge")
    shards = {path.name: path.read_bytes() for path in (directory / "preferences").iterdir()}
    shards["reference_log_probs/a.jsonl"] = b"{}\n"
    (directory / "preferences/reference_log_probs").mkdir()
    (directory / "preferences/reference_log_probs/a.jsonl").write_bytes(b"{}\n")
    result = push(hub, tmp_path / "home", directory, "org/data")  # the directory of the stage, not of the dataset
    shutil.rmtree(tmp_path / "run")
    files = hub.files("dataset", "org/data")
    assert {name: files[name] for name in shards} == shards and set(files) == {*shards, "README.md"}
    assert hub.repositories["dataset", "org/data"].private
    first = hub.repositories["dataset", "org/data"].branches["main"]
    assert first[:12] in result.stdout

    assert pull(hub, tmp_path / "elsewhere", "org/data", "train") == [pair(number) for number in range(5)]
    assert pull(hub, tmp_path / "elsewhere", "org/data", "validation") == [pair(5), pair(6)]
    # As training data, it is read where it was downloaded to, and not downloaded for a comparison.
    calls = len(hub.calls)
    command = "-c", TRAINED_ON_HUB, "org/data"
    known, unknown = (client(hub.url, tmp_path / home, *command).stdout for home in ("elsewhere", "new"))
    assert json.loads(known) == sorted(stored_image(number).image_id for number in range(7))
    assert json.loads(unknown) == [] and len(hub.calls) == calls

    # A later push with fewer shards, and without log-probabilities, replaces the files. The first push is still
    # available by its revision.
    write_split(tmp_path / "new", "train", [pair(9)], dict, preference_features(), 2)
    push(hub, tmp_path / "home", tmp_path / "new", "org/data")
    assert set(hub.files("dataset", "org/data")) == {"README.md", "train-00000-of-00001.parquet"}
    assert pull(hub, tmp_path / "third", "org/data", "train") == [pair(9)]
    assert len(pull(hub, tmp_path / "third", f"org/data@{first}", "train")) == 5


def test_the_card_lists_stages_and_nothing_about_this_machine(hub, tmp_path):
    directory = judge_directory(tmp_path / "run" / "judge", reference_captions="/data/jones.jsonl")
    push(hub, tmp_path / "home", directory, "org/card", "--license", "cc-by-4.0")
    card = hub.files("dataset", "org/card")["README.md"].decode()
    for text in ("judge-1", "0.125", "org/model at c0ffee", "temperature | 1.2", "cc-by-4.0", "| train | 5 | 5 |"):
        assert text in card
    assert card.index("### generate") < card.index("### judge")
    for content in hub.files("dataset", "org/card").values():
        for secret in (str(tmp_path), "jones", "sk-0123456789", WRITER):
            assert secret.encode() not in content


def test_paths_of_local_models_are_not_pushed(hub, tmp_path):
    """Version 0.1.0 wrote such rows. Today's judge stage writes the last part of the path."""
    rows = [pair(number, model=f"{tmp_path}/jones/judge" if number == 3 else "org/judge") for number in range(40)]
    write_split(tmp_path / "data", "train", rows, dict, preference_features(), 40)
    result = push(hub, tmp_path / "home", tmp_path / "data", "org/local", check=False)
    assert result.returncode == 2 and "column judge of" in result.stderr and "--overwrite" in result.stderr
    assert ("dataset", "org/local") not in hub.repositories


def test_an_interrupted_push_resumes(fresh_hub, tmp_path):
    hub, directory = fresh_hub, judge_directory(tmp_path / "run" / "judge")
    hub.broken_after = 2
    # By default, the library retries for a minute.
    push_without_retries = (
        "import sys, huggingface_hub.lfs as lfs\n"
        "from functools import partial\n"
        "lfs.http_backoff = partial(lfs.http_backoff, max_retries=0)\n"
        "from medst_trl.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["-c", push_without_retries, "push", "--source", str(directory), "--repo_id", "org/data"]
    result = client(hub.url, tmp_path / "home", *command, check=False)
    assert result.returncode == 2 and "uploaded files are kept" in result.stderr and "Traceback" not in result.stderr
    assert len(hub.uploads) == 2 and set(hub.files("dataset", "org/data")) == {"README.md"}
    hub.broken_after = None
    push(hub, tmp_path / "home", directory, "org/data")
    assert len(hub.uploads) == 4  # each of the four shards once
    assert len(hub.files("dataset", "org/data")) == 5
    commits = len(hub.repositories["dataset", "org/data"].commits)
    push(hub, tmp_path / "home", directory, "org/data")  # nothing has changed
    assert len(hub.repositories["dataset", "org/data"].commits) == commits and len(hub.uploads) == 4


def test_a_repository_of_other_content_is_not_changed(hub, tmp_path):
    directory = judge_directory(tmp_path / "run" / "judge") / "preferences"
    write_split(tmp_path / "benchmark", "test", [benchmark_row()], dict, benchmark_features(), 2)
    push(hub, tmp_path / "home", tmp_path / "benchmark", "org/benchmark")
    hub.add("dataset", "org/theirs", {"README.md": b"# Mine", "data.csv": b"1,2"})
    hub.add("dataset", "org/public", {}, private=False)
    for repo_id, reason in (
        ("org/benchmark", "another kind of content (benchmark)"),
        ("org/theirs", "other content (README.md, data.csv)"),
        ("org/public", "is public"),
    ):
        before = hub.files("dataset", repo_id)
        result = push(hub, tmp_path / "home", directory, repo_id, check=False)
        assert result.returncode == 2 and reason in result.stderr and "Traceback" not in result.stderr
        assert hub.files("dataset", repo_id) == before
    push(hub, tmp_path / "home", directory, "org/theirs", "--replace_content", "true")
    assert "data.csv" not in hub.files("dataset", "org/theirs")
    push(hub, tmp_path / "home", directory, "org/public", "--private", "false")
    assert len(hub.files("dataset", "org/public")) == 5


def benchmark_row() -> dict:
    image = stored_image(1)
    names = ("id", "question", "answer", "answer_type", "question_type", "link")
    question = dict(zip(names, ("q", "Is it dark?", "yes", "closed", None, None), strict=True))
    return {"image_id": image.image_id, "image": {"bytes": image.bytes, "path": None}, "questions": [question]}


def test_a_revision_is_a_branch(hub, tmp_path):
    write_split(tmp_path / "data", "train", [pair(0)], dict, preference_features(), 2)
    push(hub, tmp_path / "home", tmp_path / "data", "org/branches", "--revision", "round_2")
    assert "train-00000-of-00001.parquet" in hub.files("dataset", "org/branches", "round_2")
    assert not hub.files("dataset", "org/branches")
    assert pull(hub, tmp_path / "home", "org/branches@round_2", "train") == [pair(0)]


@pytest.mark.parametrize(
    ("settings", "repo_id", "message"),
    [
        ({"token": READER}, "org/new", "The push to org/new on http://127.0.0.1:"),
        ({"token": EXPIRED}, "org/new", "the token (`hf auth login` or HF_TOKEN, with write access)"),
        ({"token": None}, "org/new", "No Hub token was found"),
        ({"HF_HUB_OFFLINE": "1"}, "org/new", "unset the `HF_HUB_OFFLINE` environment variable"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "org/new", "org/new on http://127.0.0.1:9 failed (ConnectError)"),
        ({}, "new", "OWNER/NAME"),
        ({}, "org/what is this", "OWNER/NAME"),
        ({}, "org/-x-", "The push to org/-x- on http://127.0.0.1:"),
    ],
)  # fmt: skip
def test_an_impossible_push_is_refused_with_a_reason(hub, tmp_path, settings, repo_id, message):
    write_split(tmp_path / "data", "train", [pair(0)], dict, preference_features(), 2)
    result = push(hub, tmp_path / "home", tmp_path / "data", repo_id, check=False, **settings)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not any(token in result.stderr + result.stdout for token in (READER, WRITER, EXPIRED))
    assert ("dataset", repo_id) not in hub.repositories


@pytest.mark.parametrize("settings", [{"token": EXPIRED}, {"HF_HUB_OFFLINE": "1"}])
def test_a_dataset_that_cannot_be_read_from_the_hub_is_refused_with_a_reason(hub, tmp_path, settings):
    result = client(hub.url, tmp_path, "-c", PULL, "org/none", "train", "preferences", check=False, **settings)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("medst_trl.base.errors.UserError")]
    assert "the Hub cannot be reached" in line and "hf auth login" in line


def test_a_token_without_write_access_is_refused(hub, tmp_path):
    write_split(tmp_path / "data", "train", [pair(0)], dict, preference_features(), 2)
    push(hub, tmp_path / "home", tmp_path / "data", "org/rights")
    write_split(tmp_path / "more", "train", [pair(1)], dict, preference_features(), 2)
    result = push(hub, tmp_path / "home", tmp_path / "more", "org/rights", check=False, token=READER)
    assert result.returncode == 2 and "The push to org/rights on" in result.stderr and "403" in result.stderr
    assert "Traceback" not in result.stderr


FORWARD = """
import re, sys, torch
from pathlib import Path
from types import SimpleNamespace
from huggingface_hub import hf_hub_download
from PIL import Image
from medst_trl import load_policy
logits = {}
for name in sys.argv[1:]:
    model, processor = load_policy(name)
    image = Image.open("scan.png")
    inputs = processor(images=[image], text=["USER: <image>\\nWhat? ASSISTANT: dark"], return_tensors="pt")
    with torch.no_grad():
        logits[name] = model(**inputs).logits
    card = Path(hf_hub_download(name.partition("@")[0], "README.md")).read_text()
    [code] = re.findall("```python\\n(.*?)```", card, re.DOTALL)
    exec(code.replace("max_new_tokens=128", "max_new_tokens=4"))
    print("QUICK START", isinstance(question, str))
torch.save(logits, "logits.pt")
"""


LISTED = """
import json, sys
from medst_trl.pipeline.lineage import trained_on, training_images
found = [(training_images(name), trained_on(name)) for name in sys.argv[1:]]
print(json.dumps([[sorted(ids), len(sources)] for (ids, complete), sources in found if complete]))
"""


def test_adapters_and_models_have_the_same_logits_after_push_and_pull(hub, tmp_path):
    import torch
    from tiny_dpo import adapter_policy
    from transformers import AutoModelForImageTextToText

    from medst_trl.pipeline.stages import merge
    from medst_trl.policy.adapters import write_base_file

    local = tmp_path / "local"
    model, processor = adapter_policy(save_to=local)
    (local / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE)  # without the role: no training has seen it
    model.eval().save_pretrained(local / "adapter")
    processor.save_pretrained(local / "adapter")
    merged = tmp_path / "merged"
    (local / "adapter" / "checkpoint-3").mkdir()
    for name in ("trainer_state.json", "training_args.bin", "optimizer.pt", "checkpoint-3/trainer_state.json"):
        (local / "adapter" / name).write_text(f'{{"path": "{tmp_path}"}}')
    scores = tmp_path / "evaluate"
    scores.mkdir()
    paths = {"benchmark": str(tmp_path / "prepare" / "benchmark"), "model": str(local / "adapter")}
    (scores / "scores.json").write_text(json.dumps(SCORES | paths))
    write_base_file(model, local / "adapter")
    trained = {"complete": True, "image_ids": ["a" * 64, "b" * 64]}
    (local / "adapter" / "training_images.json").write_text(json.dumps(trained))
    merge.main(merge.MergeArguments(str(local / "adapter"), str(merged)))

    image = random_image(0)
    image.save(tmp_path / "scan.png")
    inputs = processor(images=[image], text=["USER: <image>\nWhat? ASSISTANT: dark"], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        expected_merged = AutoModelForImageTextToText.from_pretrained(merged)(**inputs).logits

    refused = push(hub, tmp_path / "home", local / "adapter", "org/adapter", check=False)
    assert refused.returncode == 2 and "--base_model_name_or_path" in refused.stderr
    push(hub, tmp_path / "home", local / "base", "org/base")
    base = f"org/base@{hub.repositories['model', 'org/base'].branches['main']}"
    more = ("--base_model_name_or_path", base, "--evaluation", str(scores))
    push(hub, tmp_path / "home", local / "adapter", "org/adapter", *more)
    # The scores of the adapter also hold for the merged model.
    push(hub, tmp_path / "home", merged, "org/merged", *more)
    shutil.rmtree(local)
    shutil.rmtree(merged)

    result = client(hub.url, tmp_path / "elsewhere", "-c", FORWARD, "org/adapter", "org/merged@main", cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt")
    assert torch.equal(logits["org/adapter"], expected) and torch.equal(logits["org/merged@main"], expected_merged)
    assert result.stdout.count("QUICK START True") == 2

    # A fresh machine knows the training images, and has neither records nor data. A base model has no list.
    result = client(hub.url, tmp_path / "fresh", "-c", LISTED, "org/adapter", "org/merged@main", "org/base")
    assert json.loads(result.stdout) == [[trained["image_ids"], 1]] * 2 + [[[], 0]]

    for kind, files in ((key, hub.files(*key)) for key in hub.repositories if key[0] == "model"):
        assert not any(str(tmp_path).encode() in content for content in files.values()), kind
        assert not any("trainer" in name or "training_args" in name or "checkpoint" in name for name in files)
    metadata = card_metadata(hub.files("model", "org/adapter")["README.md"], tmp_path)
    assert metadata["base_model"] == "org/base" and metadata["library_name"] == "peft"
    card = hub.files("model", "org/merged")["README.md"].decode()
    assert "Merged from `org/base` (revision " in card and ") and a local adapter" in card
    assert "from medst_trl" not in card
    merged_metadata = card_metadata(card.encode(), tmp_path)
    assert merged_metadata["base_model"] == "org/base" and merged_metadata["library_name"] == "transformers"
    for [index] in (metadata["model-index"], merged_metadata["model-index"]):
        figures = {metric["name"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
        assert figures == {"strict open f1": 41.25, "strict closed accuracy": 80.0}

    # The base is identified by the pinned revision of the adapter. This cache has no reference for `main`.
    code = "from medst_trl.policy import adapters as b; b.weights_fingerprint = lambda *source: print(source)\n"
    code += "from medst_trl import load_policy; load_policy('org/adapter')"
    result = client(hub.url, tmp_path / "elsewhere", "-c", code)
    assert f"('org/base', '{base.partition('@')[2]}')" in result.stdout

    # When the repository of the base gets other weights, the adapter refuses them.
    adapter_policy(save_to=tmp_path / "other", seed=1)
    push(hub, tmp_path / "home", tmp_path / "other" / "base", "org/base")
    code = "from medst_trl import load_policy; load_policy('org/adapter', base_model_name_or_path='org/base')"
    result = client(hub.url, tmp_path / "elsewhere", "-c", code, check=False)
    assert "was trained on other weights than those of 'org/base'" in result.stderr


@pytest.mark.slow
def test_reference_log_probs_are_pushed_with_their_pairs(hub, tmp_path):
    from tiny_dpo import adapter_policy

    local, pairs = tmp_path / "local", judge_directory(tmp_path / "run" / "judge") / "preferences"
    model, processor = adapter_policy(save_to=local)
    model.save_pretrained(local / "adapter", save_embedding_layers=False)
    processor.save_pretrained(local / "adapter")

    def train(dataset, output_dir):
        settings = {
            "model_name_or_path": local / "adapter", "dataset": dataset, "output_dir": output_dir, "max_steps": 1,
            "per_device_train_batch_size": 4, "precompute_ref_log_probs": True, "disable_tqdm": True,
            "report_to": "none", "save_strategy": "no",
        }  # fmt: skip
        arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        return client(hub.url, tmp_path / "elsewhere", "-m", "medst_trl.cli", "dpo", *arguments).stdout

    assert "5 are computed" in train(pairs, tmp_path / "here")
    [cache] = (pairs / "reference_log_probs").iterdir()
    push(hub, tmp_path / "home", pairs, "org/cached")
    files = hub.files("dataset", "org/cached")
    assert files[f"reference_log_probs/{cache.name}"] == cache.read_bytes() and len(files) == 6
    card = files["README.md"].decode()
    assert "reference_log_probs" in card and "| train | 5 | 5 |" in card
    assert str(tmp_path).encode() not in cache.read_bytes()
    assert pull(hub, tmp_path / "elsewhere", "org/cached", "train") == [pair(number) for number in range(5)]

    shutil.rmtree(pairs / "reference_log_probs")
    assert "5 of 5 pairs are known" in train("org/cached", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there" / "reference_log_probs").iterdir()] == [cache.name]
    push(hub, tmp_path / "home", pairs, "org/cached")
    files = hub.files("dataset", "org/cached")
    assert len(files) == 5 and b"reference_log_probs" not in files["README.md"]
    assert "5 are computed" in train("org/cached", tmp_path / "without")


SCORES = {
    "split": "test",
    "scores": {
        "strict": {
            "n": 20, "n_images": 7,
            "open": {"f1": {"value": 41.25, "n": 10, "interval": [30.0, 50.0], "majority": 11.0}},
            "closed": {"accuracy": {"value": 80.0, "n": 10, "interval": None}, "other": {"value": None, "n": 0}},
        }
    },
    "controls": {"blank": {"strict": {"open": {"f1": {"value": 9.0}}}}},
}  # fmt: skip


def card_metadata(card: bytes, tmp_path: Path) -> dict:
    from huggingface_hub import metadata_load

    (tmp_path / "card.md").write_bytes(card)
    return metadata_load(tmp_path / "card.md")


@pytest.mark.slow
def test_a_recipe_reads_from_and_pushes_to_the_hub(hub, tmp_path):
    from tiny_run import small_policy

    model, processor = small_policy()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_split(tmp_path / "bench", "test", [benchmark_row()], dict, benchmark_features(), 2)
    push(hub, tmp_path / "home", tmp_path / "model", "org/recipe_model")
    push(hub, tmp_path / "home", tmp_path / "bench", "org/recipe_benchmark")
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}/run\n"
        "evaluate:\n"
        "  model_name_or_path: org/recipe_model\n"
        "  benchmark: [org/recipe_benchmark@main]\n"
        "  controls: []\n"
        "  max_new_tokens: 2\n"
        f"push:\n  - name: model\n    source: {tmp_path}/model\n    repo_id: org/from_recipe\n"
    )
    client(hub.url, tmp_path / "elsewhere", "-m", "medst_trl.cli", "run", str(tmp_path / "run.yaml"))
    record = json.loads((tmp_path / "run" / "evaluate" / "stage.json").read_text())
    revisions = {source["hub_id"]: source["revision"] for sources in record["inputs"].values() for source in sources}
    assert revisions == {
        "org/recipe_model": hub.repositories["model", "org/recipe_model"].branches["main"],
        "org/recipe_benchmark@main": hub.repositories["dataset", "org/recipe_benchmark"].branches["main"],
    }
    assert json.loads((tmp_path / "run" / "evaluate" / "scores.json").read_text())["scores"]["strict"]["n"] == 1
    assert "model.safetensors" in hub.files("model", "org/from_recipe")
    pushed = json.loads((tmp_path / "run" / "push" / "model" / "stage.json").read_text())
    assert pushed["status"] == "complete" and pushed["url"].endswith("org/from_recipe")


@pytest.fixture
def calls(monkeypatch):
    """Replace `push_directory` and return a list that records its calls."""
    recorded = []

    def push_directory(args):
        recorded.append(args)
        return Pushed("https://hub/org/name", "adapter", "c0ffee" * 7, 3, 10)

    monkeypatch.setattr("medst_trl.hub.push.push_directory", push_directory)
    return recorded


def training_arguments(repo_id: str | None, **settings) -> SimpleNamespace:
    defaults = {"hub_private_repo": None, "output_dir": "runs/dpo"}
    return SimpleNamespace(push_to_hub=True, hub_model_id=repo_id, **defaults | settings)


@pytest.mark.parametrize(("repo_id", "message"), [(None, "hub_model_id is None"), ("name", "hub_model_id is 'name'")])
def test_a_push_without_a_valid_repository_is_refused(monkeypatch, repo_id, message):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef0123")
    assert PushAfterStage(("",), [training_arguments("org/name")]).repo_id == "org/name"
    with pytest.raises(UserError, match=message):
        PushAfterStage(("",), [training_arguments(repo_id)])


def test_a_push_without_a_token_is_refused(monkeypatch):
    monkeypatch.setattr("medst_trl.hub.push.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        PushAfterStage(("",), [training_arguments("org/name")])


def test_only_the_first_process_pushes(calls, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("medst_trl.hub.push.check_token", lambda: None)
    after = PushAfterStage(("",), [training_arguments("org/name", output_dir=tmp_path)])
    monkeypatch.setenv("RANK", "1")
    after.run()
    assert not calls
    monkeypatch.setenv("RANK", "0")
    after.run()
    assert calls == [PushArguments(str(tmp_path), "org/name")]
    assert "https://hub/org/name" in capsys.readouterr().out


def test_a_failed_push_after_a_stage_reports_that_the_stage_is_finished(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise UserError("The token may not write.")

    monkeypatch.setattr("medst_trl.hub.push.check_token", lambda: None)
    monkeypatch.setattr("medst_trl.hub.push.push_directory", refuse)
    with pytest.raises(UserError, match=r"is finished, but was not pushed. The token may not write.\n.*medst push"):
        PushAfterStage(("",), [training_arguments("org/name", output_dir=tmp_path)]).run()


def test_push_to_hub_is_cleared_in_the_arguments_of_a_trainer(calls, monkeypatch, tmp_path):
    monkeypatch.setattr("medst_trl.hub.push.check_token", lambda: None)
    arguments = training_arguments("org/aligned", hub_revision="v2", output_dir=tmp_path)
    after = PushAfterStage(("",), [SimpleNamespace(dataset="x"), arguments])
    assert arguments.push_to_hub is False  # otherwise, TRL uploads the whole output directory
    after.run()
    assert calls == [PushArguments(str(tmp_path), "org/aligned", revision="v2")]


def test_each_dataset_that_exists_is_pushed_to_its_own_repository(calls, monkeypatch, tmp_path):
    monkeypatch.setattr("medst_trl.hub.push.check_token", lambda: None)
    for name in ("instruct", "images"):
        (tmp_path / name).mkdir()
    hub = HubArguments(push_to_hub=True, hub_dataset_id="org/vqa", hub_private_repo=False)
    PushAfterStage(("instruct", "benchmark", "images"), [SimpleNamespace(output_dir=tmp_path), hub]).run()
    expected = [("org/vqa-instruct", False), ("org/vqa-images", False)]
    assert [(args.repo_id, args.private) for args in calls] == expected


def test_nothing_is_pushed_unless_requested(calls, tmp_path):
    PushAfterStage(("",), [SimpleNamespace(output_dir=tmp_path, push_to_hub=False), HubArguments()]).run()
    assert not calls


def test_prepare_with_push_to_hub_publishes_its_datasets(tmp_path):
    with serve_hub() as hub:
        command = [
            "-m", "medst_trl.cli", "prepare", "--source", "phantoms", "--num_phantoms", "3", "--num_test_phantoms",
            "2", "--num_unlabelled_phantoms", "4", "--output_dir", str(tmp_path / "prepare"), "--push_to_hub", "true",
            "--hub_dataset_id", "me/scans",
        ]  # fmt: skip
        refused = client(hub.url, tmp_path / "home", *command, token=None, check=False)
        assert refused.returncode == 2 and "hf auth login" in refused.stderr and not (tmp_path / "prepare").exists()
        for _ in range(2):  # a finished stage is pushed again, in case the push failed
            pushed = client(hub.url, tmp_path / "home", *command)
            assert pushed.returncode == 0, pushed.stderr
            assert pushed.stdout.count("The instruct dataset is at") == 1
        read = 'from datasets import load_dataset; print(len(load_dataset("me/scans-images", split="train")))'
        assert client(hub.url, tmp_path / "other_home", "-c", read).stdout.split()[-1] == "4"
