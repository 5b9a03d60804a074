# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A small stage-1 or stage-2 run under FSDP2 on CPU ranks. accelerate does not support FSDP2 on CPUs, so the ranks
are declared as GPU ranks.

`accelerate launch --config_file fsdp2.yaml --num_processes 2 tests/fsdp_on_cpus.py tiny_run OUTPUT_DIR '{...}'`
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from medst_trl.base.processes import leave_peers


PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))

if __name__ == "__main__":
    module, output_dir, overrides = sys.argv[1:]
    trainer = import_module(module).make_trainer(output_dir, **json.loads(overrides), ddp_backend="gloo")
    trainer.train()
    trainer.save_model(str(Path(output_dir, "saved")))
    if trainer.accelerator.is_main_process:
        facts = {"kind": str(trainer.accelerator.distributed_type), "log": trainer.state.log_history}
        Path(output_dir, "run.json").write_text(json.dumps(facts))
    trainer.accelerator.wait_for_everyone()
    del trainer  # it holds the process group
    leave_peers()
