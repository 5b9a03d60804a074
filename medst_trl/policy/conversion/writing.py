# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's weights on disk, shard by shard: no more than one shard is in memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .names import published_name


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    # Only transformers with medst_trl loads the prototype extractor: no older name is of use there.
    is_llava = model.config.model_type == "llava"
    names = {published_name(name) if is_llava else name: name for name in state}
    split = split_torch_state_dict_into_shards(
        {written: state[name].to(dtype) for written, name in names.items()}, max_shard_size=max_shard_size
    )
    with tqdm(total=len(names), desc="Writing weights", unit="tensor", disable=None) as bar:
        for file, members in split.filename_to_tensors.items():
            if not is_written(file):
                shard = {written: read(names[written]).to(dtype).contiguous() for written in members}
                save_file(shard, folder / f"{file}.tmp", metadata={"format": "pt"})
                os.replace(folder / f"{file}.tmp", folder / file)
                del shard
            bar.update(len(members))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
