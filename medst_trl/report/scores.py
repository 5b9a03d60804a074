# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
All evaluations of a run side by side, and the changes since the one before preference training.

Which policy an evaluation is about follows from the records: the stages that made the evaluated model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medst_trl.base.errors import UserError
from medst_trl.evaluation.contamination import CONTAMINATION_FILE, Contamination
from medst_trl.evaluation.metric import METRICS, FigurePath, setting_names
from medst_trl.evaluation.predictions import OWN_FORMAT, PREDICTIONS_FILE, read_predictions
from medst_trl.evaluation.scores_file import Leaf, Scores, ScoresFile, align, format_change, score_files, tenths
from medst_trl.evaluation.scoring import compare_vqa, iter_figures

from .charts import Bar, bar_chart
from .run_directory import Run, StageRun
from .text import relative_path, sentence, words


PREFERENCE, SUPERVISED, BASE, EXTERNAL = 2, 1, 0, -1  # the last training of the run that led to a model


class Evaluation:
    """
    One `scores.json`.

    Args:
        run ([`Run`]): The run.
        stage ([`StageRun`]): The stage that wrote it.
        directory (`pathlib.Path`): Its directory.
        file ([`~medst_trl.evaluation.scores_file.ScoresFile`]): Its content.

    Attributes:
        label (`str`): `"aligned"`, `"round 2/aligned"`: its directory without what all have in common.
        run ([`StageRun`]): The stage that wrote it.
        trained (`list` of [`StageRun`]): The training stages of the run that led to the model, the last one first.
        level (`int`): `PREFERENCE` or `SUPERVISED`, `BASE` for a model that the run did not train, `EXTERNAL` if that
            is on a server or its predictions were given.
        round (`int`): The round that made the model.
        contamination ([`~medst_trl.evaluation.contamination.Contamination`]): What the benchmark shares with the
            training data of the model.
        sort_key (`tuple`): The model that training started from is first, others follow by level, `EXTERNAL` last.
        benchmark (`str`): The benchmark, in words.
        key (`tuple`): Data and split by content: evaluations of one key can be compared.
        changes (`dict`): Metric and path to a figure with `difference` and `difference_interval`, against the
            evaluation before training.
    """

    def __init__(self, run: Run, stage: StageRun, directory: Path, file: ScoresFile):
        content = file.content
        data, split = content.get("data") or {}, content.get("split")
        source = str(content.get("benchmark") or content.get("predictions") or "predictions")
        parts = [part for part in run.name(directory).split("/") if part != stage.stage.name]
        self.run, self.directory, self.file = stage, directory, file
        self.label = words("/".join(parts)) or stage.stage.name
        made = run.lineage(stage, str(content.get("model") or content.get("predictions") or ""))
        self.trained = [one for one in made if one.stage.trains]
        self.round = (self.trained or [stage])[0].round
        trainings = [] if self.trained else run.select(lambda stage: bool(stage.trains))
        is_base = any(_model_names(stage) & _model_names(training) for training in trainings)
        item = stage.stage.input("model_name_or_path")
        is_loaded = item is not None and bool(item.names(stage.settings))  # neither on a server nor a predictions file
        if self.trained:
            self.level = PREFERENCE if any(one.stage.repeats for one in self.trained) else SUPERVISED
        else:
            self.level = BASE if made or is_base or is_loaded else EXTERNAL
        order = run.stages.index(made[0]) if made else 0
        self.sort_key = (self.level == EXTERNAL, self.level, not is_base, self.round, order, stage.started)
        self.contamination = Contamination.read(directory / CONTAMINATION_FILE) or Contamination()
        self.benchmark = relative_path(source, run.directory) + (f", split {split}" if split else "")
        self.key = (data.get("sha256") or data.get("revision") or source, split)
        self.changes: dict[tuple[str, FigurePath], Leaf] = {}


