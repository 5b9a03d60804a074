# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the SLURM example on a simulated cluster, whose two nodes are this machine."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from commands import without_launcher
from jsonl import write_prediction


SCRIPT = Path(__file__).parents[2] / "examples" / "slurm_several_nodes.sh"
# Like SLURM's srun: start one task per node with its SLURM_NODEID, and fail if a task fails.
SRUN = """\
#!/bin/bash
shift  # --kill-on-bad-exit
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
for task in $tasks; do wait $task || exit 1; done
"""
SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.1\\n'\n"
RECIPE = """\
# The scores of a predictions file.
output_dir: out
evaluate:
  predictions: predictions.jsonl
  bootstrap_samples: 0
  num_processes: 2
"""


@pytest.mark.slow
def test_two_nodes_take_part_in_one_stage(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    write_prediction(tmp_path / "predictions.jsonl")
    config = tmp_path / "ddp.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: 'no'\n"
                      "rdzv_backend: static\nsame_network: true\nnum_machines: 1\nmachine_rank: 0\n")  # fmt: skip
    environment = without_launcher(os.environ) | {
        "PATH": f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "MEDST_PROCESSES_PER_NODE": "1", "MEDST_ACCELERATE_CONFIG": str(config),
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip
    for job in random.sample(range(10_000), 3):  # another program may use the port, which depends on the job
        done = subprocess.run(
            ["bash", SCRIPT, "mine.yaml", "evaluate", "--seed", "4"],
            env=environment | {"SLURM_JOB_ID": str(job)}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if not re.search("EADDRINUSE|address already in use", done.stderr, re.IGNORECASE):
            break
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "evaluate" / "stage.json").read_text())
    assert record["status"] == "complete" and record["settings"]["seed"] == 4


def test_the_script_uses_valid_options_of_slurm_and_accelerate():
    text = SCRIPT.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert {"nodes", "gpus-per-node", "requeue"} <= options.keys()
    assert options["ntasks-per-node"] == "1"  # accelerate starts the processes of a node
    launch = text[text.index("exec accelerate launch") : text.index("-m medst_trl")]
    assert set(re.findall(r"--\w+", launch)) <= set(launch_command_parser()._option_string_actions)
