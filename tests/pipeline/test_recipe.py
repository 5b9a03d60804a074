# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import os
from dataclasses import dataclass

import pytest

from medst_trl.base.errors import UserError
from medst_trl.pipeline.options import actions_of, read_options
from medst_trl.pipeline.recipe import read_recipe, step_of_file
from medst_trl.pipeline.recipe_files import packaged_recipes
from medst_trl.pipeline.stage import STAGES, Stage


def write(directory, text, name="mine.yaml"):
    path = directory / name
    path.write_text(text)
    return path


def steps(directory, text, *words, which=None):
    """Return the steps of a recipe by label; `words` are the options on the command line."""
    _, options = read_options(["recipe", *words])
    return {step.label: step for step in read_recipe(write(directory, text), options).steps(which)}


FULL = """
output_dir: out
base:
prepare: {source: phantoms}
sft: {learning_rate: 1e-3}
evaluate:
"""


# Reading


@pytest.mark.parametrize(
    "text", ["", "- a\n- b", "just words", "a: [1", "a: 1\na: 2", "\t- x: 1", "sft: {seed: 1, seed: 2}"]
)
def test_an_invalid_file_is_refused_with_its_name(tmp_path, text):
    with pytest.raises(UserError, match="mine.yaml"):
        read_recipe(write(tmp_path, text))


# Settings of stages


def test_each_stage_reads_the_output_of_earlier_stages(tmp_path):
    found = steps(tmp_path, FULL)
    assert list(found) == ["base", "prepare", "sft", "evaluate"]
    assert [step.settings["output_dir"] for step in found.values()] == [f"out/{label}" for label in found]
    assert found["sft"].settings["model_name_or_path"] == "out/base"
    assert found["sft"].settings["dataset"] == ["out/prepare/instruct"]
    assert found["evaluate"].settings["model_name_or_path"] == "out/sft"
    assert found["evaluate"].settings["benchmark"] == ["out/prepare/benchmark"]


def test_inputs_follow_a_changed_output_dir(tmp_path):
    text = (
        "output_dir: out\nprepare: {source: phantoms, output_dir: /data/p}\nevaluate: {model_name_or_path: org/model}"
    )
    found = steps(tmp_path, text)
    assert found["evaluate"].settings["benchmark"] == ["/data/p/benchmark"]
    assert found["evaluate"].settings["model_name_or_path"] == "org/model"


def test_scoring_a_file_reads_nothing_from_other_sections(tmp_path):
    found = steps(tmp_path, FULL.replace("evaluate:", "evaluate: {predictions: p.jsonl}"))
    assert not {"model_name_or_path", "benchmark"} & found["evaluate"].settings.keys()


def test_base_is_evaluated_if_nothing_is_trained(tmp_path):
    assert (
        steps(tmp_path, "base:\nevaluate: {benchmark: org/b}")["evaluate"].settings["model_name_or_path"]
        == "runs/mine/base"
    )


def test_inputs_of_stages_are_settings():
    for stage in STAGES.values():
        keys = set(actions_of(stage.make_parser()))
        # `report` and `push` need no record.
        records = {"output_dir", "overwrite"} if stage.name not in ("report", "push") else set()
        named = {
            name for item in stage.inputs for name in (item.key, item.split, item.replaced_by) if name is not None
        }
        # The stages that train share patterns, some of which are for one of them or for other versions of TRL. Records
        # of `merge` and `push` by earlier versions have more settings.
        operational = set() if stage.trains else stage.operational - {"dataset", "split", "commit_message", "run"}
        assert named | records | operational <= keys


