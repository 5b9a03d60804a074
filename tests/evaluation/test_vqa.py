# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import resource
from collections import Counter
from itertools import islice

import pytest
from datasets import Dataset
from family_models import tiny_model
from hypothesis import assume, given
from hypothesis import strategies as st
from phantom_rows import benchmark_rows
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.base.files import append_rows
from medst_trl.data.schema import benchmark_features
from medst_trl.demo.phantoms import make_phantoms
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.engines.decoding import chat_inputs
from medst_trl.engines.engine import BatchEngine, OpenedImage, Prompt, Reply, Sampling, to_answer
from medst_trl.engines.kinds.transformers import TransformersEngine
from medst_trl.evaluation import vqa
from medst_trl.evaluation.scoring import score_vqa
from medst_trl.evaluation.vqa import answer_benchmark, blank_image, questions_of, shuffled_rows, write_predictions
from medst_trl.policy.loading import prepare_policy


SMALL = {"vision_size": 32, "vision_layers": 2, "text_size": 32, "text_layers": 1, "vocab_size": 400}


@pytest.fixture(scope="module")
def policy():
    model, processor = tiny_llava(**SMALL)
    return prepare_policy(model, processor), processor


@pytest.fixture(scope="module")
def benchmark():
    return Dataset.from_list(
        list(benchmark_rows(make_phantoms(6, seed=0, split="test"))), features=benchmark_features()
    )


@pytest.fixture
def engine(policy):
    return TransformersEngine(*policy, batch_size=4)


class ScriptedEngine(BatchEngine):
    """Engine that makes batches as `transformers` does, replies with `reply(prompt)` and records the prompts."""

    name = "transformers"

    def __init__(self, policy, batch_size=4, reply=lambda prompt: ""):
        self.inner = TransformersEngine(*policy, batch_size=batch_size)
        self.batch_size, self.reply, self.written = batch_size, reply, []
        self.batches, self.describe = self.inner.batches, self.inner.describe

    def write(self, prompts, sampling):
        self.written.append(prompts)
        return [Reply(self.reply(prompt)) for prompt in prompts]


def question_of(prompt):
    return prompt.messages[-1]["content"][-1]["text"]


def answer(model, processor, image, max_new_tokens):
    prompt = Prompt(to_answer([], 1, "What?"), [OpenedImage(b"", image)])
    (reply,) = TransformersEngine(model, processor, 1).write([prompt], Sampling(0, max_new_tokens=max_new_tokens))
    return reply


def prompts(processor, questions, images):
    return chat_inputs(processor, [to_answer([], 1, text) for text in questions], [[image] for image in images])


def without_settings(rows):
    return {row["id"]: (row["prediction"], row["generation"]["ended"]) for row in rows}


def test_rows_have_the_columns_of_predictions(engine, benchmark):
    engine.model_name = "tiny"
    rows = list(answer_benchmark(engine, benchmark, max_new_tokens=6))
    asked = {question["id"]: (row["image_id"], question) for row in benchmark for question in row["questions"]}
    assert {row["id"] for row in rows} == asked.keys()
    for row in rows:
        image_id, question = asked[row["id"]]
        assert list(row) == [
            "id", "image_id", "group_id", "question", "answer", "answer_type", "question_type", "prediction",
            "generation",
        ]  # fmt: skip
        assert (row["image_id"], row["answer"]) == (image_id, question["answer"])
        assert row["generation"]["image_shown"] == image_id
        assert list(row["generation"]) == [
            "model", "engine", "decoding", "max_new_tokens", "control", "image_shown", "ended"
        ]  # fmt: skip
        assert row["generation"]["model"] == "tiny"
    assert score_vqa(rows, bootstrap_samples=0)["n"] == len(asked)


def test_predictions_have_the_groups_of_the_benchmark(engine, benchmark):
    groups = [f"5a17ed-{number // 2}" for number in range(len(benchmark))]
    rows = list(answer_benchmark(engine, benchmark.add_column("group_id", groups), max_new_tokens=2))
    of_image = dict(zip(benchmark["image_id"], groups))
    assert all(row["group_id"] == of_image[row["image_id"]] for row in rows)
    scores = score_vqa(rows, bootstrap_samples=0)
    assert (scores["bootstrap"]["unit"], scores["n_groups"]) == ("group", len(set(groups)))


def test_predictions_do_not_depend_on_the_batch_size(policy, benchmark):
    single, several, together = (
        without_settings(answer_benchmark(TransformersEngine(*policy, size), benchmark, max_new_tokens=8))
        for size in (1, 5, 100)
    )
    assert single == several == together
    assert len({prediction for prediction, _ in single.values()}) > 1, (
        "all predictions are equal, so this tests nothing"
    )


