# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks compute their figures correctly; no test depends on measured times."""

import itertools
import json
from dataclasses import replace

import bench_dpo
import bench_generate
import bench_sft
import pytest
import torch
import whole_recipe
from flops import Layout, forward, weights_of
from measure import Machine, PeakMemory, Row, Run, alternate, bytes_of, markdown
from shapes import (
    SHAPES,
    answer_lengths,
    build_model,
    build_processor,
    conversations,
    known_words,
    preference_pairs,
    unlabeled_images,
)
from steps import check_equal, copy_model, copy_trained, perturb
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count


TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
MACHINE = Machine(
    "a machine", "float32", 1, matmul_flops=1e9, bytes_per_second=1e9, data_sheet_flops=None, versions={}
)
aten = torch.ops.aten
# CPU operations that the counter does not know: attention, and in-place addition of products.
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *args, **kwargs: sdpa_backward_flop_count(g, q, k, v)
    ),
    aten.addmm_: lambda target, left, right, **kwargs: mm_flop(left, right),
}


@pytest.fixture(scope="module")
def processor():
    return build_processor(TINY)


FULL = bench_dpo.Setting(TINY, CPU, "short", batch_size=2, batches=1)
LORA = replace(FULL, shape=replace(TINY, lora=True))
# The settings of a GPU.
HALF = replace(LORA, shape=replace(TINY, lora=True, dtype=torch.bfloat16), gradient_checkpointing=True)


def make_trainers(setting, directory) -> dict:
    model = build_model(setting.shape, build_processor(setting.shape), CPU).requires_grad_(not setting.shape.lora)
    return bench_dpo.make_trainers(setting, model, str(directory))


def test_variants_run_alternately_in_changing_order():
    log = []

    def variant(name):
        return lambda: log.append(name) or Run(float(len(log)), units=1)

    runs = alternate({name: variant(name) for name in ("stock", "ours", "cached")}, repeats=3)
    assert log == ["stock", "ours", "cached", "cached", "ours", "stock", "stock", "ours", "cached"]
    assert [run.seconds for run in runs["ours"]] == [2.0, 5.0, 8.0]


def test_ratios_are_taken_within_a_repetition():
    """In the last repetition, the machine is three times as slow, which does not change the ratios."""
    stock = [Run(4, 2, waited=2), Run(8, 2, waited=4), Run(12, 2, waited=6)]
    ours = [Run(4, 4, waited=0), Run(4, 4, waited=0), Run(12, 4, waited=0)]
    row = Row("what", "ours", "pair", 10, ours, stock, flops=1e9, floor_seconds=0.5)
    assert (row.speedup.median, row.speedup.least, row.speedup.greatest) == (2.0, 2.0, 4.0)
    assert row.speedup_without_data.median == 1.0
    figures = row.as_json(MACHINE)
    assert figures["seconds"] == {"median": 1.0, "least": 1.0, "greatest": 3.0}
    assert figures["tokens_per_second"] == 10
    assert figures["share_of_measured_peak"] == 1.0
    assert figures["floor_over_time"] == 0.5
    assert figures["peak_bytes"] is None
    table = markdown({"bench": "B", "settings": {}, "machine": vars(MACHINE), "rows": [figures]})
    assert "| 1000 [1000, 3000] per pair | 2 [2, 4] | 1 |" in table.replace("1e+03", "1000")


def test_shared_memory_is_counted_once():
    tensor = torch.zeros(8)
    assert bytes_of([tensor, tensor[2:], torch.zeros(4)], CPU) == 48


def test_the_memory_of_other_models_is_not_counted(monkeypatch):
    """200 bytes are allocated before, 64 of them by this model; the peak is 350 bytes."""
    for name, value in {"memory_allocated": 200, "max_memory_allocated": 350, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr("measure.bytes_of", lambda tensors, device: sum(tensor.nbytes for tensor in tensors))
    with PeakMemory(torch.device("cuda"), lambda: [torch.zeros(16)]) as memory:
        pass
    assert memory.peak_bytes == 214
    with PeakMemory(CPU, lambda: [torch.zeros(16)]) as memory:
        pass
    assert memory.peak_bytes is None


@pytest.mark.parametrize("answers", ["80", "gpt", "short"])
def test_pairs_have_the_given_lengths(processor, answers):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    lengths = list(itertools.islice(itertools.cycle(answer_lengths(answers)), 4))
    dataset = preference_pairs(TINY, processor, lengths, 4)
    batch = DataCollatorForVisionPreference(processor)([dataset[number] for number in range(4)])
    answer_tokens = batch["completion_mask"].sum(1)
    assert answer_tokens.tolist() == [chosen for chosen, _ in lengths] + [rejected for _, rejected in lengths]
    assert (batch["attention_mask"].sum(1) - answer_tokens).tolist() == [TINY.image_tokens + 24] * 8
    assert (batch["input_ids"][:, 0] == processor.tokenizer.bos_token_id).all()


def test_conversations_have_the_given_lengths(processor):
    dataset = conversations(TINY, processor, 2, turns=[[9, 3, 5, 1], [4, 2]])
    texts = [[m["content"][-1]["text"] for m in messages] for messages in dataset["messages"]]
    assert [[len(text.split()) for text in turns] for turns in texts] == [[9, 3, 5, 1], [4, 2]]
    words = {word for turns in texts for text in turns for word in text.split()}
    assert words <= set(known_words(processor))


def test_lengths_are_read_from_a_file(tmp_path):
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps([[12, 9], [3, 4]]))
    assert answer_lengths(str(file)) == [(12, 9), (3, 4)]


