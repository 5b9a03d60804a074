# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""An HTML page about a run. This file holds the settings of the stage, so that help stays fast."""

from dataclasses import dataclass

from medst_trl.base.settings import documented


@documented
@dataclass
class ReportArguments:
    """
    Arguments of `medst report`.

    Args:
        run (`str`):
            The run directory, which contains the directories of the stages.
        output_dir (`str`, *optional*):
            Directory for index.html. Default: report in the run directory.
        title (`str`, *optional*):
            Heading of the page. Default: the name of the run directory.
        gallery (`int`, *optional*, defaults to `12`):
            Number of judged pairs (per round) and of benchmark questions to show with their images.
        bootstrap_samples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap samples for the interval of each difference; 0 for no intervals.
    """

    run: str
    output_dir: str | None = None
    title: str | None = None
    gallery: int = 12
    bootstrap_samples: int = 1000
