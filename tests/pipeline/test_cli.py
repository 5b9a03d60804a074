# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny_run
from accelerate.utils import is_deepspeed_available
from commands import without_launcher
from jsonl import write_prediction

from medst_trl.base.errors import Interrupted, UserError
from medst_trl.cli import guarded, main
from medst_trl.cli import run_launched as run_recipe
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.pipeline import launch
from medst_trl.pipeline.launch import (
    CONFIGS,
    check_launched,
    find_config,
    launch_command,
    use_one_gpu,
)
from medst_trl.pipeline.options import actions_of
from medst_trl.pipeline.stage import STAGES


ONE_CPU = {
    name: value for name, value in without_launcher(os.environ).items() if not name.startswith("CUDA_VISIBLE_DEVICES")
} | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TWO_CPUS = ONE_CPU | {"ACCELERATE_USE_CPU": "true"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]

# Evaluating a predictions file needs no model and can run in several processes; `prepare` runs in one.
RECIPE = """\
#!/usr/bin/env -S python -m medst_trl
# Two stages that take seconds.
output_dir: out
prepare:
  source: phantoms
  num_phantoms: 4
  num_test_phantoms: 2
evaluate:
  predictions: predictions.jsonl
  bootstrap_samples: 0
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prediction(tmp_path / "predictions.jsonl")
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    path.chmod(0o755)
    return path


def run(*command, env=ONE_CPU, **kwargs):
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=120, **kwargs)


def medst(*arguments, **kwargs):
    return run(sys.executable, "-m", "medst_trl.cli", *arguments, **kwargs)


def status(directory):
    return json.loads((directory / "stage.json").read_text())["status"]


# Help and errors


def test_help_imports_no_heavy_package_and_lists_every_command():
    code = """
import sys
from medst_trl.cli import main
for argv in (["--help"], ["run", "--help"], ["recipes", "--help"], ["recipes", "ls"], ["--version"]):
    assert main(argv) == 0
heavy = {"torch", "transformers", "trl", "accelerate", "datasets", "peft", "pyarrow", "numpy"}
print(heavy & set(sys.modules))
"""
    result = run(sys.executable, "-c", code)
    assert result.stdout.splitlines()[-1] == "set()", result.stderr
    assert all(f"  {name} " in result.stdout for name in (*STAGES, "run", "recipes"))


def test_help_of_a_stage_does_not_import_torch():
    code = """
import sys
from medst_trl.cli import main
from medst_trl.pipeline.stage import STAGES
for stage in STAGES:
    assert main([stage, "--help"]) == 0
    assert not {"torch", "datasets", "accelerate"} & set(sys.modules), stage