def test_recorded_answers_have_the_documented_lengths():
    assert all(80 <= length <= 150 for pair in answer_lengths("gpt") for length in pair)
    assert sorted(chosen for chosen, _ in answer_lengths("short"))[16] < 10


def test_copies_share_weights_but_not_modules():
    model = build_model(TINY, build_processor(TINY), CPU)
    shared, separate = copy_model(model, share_weights=True), copy_model(model, share_weights=False)
    assert shared.lm_head is not model.lm_head
    assert shared.lm_head.weight is model.lm_head.weight
    assert separate.lm_head.weight is not model.lm_head.weight
    perturb(separate)
    assert not torch.equal(separate.lm_head.weight, model.lm_head.weight)


def test_models_that_train_different_weights_are_not_compared():
    model = build_model(TINY, build_processor(TINY), CPU)
    other = copy_model(model, share_weights=False)
    other.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="lm_head"):
        copy_trained(model, other)


def test_losses_that_differ_stop_a_benchmark():
    assert "same loss within 1.0e-06" in check_equal({"stock": 0.5, "ours": 0.500001}, torch.float32)
    with pytest.raises(ValueError, match="more than 2e-05"):
        check_equal({"stock": 0.693, "ours": 0.6931}, torch.float32)
    with pytest.raises(ValueError):
        check_equal({"stock": 0.693, "ours": float("nan")}, torch.float32)


@pytest.mark.parametrize("setting", [FULL, LORA], ids=["full", "lora"])
def test_operations_equal_those_that_torch_counts(setting, tmp_path):
    setting = replace(setting, variants=("stock", "ours"))
    for variant, trainer in make_trainers(setting, tmp_path).items():
        batch = lambda t=trainer: t._prepare_inputs(  # noqa: E731
            t.data_collator([t.train_dataset[number] for number in range(2)])
        )
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch())  # the first batch is computed in both layouts and compared
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            trainer.compute_loss(trainer.model, batch()).backward()
        needed, executed = bench_dpo.operations(setting, trainer, variant)
        assert counter.get_total_flops() == pytest.approx(executed, rel=2e-3), variant
        assert needed < executed


def test_operations_of_a_reference_equal_those_of_the_base_model(tmp_path):
    shape = replace(TINY, lora=True)
    setting = bench_dpo.Setting(shape, CPU, "80", batch_size=2, batches=1, variants=("stock",))
    trainer = make_trainers(setting, tmp_path)["stock"]
    base = build_model(shape, build_processor(shape), CPU)
    assert weights_of(trainer.model, with_adapter=False).all == weights_of(base).all
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad and p.ndim == 2)
    assert sum(weights_of(trainer.model).trained.values()) == trained


def test_operations_of_a_prompt_equal_those_that_torch_counts(processor):
    model = build_model(TINY, processor, CPU)
    tokens = torch.tensor([[processor.image_token_id] * TINY.image_tokens + [7] * 12])
    pixels = torch.zeros(1, 3, TINY.vision["image_size"], TINY.vision["image_size"])
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter, torch.no_grad():
        model(input_ids=tokens, pixel_values=pixels)
    counted = forward(model.config, weights_of(model), Layout(1, [tokens.shape[1]], tokens.shape[1]))
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("setting", [FULL, HALF], ids=["full", "half"])
def test_dpo_compares_equal_losses(setting):
    """`measure` raises if the losses differ. The policy differs from its reference, or the check would be trivial."""
    model = build_model(setting.shape, build_processor(setting.shape), CPU).requires_grad_(not setting.shape.lora)
    rows = bench_dpo.measure(setting, model, MACHINE, repeats=1)
    assert [row.variant for row in rows] == list(bench_dpo.VARIANTS)
    stock_loss = float(rows[0].notes.partition("(stock ")[2].partition(",")[0])
    assert abs(stock_loss - 0.6931472) > 1e-3
    stock, ours, cached = (row.executed_flops for row in rows)
    assert stock > ours > cached
    assert all(run.units == 2 for row in rows for run in row.runs)


