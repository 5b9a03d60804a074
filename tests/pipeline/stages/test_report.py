# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import made_run
import pytest

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stages.report import STAGE, main
from medst_trl.report import ReportArguments


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    phantoms = made_run.prepare(run, 4)
    made_run.evaluate(run, "evaluate/stage_1", phantoms, "sft", 0.5)
    return run


def test_the_page_is_written_again_when_the_run_has_new_results(run, capsys):
    args = ReportArguments(run=str(run), bootstrap_samples=20)
    main(args)
    page = run / "report" / "index.html"
    first = page.read_text(encoding="utf-8")
    assert "exact match" in capsys.readouterr().out
    phantoms = made_run.make_phantoms(4, seed=0, split="test")
    made_run.evaluate(run, "evaluate/aligned", phantoms, "dpo", 0.9)
    main(args)
    printed = capsys.readouterr().out
    assert "aligned - stage 1" in printed and str(page) in printed
    assert page.read_text(encoding="utf-8") != first
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_notes_about_damaged_files_are_printed(run, capsys):
    (run / "evaluate" / "stage_1" / "scores.json").write_text("{")
    main(ReportArguments(run=str(run)))
    assert "report: evaluate/stage_1/scores.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"gallery": -1}, {"bootstrap_samples": -1}])
def test_settings_below_their_minimum_are_refused(run, change):
    with pytest.raises(UserError, match=next(iter(change))):
        main(ReportArguments(run=str(run), **change))
    assert not (run / "report").exists()


def test_a_report_imports_no_torch(run, tmp_path):
    code = (
        "import sys; from medst_trl.pipeline.stages.report import ReportArguments, main;"
        f"main(ReportArguments(run={str(run)!r}, output_dir={str(tmp_path / 'out')!r}, bootstrap_samples=5));"
        "print('IMPORTED', [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "IMPORTED []" in done.stdout
    assert (tmp_path / "out" / "index.html").is_file()


def test_the_parser_has_defaults_and_help():
    (args,) = STAGE.make_parser().parse_args_into_dataclasses(["--run", "runs/demo"])
    assert (args.run, args.output_dir) == ("runs/demo", None)
    assert "index.html" in STAGE.make_parser().format_help()
