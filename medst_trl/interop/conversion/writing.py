# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's weights on disk, shard by shard: no more than one shard is in memory."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError
from medst_trl.policy.families import family_of

from .names import published_name


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def staging_folder(output_dir: Path, sources: tuple[str | None, ...], settings: tuple[str, ...]) -> Path:
    """A folder for the files until all are there. Only the same conversion goes on with what it holds."""
    for source in filter(None, sources):
        if output_dir.is_dir() and Path(source).exists() and output_dir.samefile(source):
            raise UserError(f"{output_dir} is what is read. Choose another output_dir.")
    digest = hashlib.sha256(json.dumps([*sources, *settings]).encode()).hexdigest()
    staging = output_dir / f".saving-{digest[:16]}"
    if not staging.is_dir():  # whatever model is there, none of it may be taken for this one's
        for path in [output_dir / "config.json", *output_dir.glob("model*.safetensors*")]:
            path.unlink(missing_ok=True)
        for other in output_dir.glob(".saving-*"):
            shutil.rmtree(other)
        staging.mkdir(parents=True)
    return staging


def write_weights(
    folder: Path,
    model: "PreTrainedModel",
    read: "Callable[[str], torch.Tensor]",
    dtype: "torch.dtype",
    max_shard_size: str,
    is_written: Callable[[str], bool],
) -> None:
    """
    Writes safetensors shards and their index.

    Args:
        folder (`Path`): Folder to write to.
        model ([`~transformers.PreTrainedModel`]): The model on the meta device.
        read (`Callable`): From a name in the model to its weight.
        dtype (`torch.dtype`): Type to write.
        max_shard_size (`str`): Largest size of a shard, such as `"5GB"`.
        is_written (`Callable`): Whether an earlier run has finished a file of this name.

    Raises:
        UserError: for a weight that is not finite, or not so in this type.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    # Names published for LLaVA are of no use where only transformers with medst_trl loads the model.
    is_own = family_of(model.config.model_type).is_own
    names = {name if is_own else published_name(name): name for name in state}
    split = split_torch_state_dict_into_shards(
        {written: state[name].to(dtype) for written, name in names.items()}, max_shard_size=max_shard_size
    )
    with tqdm(total=len(names), desc="Writing weights", unit="tensor", disable=None) as bar:
        for file, members in split.filename_to_tensors.items():
            if not is_written(file):
                shard = {written: _finite(names[written], read, dtype) for written in members}
                save_file(shard, folder / f"{file}.tmp", metadata={"format": "pt"})
                os.replace(folder / f"{file}.tmp", folder / file)
                del shard
            bar.update(len(members))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _finite(name: str, read: "Callable[[str], torch.Tensor]", dtype: "torch.dtype") -> "torch.Tensor":
    stored = read(name)
    tensor = stored.to(dtype).contiguous()
    if not tensor.isfinite().all():
        reason = f"too large for {dtype}: choose another --dtype" if stored.isfinite().all() else "not finite"
        raise UserError(f"{name} has values that are {reason}. The checkpoint was not converted.")
    return tensor