def test_sft_compares_equal_losses(tmp_path, capsys):
    result = bench_sft.main(
        ["--shape", "tiny", "--repeats", "1", "--batches", "1", "--output", str(tmp_path / "sft.json")]
    )
    rows = {row["way"]: row for row in result["rows"]}
    assert set(rows) == set(bench_sft.VARIANTS)
    assert "same loss" in rows["stock"]["notes"]
    assert len({row["flops"] for row in rows.values()}) == 1
    assert json.loads((tmp_path / "sft.json").read_text()) == result
    assert "| ours, packed |" in capsys.readouterr().out


def test_every_text_has_the_requested_number_of_tokens():
    from medst_trl.policy.loading import prepare_policy

    own_processor = build_processor(TINY)
    model = prepare_policy(build_model(TINY, own_processor, CPU), own_processor).eval()
    bench_generate.suppress_terminators(model, own_processor)
    lengths, outputs = bench_generate.Lengths(5, 7), []
    generate = model.generate

    def counted(*args, **kwargs):
        output = generate(*args, **kwargs)
        outputs.append(output)
        return output

    model.generate = counted
    bench_generate.one_text_per_batch(model, own_processor, unlabeled_images(2), lengths)
    terminators = torch.tensor(model.generation_config.eos_token_id)
    assert len(outputs) == 6
    assert not any(torch.isin(output[:, -5:], terminators).any() for output in outputs)
    assert all(int(output[:, -5:].max()) < len(own_processor.tokenizer) for output in outputs)


def test_the_floor_of_generation_is_below_that_of_batch_1(tmp_path):
    file = tmp_path / "generate.json"
    bench_generate.main(["--shape", "tiny", "--repeats", "1", "--output", str(file)])
    one, ours = json.loads(file.read_text())["rows"]
    assert (one["way"], ours["way"]) == ("batch 1", "ours")
    assert [one["runs"][0]["units"], ours["runs"][0]["units"]] == [2, 3]
    assert ours["floor_seconds"] < one["floor_seconds"]
    assert ours["flops"] < one["flops"]


def make_result(bench: str, rows: list[tuple], device: str = "a GPU") -> dict:
    rows = [
        {
            "what": what,
            "way": variant,
            "unit": "unit",
            "seconds": {"median": seconds},
            "tokens_per_second": 100,
            "once_seconds": 0.09 if "cached" in variant else 0.0,
        }
        for what, variant, seconds in rows
    ]
    return {"bench": bench, "machine": {"device": device}, "settings": {"shape": "llava_7b"}, "rows": rows}


def test_the_whole_recipe_multiplies_counts_and_measured_times(tmp_path, capsys):
    results = {
        "SFT": [("a", "stock", 0.36), ("a", "ours", 0.30), ("a", "ours, packed", 0.18)],
        "Generation": [("b", "batch 1", 7.2), ("b", "ours", 0.36)],
        "DPO": [
            ("c, checkpointing", "stock", 0.9), ("c, checkpointing", "ours", 0.5), ("c", "stock", 0.72),
            ("c", "ours", 0.36), ("c", "ours, cached", 0.27), ("short", "ours", 0.1),
        ],
    }  # fmt: skip
    files = []
    for bench, rows in results.items():
        files.append(tmp_path / f"{bench}.json")
        files[-1].write_text(json.dumps(make_result(bench, rows)))
    whole_recipe.main(list(map(str, files)))
    printed = capsys.readouterr().out
    # 37,000 x 0.18 s, 10,000 x 0.36 s, 10,000 x 0.36 s; and 37,000 x 0.36 s, 10,000 x 7.2 s, 10,000 x 0.72 s
    assert "| total | | | 3.85 | 25.70 |" in printed
    assert "stage 1, SFT (48%), questions and answers (26%)" in printed
    # With one epoch, caching costs as much as it saves; with three, it saves time: 3 x 0.27 s + 0.09 s
    whole_recipe.main([*map(str, files), "--dpo_epochs", "3"])
    assert (
        "| 10,000 x 3 | 270 ms per unit and 90 once, 100 tokens/s | 2.50 | 6.00 (stock) |" in capsys.readouterr().out
    )

    with pytest.raises(SystemExit, match="No result of DPO"):
        whole_recipe.main(list(map(str, files[:2])))
    files[2].write_text(json.dumps(make_result("DPO", results["DPO"], device="another GPU")))
    with pytest.raises(SystemExit, match="different devices"):
        whole_recipe.main(list(map(str, files)))


@pytest.mark.parametrize("script", [bench_dpo, bench_sft, bench_generate, whole_recipe])
def test_help_shows_a_command(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert f"python tests/benchmarks/{script.__name__}.py" in capsys.readouterr().out