"""
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert "--config" in result.stdout and "--num_phantoms" in result.stdout and "--sq_ratio" in result.stdout


def test_validate_prints_one_message_for_each_problem(capsys):
    assert main(["recipes", "validate", "demo"]) == 0
    assert capsys.readouterr().out.endswith("demo.yaml is valid.\n")
    assert main(["recipes", "validate", "demo", "--sft.learning_rat", "1"]) == 2
    assert "section sft: unknown key 'learning_rat'. Did you mean 'learning_rate'?" in capsys.readouterr().err
    assert main(["recipes", "validate", "demo", "--sft.max_grad_norm", "many"]) == 2  # a setting of transformers
    assert "section sft: max_grad_norm: 'many' is not a valid float" in capsys.readouterr().err


MISSING = "report_to no_such_logger: no_such_logger is not supported"


def test_packages_that_a_later_stage_lacks_are_named_before_the_first_one(recipe, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    recipe.write_text(RECIPE + "sft:\n  model_name_or_path: base\n  report_to: no_such_logger\n")
    assert main(["run", "mine.yaml"]) == 2
    assert MISSING in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["recipes", "validate", "mine.yaml"]) == 0 and MISSING in capsys.readouterr().out
    assert main(["run", "mine.yaml", "--stage", "prepare", "--dry_run"]) in (None, 0)


@pytest.mark.parametrize("setting", ["accelerator_config", "fsdp_config", "deepspeed"])
def test_a_missing_file_that_a_setting_names_is_no_traceback(recipe, setting):
    needed = ["--model_name_or_path", "base", "--dataset", "data", "--output_dir", "out", "--fsdp", "full_shard"]
    result = medst("sft", *needed, f"--{setting}", "no_such.json")
    named = "deepspeed" if setting == "deepspeed" and not is_deepspeed_available() else "no_such.json"
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert named in result.stderr.strip().splitlines()[-1]


def test_help_of_dpo_names_its_dataset(capsys):
    assert main(["dpo", "--help"]) == 0
    assert "preference pairs (`medst judge`) for dpo" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_help_lists_common_settings_and_help_all_lists_every_setting(stage, capsys):
    assert main([stage, "--help"]) == 0
    common = capsys.readouterr().out
    assert main([stage, "--help", "all"]) == 0
    complete = capsys.readouterr().out
    assert ("--beta" in common and "--loss_weights" in common and "--label_smoothing" in common) == (stage == "dpo")
    assert "--learning_rate" in common and "--adam_beta2" not in common and "--help all" in common
    assert "--learning_rate" in complete and "--adam_beta2" in complete and len(complete) > 2 * len(common)
    listed = actions_of(STAGES.get(stage).make_parser(is_listing=True))
    actions = actions_of(STAGES.get(stage).make_parser())
    assert listed.keys() < actions.keys() and len(listed) < len(actions) / 2
    for key, action in listed.items():
        real = actions[key]
        assert (action.default, action.required, action.nargs) == (real.default, real.required, real.nargs), key
        if action.type in (int, float):
            assert real.type is action.type, key


def test_help_leaves_out_the_negative_spelling_of_flags(capsys):
    for stage in ("generate", "sft"):
        assert main([stage, "--help"]) == 0
        text = capsys.readouterr().out
        assert not re.search(r"--no[-_](?!x )", text) and "`medst --help` explains" in text
    assert main(["--help"]) == 0 and "--no_x turns off a flag x" in capsys.readouterr().out
    parser = STAGES.get("generate").make_parser()
    words = ["--model_name_or_path", "m", "--images", "i", "--output_dir", "o"]
    assert parser.parse_args(words).english_questions
    assert not parser.parse_args([*words, "--no_english_questions"]).english_questions


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sfft"], "Unknown command 'sfft'. Did you mean 'sft'?"),
        (["base", "--output_dri", "x"], "unknown key 'output_dri'. Did you mean 'output_dir'?"),
        (["base"], "required: --output_dir"),
        (["base", "--output_dir", "x", "--warmup_steps", "many"], "warmup_steps: 'many' is not a valid int"),
        (["base", "--output_dir", "x", "--warmup_step", "3"], "Did you mean 'warmup_steps'?"),  # no abbreviations
        (["base", "stray"], "unknown option 'stray'"),
        (["base", "--output_dir", "x", "stray"], "output_dir: expected one value, not 2"),
        (["base", "--output_dir"], "output_dir: expected one value, not 0"),
        (["prepare", "--output_dir", "x", "--source", "phantoms", "--num_processes", "2"], "single process"),
        (["base", "--config"], "--config takes one value."),
        (["evaluate", "--machine_rank", "1"], "unknown key 'machine_rank'"),  # of `accelerate launch`
        (["base", "--api_key=very-secret"], "secrets do not belong"),
        (["run", "no_such_recipe"], "no such file or packaged recipe"),
        (["run", "a.yaml", "b.yaml"], "takes one recipe, not 2"),
        (["run", "--stage", "sft"], "takes one recipe, not 0"),
        (["recipes", "rm", "demo"], "Unknown command: medst recipes rm demo"),
        (["recipes", "validate"], "medst recipes validate takes one recipe, not 0."),
        (["recipes", "show"], "Unknown command: medst recipes show. See `medst recipes --help`."),
    ],
)
def test_an_invalid_command_prints_one_message_to_stderr(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and "Traceback" not in err and "very-secret" not in err
    assert out == ""


def test_errors_are_mapped_to_exit_codes(capsys):
    def raising(error):
        def function():
            raise error

        return function

    assert guarded(lambda: None) == 0
    assert guarded(lambda: 5) == 5
    assert guarded(raising(UserError("what to do"))) == 2
    assert guarded(raising(KeyboardInterrupt())) == 130
    assert guarded(raising(OSError(errno.ENOSPC, "No space left on device"))) == 2
    assert "disk is full" in capsys.readouterr().err
    with pytest.raises(OSError):
        guarded(raising(OSError(errno.EIO, "an unexpected error")))


def test_recipes_are_listed_shown_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "mini.yaml").write_text(RECIPE)
    (recipes / "mini.yaml").chmod(0o755)
    monkeypatch.setattr("medst_trl.pipeline.recipe_files.RECIPES", recipes)
    assert main(["recipes", "ls"]) == 0
    assert capsys.readouterr().out.split(None, 1) == ["mini", "Two stages that take seconds.\n"]
    assert main(["recipes", "show", "mini"]) == 0
    assert capsys.readouterr().out == RECIPE
    assert main(["recipes", "cp", "mini"]) == 0
    assert (tmp_path / "mini.yaml").read_text() == RECIPE and os.access(tmp_path / "mini.yaml", os.X_OK)
    assert main(["recipes", "cp", "mini"]) == 2  # refused: the copy may have been edited


def test_the_list_of_recipes_has_a_name_and_a_summary_per_line(capsys):
    assert main(["recipes", "ls"]) == 0
    for line in capsys.readouterr().out.splitlines():
        name, _, summary = line.partition("  ")
        assert summary.strip() and " " not in name


# One stage


@pytest.mark.parametrize("stage", STAGES)
def test_commands_in_the_help_have_line_breaks(stage, capsys):
    assert main([stage, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.partition("\n\n")[0].splitlines()) < 4  # the first paragraph says what the stage does
    _, *blocks = text.split("```")
    for line in "".join(blocks[::2]).splitlines():  # an unescaped backslash in the docstring would join the lines
        assert "    --" not in line.lstrip(), line


def test_a_stage_runs_in_this_process_with_overridden_settings(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["prepare", "--config", "mine.yaml", "--num_phantoms", "3", "--output_dir", "elsewhere"]) == 0
    settings = json.loads((tmp_path / "elsewhere" / "stage.json").read_text())["settings"]
    assert (settings["num_phantoms"], settings["num_test_phantoms"]) == (3, 2)


def test_a_setting_of_another_source_is_named(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["prepare", "--config", "mine.yaml", "--output_dir", "elsewhere", "--language", "en"]) == 0
    note = "Note: medst prepare: language is ignored: it is a setting of the source slake, and source is phantoms.\n"
    assert capsys.readouterr().err == note


def test_an_accelerate_config_starts_the_launcher(monkeypatch):
    started = []
    monkeypatch.setattr(launch, "run", lambda command, environment: started.append((command, environment)) or 0)
    argv = [
        "evaluate",
        "--predictions",
        "p",
        "--output_dir",
        "o",
        "--accelerate_config",
        "cpu",
        "--num_processes=2",
    ]
    assert main(argv) == 0
    ((command, environment),) = started
    program = command.index("-m", 2)
    assert command[program:] == ["-m", "medst_trl.cli", *argv]
    options = command[:program]
    assert options[options.index("--num_processes") + 1] == "2"
    assert environment["ACCELERATE_USE_CPU"] == "true" and str(find_config("multi_gpu")) in options


# A run


def test_run_runs_each_stage_and_skips_finished_ones(recipe, tmp_path, monkeypatch, capfd):
    for name, value in ONE_CPU.items():
        monkeypatch.setenv(name, value)

    def medst_run(*options):
        return main(["run", "mine.yaml", *options]), *capfd.readouterr()

    code, out, err = medst_run()
    assert code == 0, err
    assert out.index("=== prepare (1 of 2) -> out/prepare") < out.index("=== evaluate (2 of 2)")
    assert status(tmp_path / "out" / "prepare") == status(tmp_path / "out" / "evaluate") == "complete"
    assert "nothing to do" in medst_run("--stage", "prepare")[1]
    code, out, err = medst_run()
    skipped = [line for line in out.partition("\nDone.")[0].splitlines() if line and not line.startswith("===")]
    assert skipped == [f"{x}: out/{x} is finished and unchanged, nothing to do." for x in ("prepare", "evaluate")]
    planned = medst_run("--dry_run", "--prepare.num_phantoms", "5")[1]
    assert "prepare: would be refused: num_phantoms: 4 before, 5 now\n" in planned
    assert "evaluate: already finished" in planned

    code, out, err = medst_run("--prepare.num_phantoms", "5")
    assert code == 2
    assert "num_phantoms: 4 before, 5 now" in err and "Traceback" not in err
    assert "Stopped in prepare." in err
    assert "Correct the error above. To resume, run the same command again, without --overwrite." in err
    assert "=== evaluate" not in out
    code, out, err = medst_run("--stage", "prepare", "--prepare.num_phantoms", "5", "--overwrite")
    assert code == 0, err


def test_a_failed_run_says_how_to_continue_without_overwriting_and_prints_no_password(recipe, monkeypatch, capsys):
    monkeypatch.setattr(launch, "run", lambda command, environment: 1)
    assert main(["run", "mine.yaml", "--evaluate.base_url", "http://user:hunter2@localhost:8000/v1"]) == 1
    out, err = capsys.readouterr()
    assert err.endswith("To resume, run the same command again, without --overwrite.\n")
    assert "hunter2" not in out + err


@pytest.mark.parametrize(("answer", "is_run"), [("y\n", True), ("n\n", False), ("", False), (None, True)])
def test_overwriting_every_stage_is_confirmed_on_a_terminal(recipe, tmp_path, monkeypatch, capsys, answer, is_run):
    stdin, ran = io.StringIO(answer), []
    stdin.isatty = lambda: answer is not None
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(launch, "run", lambda command, environment: ran.append(command) or 0)
    assert main(["run", "mine.yaml", "--overwrite"]) == 0  # there is nothing to delete
    (tmp_path / "out" / "prepare").mkdir(parents=True)
    (tmp_path / "out" / "prepare" / "stage.json").write_text("{}")
    capsys.readouterr()
    ran.clear()
    assert main(["run", "mine.yaml", "--overwrite"]) == (0 if is_run else 2)
    out, err = capsys.readouterr()
    assert len(ran) == (2 if is_run else 0)
    assert ("--overwrite deletes these results:\n  out/prepare\nDelete" in out) == (answer is not None)
    assert ("Nothing was deleted." in err) == (not is_run)
    ran.clear()
    assert main(["run", "mine.yaml", "--overwrite", "--stage", "prepare"]) == 0 and len(ran) == 1
    assert "deletes" not in capsys.readouterr().out


def test_the_dry_run_lists_what_overwrite_replaces(recipe, tmp_path, capsys):
    (tmp_path / "out" / "prepare").mkdir(parents=True)
    (tmp_path / "out" / "prepare" / "stage.json").write_text("{}")
    assert main(["run", "mine.yaml", "--dry_run"]) == 0
    assert "replaces" not in capsys.readouterr().out
    assert main(["run", "mine.yaml", "--dry_run", "--overwrite"]) == 0
    assert capsys.readouterr().out.count("  replaces    the results in out/prepare\n") == 1


def test_what_a_later_stage_refuses_is_reported_before_the_first_runs(recipe, monkeypatch, capsys):
    recipe.write_text(f"{RECIPE}judge: {{candidates: c, model: m, base_url: localhost}}\n")
    monkeypatch.setattr(launch, "run", lambda command, environment: pytest.fail("a stage has started"))
    assert main(["run", "mine.yaml", "--prepare.max_records", "0", "--evaluate.bootstrap_samples", "few"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "section prepare: max_records is 0. It must be at least 1." in lines[0]
    assert "section judge: base_url must start with http:// or https://" in lines[1]
    assert "section evaluate: bootstrap_samples: 'few' is not a valid int" in lines[2] and len(lines) == 3


def test_an_option_that_the_selected_stage_does_not_take_is_named(recipe, monkeypatch, capsys):
    monkeypatch.setattr(launch, "run", lambda command, environment: 0)
    assert main(["run", "mine.yaml", "--stage", "evaluate", "--num_phantoms", "5"]) == 0
    assert capsys.readouterr().err == "Note: --num_phantoms has no effect on evaluate.\n"
    assert main(["run", "mine.yaml", "--num_phantoms", "5"]) == 0
    assert capsys.readouterr().err == ""


def test_the_summary_of_a_run_aligns_labels_and_directories(recipe, monkeypatch, capsys):
    name = "a_name_that_is_longer_than_others"
    recipe.write_text(
        f"output_dir: out\nprepare: {{source: phantoms}}\nevaluate:\n- {{name: {name}, predictions: p.jsonl}}\n"
    )
    monkeypatch.setattr(launch, "run", lambda command, environment: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["run", "mine.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split() for line in lines] == [[x, f"out/{x}"] for x in ("prepare", f"evaluate/{name}")]
    assert len({line.index("out/") for line in lines}) == 1


def test_an_error_in_the_last_section_is_reported_before_the_first_stage_runs(recipe, tmp_path):
    recipe.write_text(RECIPE + "  bootstrap_sample: 3\n")
    result = medst("run", "mine.yaml")
    assert result.returncode == 2
    assert "section evaluate: unknown key 'bootstrap_sample'. Did you mean 'bootstrap_samples'?" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["recipes", "ls"], ["prepare", "--help"], ["run", "--help"]])
def test_a_launched_process_takes_the_same_commands_as_medst(argv, capsys):
    assert run_recipe(argv) in (None, 0)
    by_module = capsys.readouterr().out
    assert main(argv) == 0 and capsys.readouterr().out == by_module != ""


def test_run_is_refused_under_a_launcher(recipe):
    result = medst("run", "mine.yaml", env=ONE_CPU | {"TORCHELASTIC_RUN_ID": "x"})
    assert result.returncode == 2 and "accelerate launch -m medst_trl mine.yaml" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_stops_its_child_processes(number):
    code = """
