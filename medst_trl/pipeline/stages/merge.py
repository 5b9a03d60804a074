# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Merge an adapter into its base model. The result is a stand-alone model for servers and other tools.

```bash
medst merge --model_name_or_path runs/vqa_rad/dpo --output_dir runs/vqa_rad/merged
transformers serve runs/vqa_rad/merged
```

Output in `output_dir`: safetensors, processor, chat template and generation config. Plain transformers, `load_policy`
and servers can load them, and `medst push` publishes them. Before the files get their final names, the model is loaded
from disk and compared with the adapter, both for answers and for questions. The comparison uses the first
conversations that the adapter was trained on, or images of noise if that data is not on this machine. In float32, no
log-probability may differ by more than 1e-4. In a smaller type, the limit is three times the rounding error of that
type in the adapter itself. `stage.json` has the differences.

Merging runs on the CPU and needs memory for the model in float32: 28 GB for 7B. An adapter trained on a 4-bit base is
merged into the published base, which differs from the one it was trained on: evaluate the result. The saved sampling
defaults are for answers (temperature 0.2). To let the model ask, send temperature 1.2.
"""

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError, number_of
from medst_trl.base.settings import check_bounds, documented
from medst_trl.data.loading import load_records
from medst_trl.data.schema import dialogue
from medst_trl.pipeline.lineage import trained_on, write_training_images
from medst_trl.pipeline.record import StageRecord, read_record
from medst_trl.pipeline.stage import MODEL, STAGES, Input, Output, Stage


if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin


@documented
@dataclass
class MergeArguments:
    """
    Arguments of `medst merge`.

    Args:
        model_name_or_path (`str`):
            Directory or Hub id of an adapter.
        output_dir (`str`):
            Directory for the merged model.
        base_model_name_or_path (`str`, *optional*):
            Base model of the adapter, if it has moved.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the saved weights: float32, bfloat16, float16, or auto (the type of the base).
        num_examples (`int`, *optional*, defaults to `4`):
            Number of records for the comparison.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Maximum size of a weights file.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run code from the repository of the base model. Use it only with models you trust.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Publish the model and its card on the Hub.
        hub_model_id (`str`, *optional*):
            Hub repository to publish to, OWNER/NAME.
        hub_private_repo (`bool`, *optional*, defaults to `True`):
            Make the repository private.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the output of an earlier run and start again.
    """

    model_name_or_path: str
    output_dir: str
    base_model_name_or_path: str | None = None
    dtype: str = "auto"
    num_examples: int = 4
    max_shard_size: str = "5GB"
    trust_remote_code: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = True
    overwrite: bool = False


def check(args: MergeArguments) -> None:
    """Raise a `UserError` if nothing would be compared."""
    check_bounds(args, at_least={"num_examples": 1})


def main(args: MergeArguments) -> None:
    check(args)
    record = StageRecord.of(STAGE, args)
    if record.decision == "skip":
        return

    from medst_trl.hub.cards import write_card
    from medst_trl.policy.merging import merge_policy

    trained = read_record(args.model_name_or_path)
    with record:
        examples, source = _examples(args, trained)
        merged = merge_policy(
            args.model_name_or_path,
            args.output_dir,
            examples,
            batches_of=batches_of,
            base_model_name_or_path=args.base_model_name_or_path,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            trust_remote_code=args.trust_remote_code,
        )
        write_training_images(args.output_dir, (), args.model_name_or_path)
        merged["trained_in_4bit"] = bool(trained.get("settings", {}).get("load_in_4bit"))
        record.finish(
            counts={"parameters": merged["parameters"], "examples": merged["proof"]["examples"]},
            metrics={name: merged["proof"][name] for name in ("float32_difference", "stored_difference")},
            merged=merged,
            trained_on=trained_on(args.output_dir),
        )
    write_card(args.output_dir)
    proof = merged["proof"]
    print(
        f"merge: {merged['parameters']:,} parameters in {merged['dtype']}, in {args.output_dir}. Log-probabilities "
        f"differ from the adapter's by at most {proof['stored_difference']:.1e} "
        f"({number_of(proof['examples'], 'conversation')}, {source})."
    )


def _examples(args: MergeArguments, trained: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return the first conversations that the adapter was trained on, or about noise, and where they are from."""
    dataset = (trained.get("inputs", {}).get("dataset") or [{}])[0].get("path")
    if dataset is not None and Path(dataset).is_dir():
        split = trained.get("settings", {}).get("train_split") or "train"
        with suppress(UserError):  # the directory holds something else today
            records = load_records(dataset, split, identify=False)
            if examples := list(islice(filter(None, map(_conversation, records)), args.num_examples)):
                return examples, dataset
    return drawn_examples(args.num_examples), "images of noise"


def _conversation(row: dict[str, Any]) -> dict[str, Any] | None:
    if "chosen" in row:
        row = row | {"messages": [*row["prompt"], *row["chosen"]]}
    messages = row.get("messages") or ()
    if not row.get("images") or not any(message["role"] == "assistant" for message in messages):
        return None
    return {"id": row.get("id", ""), "images": row["images"], "messages": messages}


def drawn_examples(count: int = 2) -> list[dict[str, Any]]:
    """Generate conversations about images of noise: predictions are compared, not their meaning."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)) for _ in range(count)]
    messages = dialogue([("What does the scan show?", "A large bright lesion in the upper left quadrant.")], 1)
    return [{"id": f"noise-{n}", "images": [image], "messages": messages} for n, image in enumerate(images)]


def batches_of(processor: "ProcessorMixin", examples: Sequence[dict[str, Any]]) -> list[dict[str, "torch.Tensor"]]:
    """
    Collate each example as in training: once as a conversation to answer, once with its questions as `<vusr>` turns.

    Raises:
        UserError: if no example has an answer.
    """
    import torch

    from medst_trl.training.collator import DataCollatorForSelfQuestioning

    processor = deepcopy(processor)
    collators = [DataCollatorForSelfQuestioning(processor, sq_ratio=ratio) for ratio in (0.0, 1.0)]
    batches = [collator([example]) for example in examples for collator in collators]
    batches = [batch for batch in batches if (batch["labels"] != -100).any()]
    if not batches:
        raise UserError("The examples have no answer to compare. ")
    return [  # without what the collator reports for the trainer
        {name: value for name, value in batch.items() if torch.is_tensor(value) and name != "question_mask"}
        for batch in batches
    ]


STAGE = Stage(
    name="merge",
    summary="merge an adapter into a stand-alone model for servers and other tools",
    help=__doc__,
    after=("dpo",),
    arguments=lambda: (MergeArguments,),
    check=check,
    main=main,
    inputs=(
        Input("model_name_or_path", MODEL, accepts=lambda stage, output: stage.trains is not None),
        Input("base_model_name_or_path", MODEL, has_default=False),
    ),
    outputs=(Output("", MODEL, merges="model_name_or_path"),),
    # Version 0.1.0 had the settings dataset and split, for the comparison.
    operational=frozenset({"max_shard_size", "push_to_hub", "hub_model_id", "hub_private_repo", "dataset", "split"}),
)
STAGES.register(STAGE)