def test_a_section_that_is_a_list_runs_once_per_item(tmp_path):
    text = (
        "output_dir: out\nseed: 5\nprepare:\n  - {name: a, source: phantoms}\n  - {name: b, source: phantoms, seed: 6}"
    )
    found = steps(tmp_path, text)
    assert {label: (step.settings["output_dir"], step.settings["seed"]) for label, step in found.items()} == {
        "prepare/a": ("out/prepare/a", 5),
        "prepare/b": ("out/prepare/b", 6),
    }
    assert list(steps(tmp_path, text, which="prepare/b")) == ["prepare/b"]
    assert list(steps(tmp_path, text, which="prepare")) == ["prepare/a", "prepare/b"]
    with pytest.raises(UserError, match="section sft: .*dataset must be set"):  # two candidates, so neither is used
        steps(tmp_path, text + "\nsft: {model_name_or_path: org/model}")


def test_a_list_has_no_default_even_if_an_earlier_section_makes_the_same_kind(tmp_path):
    text = "sft: {model_name_or_path: org/model, dataset: org/data}\ndpo:\n"
    text += "".join(f"  - {{name: {name}, dataset: org/pairs}}\n" for name in ("a", "b"))
    with pytest.raises(UserError, match="section merge: model_name_or_path must be set"):
        steps(tmp_path, text + "merge:\n")


@pytest.mark.parametrize(
    "items", ["[]", "[{source: phantoms}]", "[{name: a}, {name: a}]", "[{name: a/b}]", "[{name: ..}]", "[1]", "text"]
)
def test_items_need_valid_and_unique_names(tmp_path, items):
    with pytest.raises(UserError, match="section prepare"):
        read_recipe(write(tmp_path, f"prepare: {items}"))


def test_more_specific_settings_take_precedence(tmp_path):
    text = "seed: 1\nbase:\nprepare: {source: phantoms, seed: 2}"
    seeds = lambda *words: [step.settings["seed"] for step in steps(tmp_path, text, *words).values()]  # noqa: E731
    assert seeds() == [1, 2]
    assert seeds("--seed", "3") == [3, 3]
    assert seeds("--prepare.seed=4") == [1, 4]
    assert seeds("--seed", "3", "prepare.seed=4") == [3, 4]


def test_shared_settings_apply_to_the_stages_that_have_them(tmp_path):
    found = steps(tmp_path, "warmup_steps: 7\n" + FULL)
    assert found["base"].settings["warmup_steps"] == found["sft"].settings["warmup_steps"] == 7
    assert "warmup_steps" not in found["prepare"].settings


CALLS = """
max_cost: 20
timeout: 60
key_variable: JUDGE_KEY
generate: {engine: server, base_url: http://localhost/v1, model_name_or_path: m, images: me/images, timeout: 7}
judge: {model: gpt-4o, benchmarks: []}
"""


def test_settings_of_calls_reach_other_stages_than_judge_only_by_name(tmp_path):
    """A key or a budget for the judge is not used for another server."""
    keys = ("max_cost", "timeout", "key_variable", "max_retries")

    def settings(stage, *words):
        return [steps(tmp_path, CALLS, *words)[stage].settings.get(key) for key in keys]

    assert settings("generate") == [None, 7.0, None, None]
    assert settings("judge") == [20.0, 60.0, "JUDGE_KEY", None]
    assert settings("generate", "--max_retries", "3", "--generate.max_cost", "5") == [5.0, 7.0, None, None]
    assert settings("judge", "--max_retries", "3", "--generate.max_cost", "5") == [20.0, 60.0, "JUDGE_KEY", 3]


def test_output_dir_on_the_command_line_moves_the_whole_run(tmp_path):
    found = steps(tmp_path, FULL, "--output_dir", "/scratch")
    assert [step.settings["output_dir"] for step in found.values()] == [f"/scratch/{label}" for label in found]
    assert found["sft"].settings["dataset"] == ["/scratch/prepare/instruct"]


def test_the_run_directory_is_named_after_the_recipe_by_default(tmp_path):
    assert steps(tmp_path, "base:")["base"].settings["output_dir"] == "runs/mine/base"


