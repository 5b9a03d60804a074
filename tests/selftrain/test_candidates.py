# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import ast
import copy
import io
import json
import threading
from collections import Counter
from itertools import islice

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, TEXT_ROLE
from family_models import tiny_model
from peft import get_peft_model
from random_images import random_image
from tiny_run import small_policy

from medst_trl import CandidateGenerator
from medst_trl.base.errors import UserError
from medst_trl.base.processes import ordered_map
from medst_trl.data.conform import conform
from medst_trl.data.images import image_id
from medst_trl.data.schema import candidate_features, instruct_features, text_of, with_stored_images
from medst_trl.engines import decoding, image_features
from medst_trl.engines.decoding import SeededSampler, chat_inputs
from medst_trl.engines.engine import DESCRIBE, BatchEngine, OpenedImage, Prompt, Reply, Sampling, to_answer, to_ask
from medst_trl.engines.image_features import ImageFeatureCache
from medst_trl.engines.kinds import transformers as transformers_engine
from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.families import Family
from medst_trl.policy.vusr import VUSR, add_vusr
from medst_trl.selftrain import candidates as candidates_module
from medst_trl.selftrain.filters import QuestionFilter


ANY_TEXT = QuestionFilter(min_words=1, english=False)  # a model with random weights writes no real questions
SHORT = {"question_sampling": Sampling(max_new_tokens=16), "answer_sampling": Sampling(max_new_tokens=16)}


def record(number, images=1):
    pictures = [random_image(number * 10 + index, (16 + 4 * (number % 3), 16)) for index in range(images)]
    return {"id": f"r{number}", "images": pictures, "image_ids": list(map(image_id, pictures)), "messages": []}


def as_dataset(records):
    return Dataset.from_list(records, features=instruct_features())


@pytest.fixture(scope="module")
def policy():
    """Return a model with random weights, of whose tokens one in ten ends a text, and its processor."""
    model, processor = small_policy()
    model.generation_config.eos_token_id = [*model.generation_config.eos_token_id, *range(5, 400, 10)]
    return model, processor


@pytest.fixture(scope="module")
def images():
    return as_dataset([record(number, images=2 if number == 4 else 1) for number in range(7)])


def outcomes(policy, images, done=(), **kwargs):
    kwargs = {"num_questions": 2, "num_answers": 3, "question_filter": ANY_TEXT, "seed": 5} | SHORT | kwargs
    return in_order(CandidateGenerator(*policy, **kwargs).outcomes(images, done), images)


def in_order(outcomes, images):
    """Outcomes in the order of their records. The generator yields each when it is complete."""
    return sorted(outcomes, key=lambda outcome: images["id"][:].index(outcome["id"]))


@pytest.fixture(scope="module")
def expected(policy, images):
    return outcomes(policy, images, batch_size=16)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_candidates_do_not_depend_on_the_batch_size(policy, images, expected, batch_size):
    assert outcomes(policy, images, batch_size=batch_size) == expected
    texts = [text for outcome in expected for candidate in outcome["candidates"] for text in candidate["answers"]]
    assert len(set(texts)) > len(texts) / 2 > 5, "too many texts are equal, so this tests nothing"


def test_other_seeds_and_settings_give_other_candidates(policy, images, expected):
    assert outcomes(policy, images, seed=6) != expected
    assert outcomes(policy, images, question_sampling=Sampling(temperature=0.5, max_new_tokens=16)) != expected