def test_batches_have_questions_of_similar_length(policy, benchmark):
    engine = ScriptedEngine(policy)
    list(answer_benchmark(engine, benchmark))
    lengths = [
        [len(policy[1].tokenizer(question_of(prompt))["input_ids"]) for prompt in batch] for batch in engine.written
    ]
    assert [len(batch) for batch in lengths[:-1]] == [4] * (len(lengths) - 1)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)


def test_prompts_equal_those_of_training(policy, benchmark):
    """The prompt has the tokens of the collator up to the answer, without an additional blank or start token."""
    from medst_trl.training.collator import DataCollatorForSelfQuestioning

    _, processor = policy
    image, question = benchmark[0]["image"], "Where is it? </s> ASSISTANT: <vusr>"
    prompt = prompts(processor, [question], [image])
    content = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Left."}]}
    collator = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)
    batch = collator([{"id": "1", "images": [image], "messages": [{"role": "user", "content": content}, answer]}])
    start = int((batch["labels"][0] != -100).nonzero()[0])
    assert batch["input_ids"][0, :start].tolist() == prompt["input_ids"][0].tolist()
    assert (batch["pixel_values"] == prompt["pixel_values"]).all()


def test_prompts_are_padded_on_the_left(policy, benchmark):
    _, processor = policy
    inputs = prompts(processor, ["Short?", "A much longer question than the other?"], [benchmark[0]["image"]] * 2)
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_vusr_is_never_written(policy, benchmark):
    """The model gives <vusr> the highest logit at each step, and its generation config does not suppress it."""
    import torch

    model, processor = tiny_llava(**SMALL)
    prepare_policy(model, processor)
    model.generation_config.suppress_tokens = None
    vusr = processor.tokenizer.convert_tokens_to_ids("<vusr>")
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, logits: torch.nn.functional.pad(logits[..., :vusr], (0, 1), value=1e4)
    )
    seen = []
    decode = processor.batch_decode
    processor.batch_decode = lambda tokens, **kwargs: seen.append(tokens) or decode(tokens, **kwargs)
    answer(model, processor, benchmark[0]["image"], 5)
    hook.remove()
    assert (seen[0] != vusr).all()


def test_decoding_ignores_the_generation_config(policy, benchmark):
    model, engine = policy[0], TransformersEngine(*policy)
    before = without_settings(answer_benchmark(engine, benchmark, max_records=5, max_new_tokens=5))
    saved = model.generation_config.to_dict()
    model.generation_config.update(do_sample=True, temperature=1.2, top_k=7, repetition_penalty=3.0)
    try:
        after = without_settings(answer_benchmark(engine, benchmark, max_records=5, max_new_tokens=5))
    finally:
        model.generation_config.update(**saved)
    assert before == after


def test_rows_tell_whether_the_answer_ended(policy, benchmark):
    model, processor = policy
    stop = model.generation_config.eos_token_id
    reply = answer(model, processor, benchmark[0]["image"], 4)
    assert not reply.ended
    first = processor.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
    try:
        model.generation_config.eos_token_id = [*stop, *first]  # the first words of the answer end it
        assert answer(model, processor, benchmark[0]["image"], 4).ended
    finally:
        model.generation_config.eos_token_id = stop


def test_controls_show_other_images(policy, benchmark):
    engine = ScriptedEngine(policy, reply=lambda prompt: prompt.images[0].image.tobytes().hex())
    real, blank, shuffled = (
        {row["id"]: row for row in answer_benchmark(engine, benchmark, control=control)}
        for control in (None, "blank", "shuffled")
    )
    assert real.keys() == blank.keys() == shuffled.keys()
    for key, row in real.items():
        assert shuffled[key]["prediction"] not in (row["prediction"], blank[key]["prediction"])
        assert set(blank[key]["prediction"]) == {"8", "0"}  # mid-grey, 0x80
        assert row["image_id"] == shuffled[key]["image_id"] != shuffled[key]["generation"]["image_shown"]
    by_image = {(row["image_id"], row["generation"]["image_shown"]) for row in shuffled.values()}
    assert len(by_image) == len(benchmark), "questions about an image are shown different images"


def test_bad_benchmarks_are_refused(engine, benchmark):
    with pytest.raises(UserError, match="cannot be shuffled"):
        next(answer_benchmark(engine, benchmark.select([0]), control="shuffled"))
    with pytest.raises(UserError, match="Unknown control 'noise'"):
        next(answer_benchmark(engine, benchmark, control="noise"))
    with pytest.raises(UserError, match="have the id"):
        questions_of(benchmark.select([0, 0]))
    with pytest.raises(UserError, match="no questions"):
        questions_of(benchmark.select([]))


class Interrupted(BaseException):
    """Not an `Exception`, so that no handler cleans up."""


