# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Convert a checkpoint of the original LLaVA code to the Hugging Face format: LLaVA-1.5, SQ-LLaVA, STLLaVA-Med.

```bash
medst convert \
    --source ZachSun/sqllava-7B \
    --output_dir models/sqllava-7b
```

A training output (adapter_config.json, adapter_model.bin, non_lora_trainables.bin, Vit-lora/) is merged with its base:

```bash
medst convert --source checkpoints/stllava-lora --base models/sqllava-7b --output_dir models/stllava-med-7b
```

Output in `output_dir`: a model (safetensors) and its processor. Every other command accepts it as
`model_name_or_path`. `.bin` files are read without running any code in them. If a tensor is missing, unexpected or of
the wrong shape, it is listed and nothing is written. An interrupted conversion starts again. It needs memory for the
model: 14 GB for 7B in half precision.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.settings import documented
from medst_trl.pipeline.stage import CHECKPOINT, MODEL, STAGES, Input, Output, RowCounter, Stage


if TYPE_CHECKING:
    from transformers import LlavaConfig


@documented
@dataclass
class ConvertArguments:
    """
    Arguments of `medst convert`.

    Args:
        source (`str`):
            Directory or Hub id of a full model, or of the output of LLaVA's training scripts.
        output_dir (`str`):
            Directory for the converted model.
        base (`str`, *optional*):
            Directory or Hub id of the base model of a training output, original or converted.
        projector (`str`, *optional*):
            File, directory or Hub id of a projector that is published separately (mm_projector.bin).
        vision_tower (`str`, *optional*):
            Directory or Hub id of the CLIP vision tower. Default: mm_vision_tower of config.json.
        vision_lora (`str`, *optional*):
            Directory or Hub id of the LoRA layers of the vision tower. Default: Vit-lora inside source.
        vusr_role (`str`, *optional*):
            How question turns start: text (VUSER:) or token (<vusr>, which needs training). Default: text for models
            with a prototype extractor or a ViT LoRA, which SQ-LLaVA and STLLaVA-Med have; otherwise token.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights: auto (the language model's), float32, bfloat16, float16, float64.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Maximum size of a weights file.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the output of an earlier run and start again.
    """

    source: str
    output_dir: str
    base: str | None = None
    projector: str | None = None
    vision_tower: str | None = None
    vision_lora: str | None = None
    vusr_role: str | None = None
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    overwrite: bool = False


def main(args: ConvertArguments) -> None:
    from medst_trl.interop.conversion.convert import convert_checkpoint
    from medst_trl.pipeline.record import StageRecord

    record = StageRecord.of(STAGE, args)
    if record.decision == "skip":
        return
    with record:
        converted = convert_checkpoint(args)
        record.finish(counts={"parameters": converted["parameters"]}, **converted)
    print(
        f"convert: {converted['model_type']} with the role {converted['vusr_role']}, {converted['parameters']:,} "
        f"parameters in {converted['dtype']}, in {args.output_dir}. Every tensor is accounted for: "
        f"{converted['changed']} were merged with LoRA, {converted['changed_in_vision']} of them in the vision tower, "
        f"and {len(converted['left_out'])} were left out because the model does not need them."
    )


def _config(settings: Mapping[str, Any]) -> "tuple[LlavaConfig, bool] | None":
    """
    Read the configuration of a converted model, and whether it has the text role, from the original's small files.

    Returns None if they are neither here nor on a Hub that responds. Raises for a checkpoint that cannot be converted.
    """
    from medst_trl.base.hub_ids import cached_revision, hub_answers

    from .conversion import convert

    def directory(source: str | None, what: str = "The checkpoint") -> Path | None:
        is_here = source and (Path(source).is_dir() or cached_revision(source) is not None or hub_answers())
        return convert.local_directory(source, what, weights=False) if is_here else None

    source = directory(settings["source"])
    base = directory(settings["base"]) if settings.get("base") else source
    if source is None or base is None:
        return None
    original = convert.original_config(source, base)
    tower = directory(settings.get("vision_tower") or original.get("mm_vision_tower"), "The vision tower")
    if tower is None:
        return None
    config = convert.llava_config(original, convert.vision_config(tower), original.get("vocab_size", 32000))
    has_vision_lora = bool(settings.get("vision_lora")) or (source / convert.VISION_LORA).is_dir()
    return config, (settings.get("vusr_role") or convert.default_role(config, has_vision_lora)) == "text"


def plan(counter: RowCounter, args: ConvertArguments) -> Iterator[tuple[str, str]]:
    """Yield the stage's rows in a plan."""
    yield "reads", args.source + (f" on {args.base}" if args.base else "")


STAGE = STAGES.register(
    Stage(
        name="convert",
        summary="convert an original LLaVA, SQ-LLaVA or STLLaVA-Med checkpoint to the Hugging Face format",
        help=__doc__,
        arguments=lambda: (ConvertArguments,),
        main=main,
        plan=plan,
        inputs=tuple(Input(key, CHECKPOINT) for key in ("source", "base", "projector", "vision_tower", "vision_lora")),
        outputs=(Output("", MODEL, config=_config, is_published=False),),
    )
)