class Comparison:
    """
    Evaluations of one benchmark, each compared with the one before preference training.

    Args:
        run ([`Run`]): The run.
        evaluations (`list` of [`Evaluation`]): Sorted by their `sort_key`.
        bootstrap_samples (`int`): Bootstrap samples for the intervals of differences.

    Attributes:
        benchmark (`str`): The benchmark, in words.
        headline ([`Evaluation`]): That of the policy of the last round. Of several, the first: others are ablations.
        before ([`Evaluation`]): What the others are compared with: the policy before preference training, if possible
            the one from which that of the headline was trained; else the first.
        compared (`list` of [`Evaluation`]): Those with differences, which are paired question by question.
        metrics (`list[str]`): Names of the metrics; the first one is shown in charts and controls.
    """

    def __init__(self, run: Run, evaluations: list[Evaluation], bootstrap_samples: int):
        self.benchmark, self.evaluations = evaluations[0].benchmark, evaluations
        rounds = [evaluation.run.round for evaluation in evaluations]
        for evaluation in evaluations:  # `round 1/aligned` is `round 1` if the round has no other evaluation
            if (number := evaluation.run.round) and rounds.count(number) == 1:
                evaluation.label = f"round {number}"
        rank = max((e.level, e.round) for e in evaluations)
        newest = [e for e in evaluations if (e.level, e.round) == rank]
        is_aligned = rank[0] == PREFERENCE
        self.headline = newest[0] if is_aligned else newest[-1]  # later preference trainings of a round are ablations
        supervised = [e for e in evaluations if is_aligned and e.level == SUPERVISED]
        ancestors = [e for e in supervised if e.trained == self.headline.trained[-len(e.trained) :]]
        self.before = (ancestors[-1:] or supervised or evaluations)[0]
        self.metrics = list(dict.fromkeys(metric for e in evaluations for metric in e.file.scores))
        for evaluation in evaluations[evaluations.index(self.before) + 1 :]:
            evaluation.changes = _changes(run, self.before, evaluation, bootstrap_samples)
        self.compared = [evaluation for evaluation in evaluations if evaluation.changes]

    def first(self, metric: str, path: FigurePath) -> ScoresFile:
        """The first file that has a figure, for its label, n and majority baseline."""
        return next(e.file for e in self.evaluations if path in e.file.scores.get(metric, {}))

    def rows(self, metric: str) -> list[FigurePath]:
        """Figures that any evaluation lists, those of question types last."""
        found = dict.fromkeys(path for evaluation in self.evaluations for path in evaluation.file.shown(metric))
        return sorted(found, key=lambda path: path[0] == "question_types")

    def has_majority(self, metric: str) -> bool:
        return any("majority" in self.first(metric, path).scores[metric][path] for path in self.rows(metric))

    def charted(self) -> list[tuple[str, FigurePath]]:
        """Return the figures for charts: those of the first metric, and those of the others that it does not have."""
        found: dict[FigurePath, str] = {}
        for metric in self.metrics:
            for path in self.rows(metric):
                if path[0] != "question_types" and self.first(metric, path).about(metric, path).get("in_chart"):
                    found.setdefault(path, metric)
        return [(metric, path) for path, metric in found.items()]

    def last_by_round(self, metric: str, path: FigurePath) -> dict[int, Leaf]:
        """Return a figure of the last evaluation of each round."""
        found = [(e.round, e.file.leaf(metric, path)) for e in self.evaluations if e.level != EXTERNAL]
        return {number: leaf for number, leaf in found if leaf}

    def charts(self) -> Iterator[Markup]:
        """Draw a chart for each figure, with the headline's controls and the majority baseline."""
        for metric, path in self.charted():
            bars = [_bar(e.label, e.file.scores, metric, path) for e in self.evaluations]
            controls = self.headline.file.controls.items()
            bars += [_bar(f"{control} images", scores, metric, path, muted=True) for control, scores in controls]
            first, unit = self.first(metric, path), f"percent ({words(metric)}), with 95% intervals"
            leaf = first.scores[metric][path]
            title = f"{sentence(first.label(metric, path))}, {leaf['n']:,} questions"
            mark = None if leaf.get("majority") is None else (leaf["majority"], "majority baseline")
            yield bar_chart(title, list(filter(None, bars)), unit=unit, limits=(0, 100), mark=mark)

    def terminal_table(self) -> str:
        """Format the figures before and after for the terminal."""
        metric = self.metrics[0]
        rows = [["", "n", *(e.label for e in self.evaluations)]]
        rows[0] += [f"{e.label} - {self.before.label}" for e in self.compared]
        for path in self.rows(metric):
            values = [(e.file.leaf(metric, path) or {}).get("value") for e in self.evaluations]
            changes = [format_change(e.changes.get((metric, path), {})) for e in self.compared]
            first = self.first(metric, path)
            n = str(first.scores[metric][path]["n"])
            rows.append([first.label(metric, path), n, *map(tenths, values), *changes])
        return "\n".join([f"{self.benchmark} ({words(metric)}, %, differences with 95% intervals)", *align(rows)])