@pytest.mark.parametrize("num_rows", [0, 1, 7, 10])
@pytest.mark.parametrize("missing_bytes", [0, 9])
def test_an_interrupted_run_resumes(engine, benchmark, tmp_path, monkeypatch, num_rows, missing_bytes):
    settings = {"max_new_tokens": 4}
    whole, path = tmp_path / "whole.jsonl", tmp_path / "interrupted.jsonl"
    write_predictions(whole, engine, benchmark, **settings)

    def interrupted(*args, **kwargs):
        yield from islice(answer_benchmark(*args, **kwargs), num_rows)
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(vqa, "answer_benchmark", interrupted)
        write_predictions(path, engine, benchmark, **settings)
    part = tmp_path / "interrupted.jsonl.incomplete"
    if missing_bytes and num_rows:
        part.write_bytes(part.read_bytes()[:-missing_bytes])  # an incomplete last line
    assert not path.exists()

    asked = []
    write = TransformersEngine.write
    with monkeypatch.context() as patch:
        patch.setattr(
            TransformersEngine,
            "write",
            lambda self, prompts, sampling: asked.append(len(prompts)) or write(self, prompts, sampling),
        )
        write_predictions(path, engine, benchmark, **settings)
    assert path.read_bytes() == whole.read_bytes()
    assert not part.exists()
    kept = max(0, num_rows - bool(missing_bytes))
    assert sum(asked) == len(questions_of(benchmark)) - kept // 4 * 4, "complete batches are computed again"


def test_a_finished_file_is_not_changed(benchmark, tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("mine")
    write_predictions(path, None, benchmark)
    assert path.read_text() == "mine"


def test_each_batch_is_answered_by_one_rank(policy, benchmark, monkeypatch):
    shares = []
    for rank in range(2):
        state = type("State", (), {"process_index": rank, "num_processes": 2, "is_main_process": not rank})
        monkeypatch.setattr(vqa, "process_state", state)
        shares.append({row["id"] for row in answer_benchmark(ScriptedEngine(policy), benchmark)})
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == {question["id"] for question in questions_of(benchmark)}


def test_max_records_limits_the_questions(engine, benchmark):
    rows = list(answer_benchmark(engine, benchmark, max_records=4, max_new_tokens=2))
    assert {row["id"] for row in rows} == {question["id"] for question in questions_of(benchmark)[:4]}


def test_a_full_disk_keeps_complete_lines(engine, benchmark, tmp_path):
    """Complete lines written before the disk was full are used. The incomplete line is discarded."""
    settings = {"max_new_tokens": 2}
    rows = list(answer_benchmark(engine, benchmark, **settings))
    whole, path, part = (tmp_path / name for name in ("whole.jsonl", "full.jsonl", "full.jsonl.incomplete"))
    write_predictions(whole, engine, benchmark, **settings)
    limit = sum(len(json.dumps(row)) + 1 for row in rows[:5]) + 20
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError):
            append_rows(path, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert part.stat().st_size == limit
    write_predictions(path, engine, benchmark, **settings)
    assert path.read_bytes() == whole.read_bytes()


@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.integers(0, 5))
def test_no_question_keeps_its_image_after_shuffling(image_ids, seed):
    assume(not image_ids or 2 * max(Counter(image_ids).values()) <= len(image_ids))
    shuffled = shuffled_rows(image_ids, seed)
    assert sorted(shuffled) == list(range(len(image_ids)))
    assert all(image_ids[row] != image_ids[donor] for row, donor in enumerate(shuffled))


@pytest.mark.parametrize("image_ids", [["a"], ["a", "a"], ["a", "a", "b"]])
def test_too_many_equal_images_cannot_be_shuffled(image_ids):
    with pytest.raises(UserError, match="cannot be shuffled"):
        shuffled_rows(image_ids)


def test_the_shuffle_depends_on_the_seed():
    image_ids = [str(number) for number in range(50)]
    assert shuffled_rows(image_ids, 1) == shuffled_rows(image_ids, 1) != shuffled_rows(image_ids, 2)


def test_blank_images_keep_their_size():
    blank = blank_image(Image.linear_gradient("L").resize((70, 50)))
    assert blank.size == (70, 50)
    assert blank.getextrema() == ((128, 128),) * 3


def test_questions_about_an_image_that_the_model_cannot_read_count_as_wrong():
    question = {"answer": "yes", "answer_type": "closed", "question_type": None, "link": None, "question": "Normal?"}
    rows = [
        {"image_id": str(n), "image": Image.new("RGB", size, (40 * n, 0, 0)), "questions": [question | {"id": str(n)}]}
        for n, size in enumerate([(30, 20), (2, 600), (20, 30)])
    ]
    data = Dataset.from_list(rows, features=benchmark_features())
    engine = TransformersEngine(*tiny_model("qwen2.5-vl"), batch_size=2)
    for control in (None, "blank", "shuffled"):
        answers = list(answer_benchmark(engine, data, max_new_tokens=2, control=control))
        assert len(answers) == 3
        problems = [row["generation"]["problem"] for row in answers if "problem" in row["generation"]]
        assert len(problems) == 1 and problems[0].startswith("extreme_aspect_ratio: 2 x 600 pixels")