import sys
from medst_trl.cli import guarded
from medst_trl.pipeline.launch import run
grandchild = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
sys.exit(guarded(run, [sys.executable, "-c", child], {}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    grandchild = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    deadline = time.monotonic() + 10
    while _alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(grandchild)


PASSING_ON = """
import sys
from medst_trl.pipeline.launch import run
child = '''
import os, signal, time
received = []
def write(line):  # not by print, which a signal may interrupt
    os.write(1, f"{line}\\\\n".encode())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: (received.append(number), write(int(number))))
write("ready")
while len(received) < LIMIT:
    time.sleep(0.05)
raise SystemExit(7)
'''
sys.exit(run([sys.executable, "-c", child], {}))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("limit, sent, code", [(1, 1, 7), (2, 2, 7), (9, 3, 128 + signal.SIGKILL)])
def test_a_stage_can_save_its_work_after_a_signal_and_a_third_one_kills_it(number, limit, sent, code):
    process = subprocess.Popen(
        [sys.executable, "-c", PASSING_ON.replace("LIMIT", str(limit))], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    for remaining in reversed(range(sent)):
        process.send_signal(number)
        assert not remaining or process.stdout.readline() == f"{int(number)}\n"
    assert process.wait(timeout=30) == code


def test_a_logout_that_sends_several_kinds_of_signals_does_not_kill_a_stage():
    stage = PASSING_ON.replace("LIMIT", "3")
    process = subprocess.Popen([sys.executable, "-c", stage], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        assert process.stdout.readline() == f"{int(number)}\n"
    assert process.wait(timeout=30) == 7


def test_a_signal_while_a_stage_is_being_started_reaches_it():
    code = """
import os, signal, subprocess, sys
from medst_trl.pipeline import launch
start = subprocess.Popen
def start_slowly(*arguments, **options):
    process = start(*arguments, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    return process
subprocess.Popen = start_slowly
sys.exit(launch.run([sys.executable, "-c", "import time; time.sleep(60)"], {}))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 128 + signal.SIGTERM


def test_an_interrupted_command_ends_with_how_to_resume_it(monkeypatch, capsys):
    stops = [KeyboardInterrupt(), Interrupted(128 + signal.SIGTERM), KeyboardInterrupt(), KeyboardInterrupt()]

    def interrupt(stage, argv):
        raise stops.pop(0)

    monkeypatch.setattr("medst_trl.cli._stage", interrupt)
    argv = ["sft", "--output_dir", "two words", "--overwrite", "--lora_r=3", "--train_vusr"]
    assert main(argv) == 130
    message = "error: interrupted. To resume, run the same command again, without --overwrite.\n"
    assert capsys.readouterr().err == message
    assert main(argv) == 143 and capsys.readouterr().err == message
    monkeypatch.setenv("MEDST_RUN", "sft")  # `medst run` prints it
    assert main(argv) == 130 and capsys.readouterr().err == "error: interrupted.\n"
    monkeypatch.setenv("RANK", "1")
    assert main(argv) == 130 and capsys.readouterr().err == ""


@pytest.mark.parametrize("label", [None, "round_2/judge"])
def test_in_a_recipe_a_message_about_overwrite_names_the_stage(label, monkeypatch, capsys):
    def refuse(stage, argv):
        raise UserError("No pair is left. Add --overwrite.")

    monkeypatch.setattr("medst_trl.cli._stage", refuse)
    if label:
        monkeypatch.setenv("MEDST_RUN", label)
    assert main(["judge"]) == 2
    assert f"Add {f'--stage {label} ' if label else ''}--overwrite." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_training_resumes_where_it_stopped(tmp_path, number, processes):
    model, processor = tiny_llava(**tiny_run.SMALL)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    data = tiny_run.write_instruct(tmp_path / "instruct", range(8))
    sft = {"model_name_or_path": str(tmp_path / "base"), "dataset": data, "max_steps": 200, "logging_steps": 1}
    sft |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "lora_r": 2, "save_steps": 150}
    (tmp_path / "mine.yaml").write_text(json.dumps({"output_dir": str(tmp_path / "run"), "sft": sft}))
    command = [sys.executable, "-m", "medst_trl.cli", "run", "mine.yaml", "--num_processes", str(processes)]
    start = {
        "cwd": tmp_path, "env": ONE_CPU, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    }  # fmt: skip
    process = subprocess.Popen(command, **start)
    while "'loss'" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, printed
    assert printed.count("error: interrupted") == 1 and "Traceback" not in printed
    step = re.search(r"Saved .*checkpoint-(\d+), after step \1 of 200", printed)[1]
    assert printed.strip().endswith("To resume, run the same command again, without --overwrite.")
    resumed = subprocess.run(command, **start, timeout=300).stdout
    assert f"Resuming after step {step} of 200." in resumed and "Done." in resumed


def test_an_interrupted_launch_prints_no_traceback(tmp_path):
    (tmp_path / "waits.py").write_text("import time; print('started', flush=True); time.sleep(60)")
    command = [sys.executable, "-m", "medst_trl.pipeline.launch", "--cpu", "--num_processes", "1", "waits.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ONE_CPU, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "simple_launcher" not in errors  # the traceback of the script itself is its own


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Under a launcher


def test_two_processes_run_a_stage_together(recipe, tmp_path):
    """The recipe sets `num_processes: 2`, so a stage fails if it runs with another number of processes."""
    recipe.write_text(RECIPE + "  num_processes: 2\n  accelerate_config: cpu\n")
    words = ("--num_processes", 2, "-m", "medst_trl", "mine.yaml", "--stage", "evaluate")
    result = run(*LAUNCH, "--multi_gpu", *words, env=TWO_CPUS)
    assert result.returncode == 0, result.stderr
    assert status(tmp_path / "out" / "evaluate") == "complete"


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": 2},
        {"WORLD_SIZE": 2},
        {"WORLD_SIZE": 1, "LOCAL_RANK": 0},
    ],
)
def test_several_stages_in_one_launch_are_refused(recipe, launcher, monkeypatch, variables):
    recipe.write_text("output_dir: out\nsft: {model_name_or_path: m, dataset: d}\ndpo: {dataset: p}\nmerge:\n")
    ran = []
    monkeypatch.setattr("medst_trl.cli._run", lambda step: ran.append(step.label))
    run_recipe(["mine.yaml"])
    assert ran == ["sft", "dpo", "merge"]
    launcher(**variables)
    with pytest.raises(UserError, match=r"selects sft, dpo, merge. .* --stage, or use `medst run mine.yaml`"):
        run_recipe(["mine.yaml"])
    run_recipe(["mine.yaml", "--stage", "dpo"])
    assert ran[3:] == ["dpo"]


def test_a_recipe_is_executable(recipe, tmp_path):
    bin_directory = os.path.dirname(sys.executable)
    env = ONE_CPU | {"PATH": f"{bin_directory}:{os.environ['PATH']}"}
    result = run(
        *LAUNCH,
        "--config_file",
        find_config("cpu"),
        "--no_python",
        "./mine.yaml",
        "--stage",
        "evaluate",
        "--seed",
        "4",
        env=env,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "evaluate" / "stage.json").read_text())["settings"]["seed"] == 4