def test_values_have_the_types_of_the_command_line(tmp_path):
    text = "base: {warmup_steps: 1e3, learning_rate: 1, seed: '4', overwrite: no}"
    settings = steps(tmp_path, text)["base"].settings
    keys = ("warmup_steps", "learning_rate", "seed", "overwrite")
    assert [(settings[key], type(settings[key])) for key in keys] == [
        (1000, int),
        (1.0, float),
        (4, int),
        (False, bool),
    ]


def test_launch_settings_are_not_settings_of_the_stage(tmp_path):
    found = steps(
        tmp_path,
        "accelerate_config: zero2\n" + FULL,
        "--sft.num_processes",
        "4",
        "--evaluate.accelerate_config",
        "cpu",
    )
    assert (found["sft"].accelerate_config, found["sft"].num_processes) == ("zero2", 4)
    assert (found["evaluate"].accelerate_config, found["evaluate"].num_processes) == ("cpu", None)
    assert found["base"].accelerate_config is None  # `base` runs in a single process and ignores the shared setting
    assert not any("accelerate_config" in step.settings for step in found.values())


def test_env_sets_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDST_TEST_VARIABLE", "before")
    steps(tmp_path, "env: {MEDST_TEST_VARIABLE: 3}\nbase:")
    assert os.environ["MEDST_TEST_VARIABLE"] == "3"


# Errors


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("base: {warmup_stepz: 3}", [], r"section base: unknown key 'warmup_stepz'. Did you mean 'warmup_steps'\?"),
        ("warmup_stepz: 3\nbase:", [], r"'warmup_stepz' is neither .* Did you mean 'warmup_steps'\?"),
        ("evaluat: {x: 1}\nbase:", [], r"Did you mean 'evaluate'\?"),
        ("zzz: 1\nbase:", [], "'zzz' is neither a section nor a setting"),
        ("base: {warmup_steps: many}", [], "warmup_steps: 'many' is not a valid int"),
        ("base: {overwrite: perhaps}", [], r"overwrite: 'perhaps' is not a valid bool \(true or false\)"),
        ("sft: {sq_ratio: }", [], "section sft: sq_ratio has no value. Set one, or delete the key for its default"),
        ("sft:\n  model_name_or_path: {base}", [], "model_name_or_path: put a reference such as '{base}' in quotes"),
        ("generate: {num_questions: }", [], "section generate: num_questions has no value"),
        ("prepare: {source: phantom}", [], "source: Unknown source 'phantom'. Did you mean 'phantoms'"),
        ("prepare: {seed: 1}", [], "section prepare: source must be set"),
        ("prepare: {source: phantoms, accelerate_config: zero2}", [], "single process"),
        ("sft: {num_processes: some}", [], "num_processes is 'some'. It must be a whole number of at least 1"),
        ("seed: 1", [], "needs a section"),
        (
            "base:",
            ["--base.warmup_stepz", "3"],
            r"section base: unknown key 'warmup_stepz'. Did you mean 'warmup_steps'\?",
        ),
        ("base:", ["--bse.warmup_steps", "3"], r"no section 'bse'. Its sections: base. Did you mean 'base'\?"),
        ("base:", ["--warmup_stepz", "3"], r"^--warmup_stepz: no stage of .* Did you mean 'warmup_steps'\?"),
        ("base:\nenv: [A]", [], "env must map"),
        ("max_cost: 5\nevaluate:", [], r"yaml: max_cost is not shared.* section, or as --evaluate.max_cost"),
        ("evaluate:", ["--max_cost", "5"], r"max_cost is not shared.* section, or as --evaluate.max_cost"),
        ("base: {hub_token: x}", [], "secrets do not belong"),
        ("base:\nenv: {HF_TOKEN: x}", [], "secrets do not belong"),
    ],
)
def test_errors_name_their_location(tmp_path, text, words, message):
    with pytest.raises(UserError, match=message):
        steps(tmp_path, text, *words)