def _bar(label: str, scores: Scores, metric: str, path: FigurePath, muted: bool = False) -> Bar | None:
    leaf = scores.get(metric, {}).get(path)
    return Bar(label, leaf["value"], leaf["interval"], muted) if leaf and leaf["n"] else None


def read_comparisons(run: Run, bootstrap_samples: int) -> list[Comparison]:
    """Read all complete evaluations, and compare those of each benchmark: first those on which training shows."""
    found = []
    for stage in run.select(lambda stage: stage.makes("predictions")):
        for path in score_files(stage.directory):
            if (content := run.read_json(path)) is None:
                continue
            try:
                found.append(Evaluation(run, stage, path.parent, ScoresFile(content, run.name(path))))
            except UserError as error:
                run.notes.append(str(error))
        if not any(evaluation.run is stage for evaluation in found):
            run.notes.append(f"{stage.name} has no scores yet ({stage.state}).")
    groups: dict[tuple, list[Evaluation]] = {}
    for evaluation in sorted(found, key=lambda evaluation: evaluation.sort_key):
        groups.setdefault(evaluation.key, []).append(evaluation)
    comparisons = [Comparison(run, group, bootstrap_samples) for group in groups.values()]
    return sorted(comparisons, key=lambda comparison: -comparison.headline.level)


def _model_names(stage: StageRun) -> set[str]:
    """Return what identifies the model that a stage read: its name, and the hash of its files."""
    name, sources = stage.settings.get("model_name_or_path"), stage.record.get("inputs", {}).get("model_name_or_path")
    hashes = [item.get("sha256") for item in sources or () if isinstance(item, dict)]
    return {str(name).partition("@")[0] for name in (name, *hashes) if name}


def read_answers(run: Run, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Return the predictions of an evaluation by id; empty, with a note, if they cannot be read."""
    try:
        records, _ = read_predictions(evaluation.directory / PREDICTIONS_FILE, OWN_FORMAT)
        return {str(row["id"]): row for row in records}
    except (UserError, KeyError):
        path = run.name(evaluation.directory / PREDICTIONS_FILE)
        note = f"{path} is missing or damaged, so its answers and their differences are left out."
        if note not in run.notes:
            run.notes.append(note)
        return {}


def _changes(run: Run, before: Evaluation, after: Evaluation, bootstrap_samples: int) -> dict:
    """Compute differences, paired question by question; empty if the predictions of one side are missing."""
    sides = [read_answers(run, evaluation).values() for evaluation in (after, before)]
    shared = after.file.scores.keys() & before.file.scores.keys() & set(METRICS)  # a plugin may not be loaded
    changes = {}
    for metric in shared if all(sides) else ():
        recorded = after.file.content["scores"][metric]
        settings = {name: recorded.get(name) for name in setting_names(METRICS.get(metric))}
        try:
            compared = compare_vqa(*sides, metric, bootstrap_samples=bootstrap_samples, **settings)
        except UserError:
            run.notes.append(f"{after.label} and {before.label} did not answer the same questions: no differences.")
            return {}
        changes |= {(metric, path): leaf for path, leaf in iter_figures(compared)}
    return changes