def test_a_stage_for_one_process_is_refused_in_a_launch_of_several(recipe, launcher):
    launcher(WORLD_SIZE=2)
    with pytest.raises(UserError, match="only one that supports them. This command selects prepare\\."):
        run_recipe(["mine.yaml", "--stage", "prepare"])


def test_without_a_launcher_all_stages_of_one_recipe_run_in_this_process(recipe, launcher, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("medst_trl.cli._run", lambda step: ran.append(step.label))
    assert run_recipe(["mine.yaml"]) == 0 and ran == ["prepare", "evaluate"]
    with pytest.raises(UserError, match="python -m medst_trl takes one recipe, not 2."):
        run_recipe(["mine.yaml", "mine.yaml"])


def test_all_ranks_read_the_same_record_and_return_the_exit_code(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text("""
import os, sys
from dataclasses import dataclass
from medst_trl.cli import guarded
from medst_trl.pipeline.record import StageRecord
from medst_trl.pipeline.stage import Stage
@dataclass
class Settings:
    seed: int
    output_dir: str = "out"
def main(seed):
    record = StageRecord.of(Stage("x", "a test", tuple, print), Settings(seed))
    open(f"{record.decision}-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}", "w")
    record.finish()
guarded(main, 0) or sys.exit(guarded(main, 1))
""")
    command, environment = launch_command(["stage"], "cpu", 2)
    result = run(*command, env=ONE_CPU | environment | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert {"start-0-of-2", "start-1-of-2"} <= set(os.listdir(tmp_path)), result.stderr
    assert result.returncode == 2 and "seed: 0 before, 1 now" in result.stderr
    assert "Traceback" not in result.stderr


# Launching


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_loads_each_config(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.use_cpu == (path.stem == "cpu")
    assert path.read_text().startswith("# ")


@pytest.fixture
def launcher(monkeypatch):
    """Return a function that sets the environment variables of a launcher in this process."""
    for name in set(os.environ) - set(without_launcher(os.environ)):
        monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(name, str(value)) for name, value in variables.items()]


ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": 3, "WORLD_SIZE": 4}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2, "WORLD_SIZE": 4}


@pytest.mark.parametrize(
    ("variables", "config", "count", "matches"),
    [
        ({}, "cpu", None, True),
        ({}, "single_gpu", None, True),
        ({}, "multi_gpu", None, False),
        ({"WORLD_SIZE": 2}, "multi_gpu", None, True),
        ({"WORLD_SIZE": 2}, "multi_gpu", 4, False),
        ({"WORLD_SIZE": 2}, "single_gpu", None, False),
        ({"WORLD_SIZE": 2}, "cpu", 2, True),
        ({"WORLD_SIZE": 2}, None, 2, True),
        ({}, None, 2, False),
        (ZERO3, "zero3", None, True),
        (ZERO3, "zero2", None, False),
        (ZERO3, "multi_gpu", None, False),
        (FSDP2, "fsdp2", 4, True),
        (FSDP2, "zero3", None, False),
        (ZERO3, None, None, True),
    ],
)
def test_a_launcher_that_does_not_match_the_config_is_refused(launcher, variables, config, count, matches):
    launcher(**variables)
    if matches:
        check_launched(config, count, "recipe")
    else:
        with pytest.raises(UserError, match="recipe: .* but this runs as"):
            check_launched(config, count, "recipe")


def test_several_processes_for_a_config_of_one_are_refused_with_the_section(launcher):
    launcher(WORLD_SIZE=2)
    with pytest.raises(UserError, match="^r.yaml, section sft: accelerate_config single_gpu is for one process"):
        check_launched("single_gpu", 2, "r.yaml, section sft")


@pytest.mark.parametrize(
    ("gpus", "config", "count", "file", "processes"),
    [
        (0, None, None, "cpu", "1"),
        (0, None, 2, "multi_gpu", "2"),
        (0, "cpu", 2, "multi_gpu", "2"),
        (1, None, None, "single_gpu", "1"),
        (4, None, None, "single_gpu", "1"),
        (4, None, 2, "multi_gpu", "2"),
        (4, "multi_gpu", None, "multi_gpu", "4"),
        (4, "zero3", 2, "zero3", "2"),
        (1, "zero2", None, "zero2", "1"),
    ],
)
def test_the_number_of_processes_depends_on_the_number_of_gpus(monkeypatch, gpus, config, count, file, processes):
    monkeypatch.setattr(launch, "gpu_count", lambda: gpus)
    monkeypatch.setattr(launch, "has_deepspeed", lambda: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command, environment = launch_command(["program"], config, count)
    assert command[command.index("--config_file") + 1] == str(find_config(file))
    assert command[command.index("--num_processes") + 1] == processes
    assert (environment.get("ACCELERATE_USE_CPU") == "true") == (gpus == 0 and processes == "2")
    assert int(environment["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize(
    ("gpus", "config", "count"),
    [(0, "multi_gpu", None), (0, "zero2", None), (1, "multi_gpu", None), (4, "single_gpu", 2)],
)
def test_a_config_that_does_not_fit_the_machine_is_refused(monkeypatch, gpus, config, count):
    monkeypatch.setattr(launch, "gpu_count", lambda: gpus)
    with pytest.raises(UserError, match=f"accelerate_config {config}"):
        launch_command(["program"], config, count)


def test_a_config_is_a_file_or_a_known_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: 'NO'\n")
    assert find_config(str(path)) == path
    with pytest.raises(UserError, match="Did you mean 'zero2'"):
        find_config("zero_2")


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "0"), ("2,3", "2"), ("", ""), ("GPU-abc,GPU-def", "GPU-abc")]
)
def test_a_single_process_uses_one_gpu(launcher, monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    launcher(WORLD_SIZE=2)
    use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_closed_stdout_is_silent_and_other_broken_pipes_are_raised():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m medst_trl.cli recipes show demo | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout in ("141\n", "0\n") and not done.stderr  # 0: everything was written before `true` ended

    def raise_broken_pipe():
        raise BrokenPipeError("a worker died")

    with pytest.raises(BrokenPipeError):
        guarded(raise_broken_pipe)