def test_all_mistakes_are_reported_in_one_go(tmp_path):
    text = """
wramup_steps: 3
base: {learning_rate: fast, warmup_stepz: 3}
prepare: {seed: one}
evaluate: {benchmark: b, engine: servr}
"""
    with pytest.raises(UserError) as error:
        steps(tmp_path, text, "--base.sed", "1", "--merge.dtype", "x", "--nothing", "1")
    messages = str(error.value).splitlines()
    expected = [
        "--merge.dtype: ", "'wramup_steps' is neither", "--nothing: no stage of",
        "section base: learning_rate: 'fast' is not a valid float.", "section base: unknown key 'warmup_stepz'.",
        "section base: unknown key 'sed'. Did you mean 'seed'?", "section prepare: seed: 'one' is not a valid int.",
        "section prepare: source must be set.", "section evaluate: engine: Unknown engine 'servr'.",
    ]  # fmt: skip
    assert len(messages) == len(expected), messages
    assert all(part in message for part, message in zip(expected, messages)), messages


def test_a_check_of_steps_is_reported_with_the_other_mistakes(tmp_path):
    def check(step):
        raise UserError(f"{step.where}: refused")

    with pytest.raises(UserError, match="section base: refused\n.*section prepare: source must be set"):
        read_recipe(write(tmp_path, "base:\nprepare:")).steps(check=check)


def test_options_that_the_selected_stage_does_not_take_are_named(tmp_path):
    def notes(*words, which=None):
        recipe = read_recipe(write(tmp_path, CALLS), read_options(["recipe", *words])[1])
        return list(recipe.unused_options(recipe.steps(which)))

    words = ("--max_cost", "5", "--min_margin", "2", "--seed", "1", "--output_dir", "x", "--num_processes", "2")
    assert notes(*words) == []
    assert notes(*words, which="generate") == [
        "--max_cost has no effect on generate. Use --generate.max_cost to set it.",
        "--min_margin has no effect on generate.",
    ]


def test_a_stage_without_a_section_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no section 'sft'. Its sections: base"):
        steps(tmp_path, "base:", which="sft")


@pytest.mark.parametrize("word", ["--hub_token=x", "--sft.api-key", "judge.password=x"])
def test_secrets_are_refused_on_the_command_line(word):
    with pytest.raises(UserError, match="secrets do not belong"):
        read_options(["recipe", word])


# One stage's settings from a file


def test_a_flat_file_has_the_settings_of_one_stage(tmp_path):
    path = write(tmp_path, "output_dir: x\nwarmup_steps: 3\nlearning_rate: 1e-3")
    assert step_of_file(STAGES.get("base"), path).settings == {
        "output_dir": "x",
        "warmup_steps": 3,
        "learning_rate": 1e-3,
    }
    with pytest.raises(UserError, match="unknown key 'warmup_steps'"):
        step_of_file(STAGES.get("prepare"), path)


def test_a_section_may_omit_required_settings(tmp_path):
    path = write(tmp_path, "prepare: {seed: 3}\nbase:")
    assert step_of_file(STAGES.get("prepare"), path).settings["seed"] == 3
    with pytest.raises(UserError, match="no section 'evaluate'"):
        step_of_file(STAGES.get("evaluate"), path)


def test_a_section_that_is_a_list_is_refused_for_one_stage(tmp_path):
    path = write(tmp_path, "prepare: [{name: a, source: phantoms}, {name: b, source: phantoms}]")
    with pytest.raises(UserError, match="several times. Choose with `medst run .* --stage`: prepare/a, prepare/b."):
        step_of_file(STAGES.get("prepare"), path)


# Options