def test_a_record_does_not_depend_on_the_other_records(policy, images, expected):
    """Adding or removing records does not change the candidates of the others."""
    assert outcomes(policy, images.select([4, 2])) == [expected[4], expected[2]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_record_is_processed_by_one_rank(policy, images, expected, ranks, monkeypatch):
    shares = []
    for rank in range(ranks):
        state = type("State", (), {"process_index": rank, "num_processes": ranks, "is_main_process": not rank})
        monkeypatch.setattr(candidates_module, "process_state", state)
        shares.append(outcomes(policy, images, batch_size=1))
    together = {outcome["id"]: outcome for share in shares for outcome in share}
    assert sum(map(len, shares)) == len(together) == len(expected)
    assert [together[outcome["id"]] for outcome in expected] == expected
    assert all(shares)


def test_every_rank_gets_records(policy, images, expected, monkeypatch):
    """Also if one window could hold all records."""
    state = type("State", (), {"process_index": 6, "num_processes": 7, "is_main_process": False})
    monkeypatch.setattr(candidates_module, "process_state", state)
    assert outcomes(policy, images, batch_size=16) == expected[6:]


def test_finished_records_are_skipped(policy, images, expected):
    assert outcomes(policy, images, done={"r0", "r1", "r2", "r5"}, batch_size=1) == [expected[n] for n in (3, 4, 6)]


def test_candidates_have_the_group_of_their_record(policy, images):
    groups = [f"5a17ed-{number // 2:020}" for number in range(len(images))]
    generate = CandidateGenerator(*policy, 1, 2, question_filter=ANY_TEXT, seed=5, **SHORT)
    of_record = dict(zip(images["id"], groups))
    rows = list(generate(images.add_column("group_id", groups)))
    assert rows and all(row["group_id"] == of_record[row["id"].partition("#")[0]] for row in rows)
    assert {row["group_id"] for row in generate(images)} == {None}


def test_candidates_have_the_documented_columns(policy, images, expected):
    generate = CandidateGenerator(*policy, 2, 3, question_filter=ANY_TEXT, seed=5, **SHORT)
    generate.engine.model_name = "/models/tiny"
    rows = list(generate(images))
    assert [row["id"] for row in rows] == [item["id"] for outcome in expected for item in outcome["candidates"]]
    rejected = [item for outcome in expected for item in outcome["rejected"]]
    assert sorted(generate.rejected, key=lambda item: item["id"]) == sorted(rejected, key=lambda item: item["id"])
    dataset = Dataset.from_list(rows, features=candidate_features())
    assert conform(dataset, "candidates") is dataset
    stored = {row["id"]: row for row in with_stored_images(images)}
    for row, raw in zip(rows, with_stored_images(dataset)):
        source = stored[row["id"].partition("#")[0]]
        assert raw["images"] == source["images"], "the bytes of the images have changed"
        assert row["image_ids"] == source["image_ids"]
        (question,) = row["prompt"]
        kinds = [part["type"] for part in question["content"]]
        assert kinds == ["image"] * len(source["image_ids"]) + ["text"]
        assert "vusr" not in question and question["role"] == "user"
        assert len(row["answers"]) == 2
        assert json.loads(row["generation"]) == {
            "model": "tiny",
            "engine": "transformers",
            "seed": 5,
            "question_sampling": {"temperature": 1.2, "top_k": 100, "top_p": 0.95, "max_new_tokens": 16},
            "answer_sampling": {"temperature": 1.2, "top_k": 100, "top_p": 0.95, "max_new_tokens": 16},
            "describe_first": False,
        }
    assert any(row["id"].startswith("r4#") for row in rows), "no candidate has two images, so this tests nothing"


def test_every_question_is_accounted_for(expected):
    """Every sampled question is a candidate or rejected with a reason."""
    for outcome in expected:
        numbers = [item["id"] for item in outcome["candidates"] + outcome["rejected"]]
        assert sorted(numbers) == [f"{outcome['id']}#0", f"{outcome['id']}#1"]


class ScriptedEngine(BatchEngine):
    """Engine that returns `reply(prompt)` and records its prompts."""

    name, batch_size = "script", 2

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def write(self, prompts, sampling):
        self.asked += [(prompt, sampling) for prompt in prompts]
        return [self.reply(prompt) for prompt in prompts]


def kind_of(prompt):
    last = prompt.messages[-1]
    return "ask" if last.get("vusr") else "describe" if text_of(last["content"]) == DESCRIBE else "answer"


def numbers_of(prompt):
    return ast.literal_eval(prompt.stream)[3:]


def test_rejected_questions_have_a_reason():
    questions = {
        0: Reply("Where is the lesion?"),
        1: Reply("where is  the lesion"),
        2: Reply("The lesion is bright."),
        3: Reply("Why?"),
        4: Reply(""),
        5: Reply("Where is the", ended=False),
        6: Reply("What does the scan show?"),
        7: Reply("Is it large?"),
        8: Reply("Is it a bright lesion?"),
        9: Reply("What " + "ever " * 99 + "?"),
    }
    answers = {0: ["It is small and bright.", "It is large and bright."], 6: ["A scan", "a scan!"], 7: ["", "Yes"],
               8: ["Yes", "No"]}  # fmt: skip
    long = "a round lesion of soft tissue with an even border " * 4
    answers[7] = [long + "near it", long + "by it"]

    def reply(prompt):
        if kind_of(prompt) == "ask":
            return questions[numbers_of(prompt)[0]]
        question, answer = numbers_of(prompt)
        return Reply(answers[question][answer])

    engine = ScriptedEngine(reply)
    (outcome,) = CandidateGenerator(engine, num_questions=10).outcomes(as_dataset([record(0)]))
    assert outcome["drawn"] == 10
    assert [(item["id"], item["answers"]) for item in outcome["candidates"]] == [
        ("r0#0", answers[0]),
        ("r0#8", answers[8]),
    ]
    assert {item["id"]: item["reason"] for item in outcome["rejected"]} == {
        "r0#1": "repeated",
        "r0#2": "not_a_question",
        "r0#3": "too_short",
        "r0#4": "empty",
        "r0#5": "unfinished",
        "r0#6": "identical_answers",
        "r0#7": "nearly_identical_answers",
        "r0#9": "too_long",
    }
    assert sum(kind_of(prompt) == "answer" for prompt, _ in engine.asked) == 8, "rejected questions are answered"


def test_describe_first_puts_a_description_before_the_question():
    fixed_replies = {"describe": Reply("A </s> scan."), "ask": Reply("Where is the lesion?")}
    engine = ScriptedEngine(
        lambda prompt: fixed_replies.get(kind_of(prompt)) or Reply(f"On side {numbers_of(prompt)[-1]}.")
    )
    generate = CandidateGenerator(engine, describe_first=True)
    (row,) = generate(as_dataset([record(0, images=2)]))
    roles = [turn["role"] for turn in row["prompt"]]
    assert roles == ["user", "assistant", "user"]
    assert [text_of(turn["content"]) for turn in row["prompt"]] == [DESCRIBE, "A </s> scan.", "Where is the lesion?"]
    kinds = [[part["type"] for part in turn["content"]] for turn in row["prompt"]]
    assert kinds == [["image", "image", "text"], ["text"], ["text"]], "the images are not once at the start"
    assert [(kind_of(p), s.temperature) for p, s in engine.asked] == [
        ("describe", 0.0), ("ask", 1.2), ("answer", 1.2), ("answer", 1.2)]  # fmt: skip
    assert engine.asked[1][0].messages[:2] == engine.asked[2][0].messages[:2]
    assert json.loads(row["generation"])["describe_first"]


def test_an_empty_description_rejects_the_record():
    (outcome,) = CandidateGenerator(ScriptedEngine(lambda p: Reply("")), describe_first=True).outcomes(
        as_dataset([record(0)])
    )
    assert (outcome["drawn"], outcome["rejected"][0]["reason"]) == (0, "empty_description")


def test_unreadable_images_do_not_stop_the_others(policy, images, expected):
    def bytes_of(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    whole = bytes_of(random_image(1, (20, 16)))
    broken = [
        {"bytes": b"no image", "path": None},
        {"bytes": whole[: len(whole) // 2], "path": None},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": "/nowhere/x.png"},
    ]
    rows = [
        {"id": f"b{number}", "images": [item], "image_ids": [str(number)], "messages": []}
        for number, item in enumerate(broken)
    ]
    rows.append({"id": "b4", "images": [], "image_ids": [], "messages": []})
    result = outcomes(policy, as_dataset([*rows[:2], record(0), *rows[2:], record(1)]), batch_size=8)
    reasons = {
        item["id"]: item["reason"] for outcome in result for item in outcome["rejected"] if "#" not in item["id"]
    }
    assert reasons == {f"b{number}": "unreadable_image" for number in range(4)} | {"b4": "no_image"}
    assert [outcome for outcome in result if outcome["id"][0] == "r"] == expected[:2]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_prompts_are_correct_for_all_families(family):
    """A `<vusr>` turn is left open, control tokens in the history stay text, and images are at their places."""
    processor = FAMILIES[family]()
    vusr = add_vusr(processor)
    history = [*to_answer([], 1, f"What {VUSR} is this? {processor.tokenizer.eos_token}"),
               {"role": "assistant", "content": [{"type": "text", "text": f"It is {VUSR} dark."}]}]  # fmt: skip
    conversations = [to_ask([], 1), to_ask(history, 1), to_answer([], 1, f"Which {VUSR} is it?")]
    inputs = chat_inputs(processor, conversations, [[random_image(n, (32, 32))] for n in range(3)])
    ids = inputs["input_ids"]
    if family == TEXT_ROLE:
        assert vusr is None and processor.decode(ids[1]).endswith("</s>VUSER:")
    else:
        assert (ids == vusr).sum(1).tolist() == [1, 1, 0]
        assert ids[:2, -1].tolist() == [vusr, vusr]
    alone = chat_inputs(processor, conversations[:1], [[random_image(0, (32, 32))]])["input_ids"][0]
    assert ids[0, -len(alone) :].tolist() == alone.tolist()


def test_several_images_keep_their_order(policy):
    _, processor = policy
    first, second = random_image(1, (20, 16)), random_image(2, (20, 16))
    both = chat_inputs(processor, [to_ask([], 2), to_ask([], 1)], [[first, second], [second]])["pixel_values"]
    one, two = (chat_inputs(processor, [to_ask([], 1)], [[image]])["pixel_values"][0] for image in (first, second))
    assert [torch.equal(*pair) for pair in zip(both, (one, two, two))] == [True] * 3


def test_out_of_memory_halves_the_batch(policy, images, expected, monkeypatch, capsys):
    sizes = []

    def write_texts(model, processor, inputs, max_new_tokens, sampler, draws):
        sizes.append(sum(draws))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return decoding.write_texts(model, processor, inputs, max_new_tokens, sampler, draws)

    monkeypatch.setattr(transformers_engine, "write_texts", write_texts)
    assert outcomes(policy, images, batch_size=16) == expected
    assert sizes[:3] == [14, 6, 2], "a batch of 7 is cut to 6, because each question has two samples"
    assert max(sizes[3:]) == 3
    assert "Not enough memory for 14 texts per batch. Continuing with 7" in capsys.readouterr().out


def test_out_of_memory_while_encoding_halves_the_batch_of_images(policy, images, expected, monkeypatch, capsys):
    """The batches of texts do not change."""
    encoded, written = [], []

    def encode(self, keys, keep):
        if len(keys) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        encoded.append(len(keys))
        encode_all(self, keys, keep)

    def write_texts(model, processor, inputs, max_new_tokens, sampler, draws):
        written.append(sum(draws))
        return decoding.write_texts(model, processor, inputs, max_new_tokens, sampler, draws)

    encode_all = ImageFeatureCache.encode
    monkeypatch.setattr(ImageFeatureCache, "encode", encode)
    monkeypatch.setattr(transformers_engine, "write_texts", write_texts)
    assert outcomes(policy, images, batch_size=16) == expected
    assert "Not enough memory for 8 images per batch. Continuing with 4" in capsys.readouterr().out
    assert encoded == [2, 2, 2, 2] and written[0] == 14


def test_out_of_memory_while_writing_leaves_the_batch_of_images_unchanged(policy, images, monkeypatch):
    encoded = []

    def encode(self, keys, keep):
        encoded.append(len(keys))
        encode_all(self, keys, keep)

    def write_texts(model, processor, inputs, max_new_tokens, sampler, draws):
        if sum(draws) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return decoding.write_texts(model, processor, inputs, max_new_tokens, sampler, draws)

    encode_all = ImageFeatureCache.encode
    monkeypatch.setattr(ImageFeatureCache, "encode", encode)
    monkeypatch.setattr(transformers_engine, "write_texts", write_texts)
    outcomes(policy, images.select([0, 1, 2, 3, 5, 6]), batch_size=2)
    assert encoded == [2, 2, 2]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_candidates_are_the_same_without_shared_prompts(policy, images, expected, monkeypatch, batch_size):
    """Each text then has its own prompt and pixels, as for families that do not share prompts."""
    monkeypatch.setattr(transformers_engine, "family_of", lambda model_type: Family("", "", ()))
    assert outcomes(policy, images, batch_size=batch_size) == expected


@pytest.mark.parametrize("family", ["vicuna", "qwen2.5-vl"])
def test_an_adapter_writes_the_same_without_shared_prompts(family):
    """The base model shares prompts, and the adapter must apply to them."""
    model, processor = tiny_model(family)
    opened = [OpenedImage(b"", random_image(number, (20, 16))) for number in range(2)]
    prompts = [Prompt(to_answer([], 1, f"Is it {n}?"), [opened[n]], f"{n} {draw}") for n in range(2) for draw in "abc"]
    sampling = Sampling(max_new_tokens=16)

    def plain(model):
        inputs = chat_inputs(
            processor, [prompt.messages for prompt in prompts], [[prompt.images[0].image] for prompt in prompts]
        )
        return decoding.write_texts(model, processor, inputs, 16, SeededSampler(sampling, [p.stream for p in prompts]))

    without_adapter = plain(model)
    model = get_peft_model(model, adapter_config(model, r=4, vision_r=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    replies = transformers_engine.TransformersEngine(model, processor).write(prompts, sampling)
    assert [(reply.text, reply.ended) for reply in replies] == plain(model) != without_adapter


def test_each_image_is_preprocessed_and_encoded_once(policy, images, monkeypatch):
    """The description, the questions and the answers use the same features."""
    model, processor = policy
    encoded, preprocessed = [], []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    preprocess = processor.image_processor.preprocess

    def counting_preprocess(pictures, *args, **kwargs):
        preprocessed.extend(picture for own in pictures for picture in own)
        return preprocess(pictures, *args, **kwargs)

    monkeypatch.setattr(processor.image_processor, "preprocess", counting_preprocess)
    try:
        result = outcomes(policy, images, describe_first=True, batch_size=16)
    finally:
        hook.remove()
    assert sum(outcome["drawn"] for outcome in result) == 14
    assert sum(encoded) == len(preprocessed) == 8, "seven records, one of which has two images"


def test_only_the_features_of_one_window_are_in_memory(policy, images, monkeypatch):
    held = []

    def encode(self, keys, keep):
        encode_all(self, keys, keep)
        held.append(len(self.known))

    encode_all = ImageFeatureCache.encode
    monkeypatch.setattr(ImageFeatureCache, "encode", encode)
    generate = CandidateGenerator(*policy, batch_size=1, question_filter=ANY_TEXT, **SHORT)
    assert len(list(generate.outcomes(images))) == 7
    assert sorted(set(held)) == [1, 2, 3], "more than the images of two records are in memory"
    assert not generate.engine._images.known


@pytest.mark.parametrize("room", [0, 2])
def test_images_without_room_in_memory_are_encoded_again(policy, images, expected, monkeypatch, room):
    """The candidates are the same. Images with room are encoded once."""
    encoded, held = Counter(), []

    def encode(self, keys, keep):
        encode_all(self, keys, keep)
        encoded.update(keys)
        held.append((len(self.known), len(set(keys).union(keep))))

    encode_all = ImageFeatureCache.encode
    memory = ImageFeatureCache(*policy)
    image = OpenedImage(b"", random_image(0, (20, 16)))
    memory.encode([image])
    monkeypatch.setattr(image_features, "MOST_BYTES", room * memory.known[image].bytes)
    monkeypatch.setattr(ImageFeatureCache, "encode", encode)
    assert outcomes(policy, images, batch_size=4) == expected
    assert all(known <= room + needed for known, needed in held)
    assert sum(times == 1 for times in encoded.values()) == room
    assert len(encoded) == 8 and max(encoded.values()) > 2


def test_equal_prompts_are_read_once(policy, images, expected, monkeypatch):
    reads = []

    def prefill(model, inputs, draws, **settings):
        reads.append((len(inputs["input_ids"]), list(draws)))
        return read_shared(model, inputs, draws, **settings)

    read_shared = decoding.prefill
    monkeypatch.setattr(decoding, "prefill", prefill)
    assert outcomes(policy, images, batch_size=16) == expected
    asked = sum(len(outcome["candidates"]) for outcome in expected)
    assert reads[0] == (7, [2] * 7), "the questions about an image do not share a prompt"
    assert all(draws == [3] * prompts for prompts, draws in reads[1:]), (
        "the answers to a question do not share a prompt"
    )
    assert sum(prompts for prompts, _ in reads[1:]) >= asked > 5


def estimate_batch_sizes(engine):
    """Make the engine estimate its batch size, as it does on an accelerator."""
    engine._estimates = True
    engine._most["text"] = transformers_engine.MAX_BATCH_SIZE


@pytest.mark.parametrize("fit", [1, 5, 9])
def test_candidates_do_not_depend_on_the_estimated_batch_size(policy, images, expected, monkeypatch, fit):
    sizes = []

    def write_texts(model, processor, inputs, max_new_tokens, sampler, draws):
        sizes.append(sum(draws))
        return decoding.write_texts(model, processor, inputs, max_new_tokens, sampler, draws)

    monkeypatch.setattr(transformers_engine, "write_texts", write_texts)
    monkeypatch.setattr(transformers_engine, "largest_batch", lambda *args: fit)
    generate = CandidateGenerator(*policy, 2, 3, question_filter=ANY_TEXT, seed=5, **SHORT)
    estimate_batch_sizes(generate.engine)
    assert in_order(generate.outcomes(images), images) == expected
    assert fit / 2 < max(sizes) <= fit


def test_a_long_prompt_does_not_shrink_the_batches_of_short_ones(policy, monkeypatch):
    """Neither in the same call nor in later ones."""
    batches = []

    def write_texts(model, processor, inputs, max_new_tokens, sampler, draws):
        batches.append((inputs["input_ids"].shape[1] > 100, sum(draws)))
        return [("x", True)] * sum(draws)

    monkeypatch.setattr(transformers_engine, "write_texts", write_texts)
    monkeypatch.setattr(transformers_engine, "largest_batch", lambda model, prompt, new: 1 if prompt > 100 else 8)
    engine = transformers_engine.TransformersEngine(*policy)
    estimate_batch_sizes(engine)
    short = [Prompt(to_answer([], 0, f"Is it {number}?"), []) for number in range(8)]
    long = Prompt(to_answer([], 0, "word " * 200), [])
    for prompts in ([long, *short], short):
        engine.write(prompts, Sampling(temperature=0.0))
    assert batches == [(True, 1), (False, 8), (False, 8)]


def test_windows_do_not_depend_on_free_memory(policy):
    """Free memory differs between processes and runs. With different windows, records would be lost."""
    model, processor = copy.deepcopy(policy[0]).to("meta"), policy[1]
    engine = transformers_engine.TransformersEngine(model, processor)
    assert engine._estimates and engine.batch_size == transformers_engine.WINDOW_BATCH_SIZE
    engine = transformers_engine.TransformersEngine(model, processor, 5)
    assert not engine._estimates and engine.batch_size == 5
    engine = transformers_engine.TransformersEngine(*policy)
    assert not engine._estimates and engine.batch_size == transformers_engine.CPU_BATCH_SIZE


def test_images_of_the_next_window_are_opened_in_the_background(images, monkeypatch):
    opened, four_are_open = [], threading.Event()
    open_images = candidates_module.open_images

    def counting(stored):
        opened.append(stored)
        if len(opened) == 4:
            four_are_open.set()
        return open_images(stored)

    def reply(prompt):
        if ast.literal_eval(prompt.stream)[1] == "r0":
            assert four_are_open.wait(timeout=30), "no images are opened while texts are written"
        return Reply("Where is the lesion?")

    monkeypatch.setattr(candidates_module, "open_images", counting)
    engine = ScriptedEngine(reply)
    engine.batch_size = 1  # windows of two records
    assert len(list(CandidateGenerator(engine).outcomes(images))) == 7


def test_an_engine_without_batches_gets_every_record_as_its_own_group(images):
    """The outcomes equal those of windows, also with an unreadable record and in a resumed run."""

    def reply(prompt):
        if kind_of(prompt) == "answer":
            return Reply(f"On side {numbers_of(prompt)[-1]}.")
        return Reply("Where is the lesion?" if numbers_of(prompt)[0] else "A lesion.")

    class CountingEngine(ScriptedEngine):
        runs = 0

        def run(self, first, then):
            self.runs += 1
            return super().run(first, then)

    broken = {"id": "broken", "images": [{"bytes": b"no image", "path": None}], "image_ids": ["0"], "messages": []}
    records = as_dataset([*(record(number) for number in range(5)), broken])
    in_windows, at_once = CountingEngine(reply), CountingEngine(reply)
    in_windows.batch_size, at_once.batch_size = 1, None
    expected = list(CandidateGenerator(in_windows, num_questions=2).outcomes(records))
    result = list(CandidateGenerator(at_once, num_questions=2).outcomes(records))
    assert in_windows.runs == at_once.runs == 1
    assert sorted(result, key=lambda outcome: outcome["id"]) == sorted(expected, key=lambda outcome: outcome["id"])
    resumed = CandidateGenerator(at_once, num_questions=2).outcomes(records, done={"r0", "r3"})
    assert {outcome["id"] for outcome in resumed} == {"r1", "r2", "r4", "broken"}


def test_only_one_window_is_opened_ahead():
    started = []
    items = (started.append(number) or number for number in range(5))
    assert [(item, len(started)) for item in ordered_map(str, items, num_workers=1, ahead=1)] == [
        ("0", 2), ("1", 3), ("2", 4), ("3", 5), ("4", 5)]  # fmt: skip


def test_too_little_memory_for_one_text_is_reported(policy, images, monkeypatch):
    def write_texts(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(transformers_engine, "write_texts", write_texts)
    with pytest.raises(UserError, match="Not enough memory for a single text.*a smaller --batch_size"):
        outcomes(policy, images)


def test_other_errors_are_raised(policy, images, monkeypatch):
    monkeypatch.setattr(transformers_engine, "write_texts", lambda *args: (_ for _ in ()).throw(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        outcomes(policy, images)


def test_longest_prompts_are_written_first(policy, monkeypatch):
    batches = []

    def write_texts(model, processor, inputs, *args):
        batches.append(inputs["attention_mask"].sum(1).tolist())
        return [("x", True)] * len(batches[-1])

    monkeypatch.setattr(transformers_engine, "write_texts", write_texts)
    texts = iter("word " * count + "?" for count in (3, 30, 9, 21))
    engine = transformers_engine.TransformersEngine(*policy, batch_size=2)
    opened = [type("Opened", (), {"image": random_image(0, (20, 16))})]
    engine.write([Prompt(to_answer([], 1, text), opened) for text in islice(texts, 4)], Sampling(temperature=0.0))
    flat = [length for batch in batches for length in batch]
    assert len(batches) == 2 and flat == sorted(flat, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_answers": 1}, "num_answers is 1"),
        ({"num_questions": 0}, "num_questions is 0"),
        ({"answer_sampling": Sampling(temperature=0.0)}, "temperature 0"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        CandidateGenerator(ScriptedEngine(None), **change)


def test_invalid_records_are_refused(policy, images):
    with pytest.raises(UserError, match="2 records have the id 'r0'"):
        outcomes(policy, images.select([0, 0]))
    with pytest.raises(UserError, match="lacks the column"):
        outcomes(policy, images.remove_columns("image_ids"))