def test_leading_words_are_recipes():
    options = ["--learning-rate", "-1e-4", "sft.x=1 = 2", "--prepare/vqa-rad.a", "1", "2", "--flag"]
    assert read_options(["a.yaml", "b.yaml", *options]) == (
        ["a.yaml", "b.yaml"],
        {"": {"learning_rate": "-1e-4", "flag": ()}, "sft": {"x": "1 = 2"}, "prepare/vqa-rad": {"a": ("1", "2")}},
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base.output_dir"], "section base: output_dir: expected one value, not 0"),
        (["--base.seed", "1", "2"], "section base: seed: expected one value, not 2"),
        (["--sft.dataset"], "section sft: dataset: expected one value, not 0"),
        (["--output_dir"], "--output_dir takes one value."),
        (["--sft.accelerate_config", "zero2", "zero3"], "--accelerate_config takes one value."),
    ],
)
def test_an_option_with_the_wrong_number_of_values_is_refused(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        steps(tmp_path, FULL, *words)


def test_flags_and_lists_are_converted_like_those_of_a_recipe(tmp_path):
    words = ["--sft.dataset", "a", "b", "--sft.train_vusr", "--sft.no_use_lora", "--base.overwrite"]
    found = steps(tmp_path, FULL, *words)
    settings = found["sft"].settings
    assert (settings["dataset"], settings["train_vusr"], settings["use_lora"]) == (["a", "b"], True, False)
    assert found["base"].settings["overwrite"] is True


# Packaged recipes


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_has_all_required_settings(name):
    assert read_recipe(name).steps()


# Directories of sections, and rounds


LOOP = """
output_dir: out
base:
prepare: {source: phantoms}
sft: {learning_rate: 1e-3}
generate: {max_records: 100}
judge: {oracle_error_rate: 0}
dpo: {beta: 0.2}
evaluate:
  - {name: stage_1, model_name_or_path: "{sft}"}
  - {name: aligned}
report:
push:
  - {name: data, source: "{judge}/preferences", repo_id: me/data}
"""


def test_a_section_name_in_braces_is_replaced_by_its_directory(tmp_path):
    found = steps(tmp_path, LOOP)
    assert found["evaluate/stage_1"].settings["model_name_or_path"] == "out/sft"
    assert found["evaluate/aligned"].settings["model_name_or_path"] == "out/dpo"
    assert found["push/data"].settings["source"] == "out/judge/preferences"
    assert found["report"].settings["run"] == "out"
    moved = steps(tmp_path, LOOP, "--judge.output_dir", "elsewhere", "--output_dir", "there")
    assert moved["push/data"].settings["source"] == "elsewhere/preferences"
    assert moved["evaluate/stage_1"].settings["model_name_or_path"] == "there/sft"
    with pytest.raises(UserError, match="no section 'dpo'"):
        steps(tmp_path, "sft: {model_name_or_path: a, dataset: '{dpo}'}")
    text = "prepare: [{name: a, source: phantoms}, {name: b, source: phantoms}]\nsft: {dataset: '{prepare}/instruct'}"
    with pytest.raises(UserError, match="{prepare} is a list. Name one of its items: {prepare/a}, {prepare/b}."):
        steps(tmp_path, text)


def test_other_braces_in_values_are_kept(tmp_path):
    text = "prepare: {source: pathvqa, data_path: x, image_pattern: '{split}/{image}.jpg'}"
    assert steps(tmp_path, text)["prepare"].settings["image_pattern"] == "{split}/{image}.jpg"


def test_each_round_starts_from_the_policy_of_the_previous_round(tmp_path):
    found = steps(tmp_path, LOOP, "--rounds", "3")
    loop = ["generate", "judge", "dpo", "evaluate/aligned"]
    assert list(found) == [
        "base", "prepare", "sft", "evaluate/stage_1",
        *(f"round_{number}/{name}" for number in (1, 2, 3) for name in loop), "report", "push/data",
    ]  # fmt: skip
    for number in (1, 2, 3):
        policy = "out/sft" if number == 1 else f"out/round_{number - 1}/dpo"
        generate, judge, dpo, aligned = (found[f"round_{number}/{name}"].settings for name in loop)
        assert generate["model_name_or_path"] == dpo["model_name_or_path"] == policy
        assert generate["skip_records"] == 100 * (number - 1) and generate["max_records"] == 100
        assert judge["candidates"] == f"out/round_{number}/generate/candidates"
        assert dpo["dataset"] == [f"out/round_{number}/judge/preferences"] and dpo["beta"] == 0.2
        assert aligned["model_name_or_path"] == dpo["output_dir"] == f"out/round_{number}/dpo"
    assert found["push/data"].settings["source"] == "out/round_3/judge/preferences"


def test_more_rounds_do_not_change_earlier_ones(tmp_path):
    two, three = (steps(tmp_path, LOOP, "--rounds", n) for n in "23")
    common = [label for label in two if label.startswith("round_")]
    assert common and all(two[label].settings == three[label].settings for label in common)


def test_steps_of_rounds_can_be_selected_and_configured(tmp_path):
    assert list(steps(tmp_path, LOOP, "--rounds", "2", which="round_2/dpo")) == ["round_2/dpo"]
    assert list(steps(tmp_path, LOOP, "--rounds", "2", which="dpo")) == ["round_1/dpo", "round_2/dpo"]
    assert len(steps(tmp_path, LOOP, "--rounds", "2", which="round_1")) == 4
    found = steps(tmp_path, LOOP, "--rounds", "2", "--round_2/dpo.beta", "0.5", "--dpo.seed", "7")
    assert [found[f"round_{n}/dpo"].settings["beta"] for n in (1, 2)] == [0.2, 0.5]
    assert found["round_1/dpo"].settings["seed"] == 7
    own = LOOP.replace("generate: {", "generate: {model_name_or_path: org/asks, ")
    found = steps(tmp_path, own, "--rounds", "3", "--round_3/generate.model_name_or_path", "org/better")
    models = [found[f"round_{n}/generate"].settings["model_name_or_path"] for n in (1, 2, 3)]
    assert models == ["org/asks", "out/round_1/dpo", "org/better"]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (LOOP.replace("max_records: 100", ""), ["--rounds", "2"], "max_records"),
        (LOOP, ["--rounds", "two"], "rounds is 'two'. It must be a whole number of at least 1"),
        (LOOP, ["--rounds", "2", "--generate.engine", "server"], "a server cannot switch"),
        (FULL, ["--rounds", "2"], "none of them"),
        (LOOP, ["--rounds", "2", "--dpo.output_dir", "x"], "Remove output_dir"),
        (LOOP.replace("dpo: {beta: 0.2}", "dpo: [{name: a}, {name: b}]"), ["--rounds", "2"], "not lists"),
        (LOOP, ["--rounds", "2", "--round_3/dpo.beta", "1"], "no section 'round_3/dpo'"),
        (LOOP, ["--rounds", "2", "--round_1/evaluate.seed", "1"], "no section 'round_1/evaluate'"),  # a list
        (LOOP, ["--rounds", "2", "--round_2.beta", "1"], "--round_2.beta: name a section, such as round_2/dpo"),
    ],
)
def test_rounds_that_cannot_run_are_refused(tmp_path, text, words, message):
    with pytest.raises(UserError, match=message):
        steps(tmp_path, text, *words)


def test_a_stage_without_output_dir_is_refused(tmp_path, monkeypatch):
    @dataclass
    class Arguments:
        out: str = "x"

    monkeypatch.setitem(STAGES._objects, "toy", Stage("toy", "a toy", lambda: (Arguments,), print))
    with pytest.raises(UserError, match="section toy: unknown key 'output_dir'"):
        steps(tmp_path, "toy: {out: y}")


def test_the_settings_of_a_flat_file_are_given(tmp_path):
    step = step_of_file(STAGES.get("prepare"), write(tmp_path, "source: phantoms\noutput_dir: o\nlanguage: en"))
    assert step.given == {"source", "output_dir", "language"}
