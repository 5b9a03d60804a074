# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Cache of image features: each image is preprocessed and encoded once for all prompts that show it."""

import inspect
from collections.abc import Collection, Container, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .decoding import prompt_inputs
from .engine import OpenedImage, Prompt


if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


# Limit of the features in memory. LLaVA-1.5 has 4.5 MB per image, Qwen2.5-VL-7B 46 MB for 5 megapixels.
MOST_BYTES = 8 * 2**30


@dataclass(frozen=True)
class EncodedImage:
    """
    The features of an image, in main memory, and what its prompt needs beside them.

    Args:
        placeholder (`str`):
            Its placeholder in the text of a prompt.
        layers (`tuple[torch.Tensor]` of shape (image tokens, hidden size)):
            Its features: the input of the language model, and those of each further layer that has its own (Qwen3-VL).
        grid (`torch.Tensor` of shape (3,), *optional*):
            Number of its patches in time, height and width, which m-RoPE models use for positions.
        tiles (`int`, *optional*):
            Number of tiles it was cut into, if the processor needs it (InternVL).
    """

    placeholder: str
    layers: "tuple[torch.Tensor, ...]"
    grid: "torch.Tensor | None"
    tiles: int | None

    @property
    def bytes(self) -> int:
        """Size of its features."""
        return sum(rows.nbytes for rows in self.layers)


class ImageFeatureCache:
    """
    Cache of the features of the images in use.

    The features of an image are freed with its [`OpenedImage`]: a caller that holds the images of a window holds the
    features of a window. They are kept in main memory; the accelerator has only those of the prompts in a prefill.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model of a [`Family`] that shares prompts.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.

    Attributes:
        tokens (mapping of [`OpenedImage`] to `int`):
            Number of tokens of each image that was ever encoded.
        known (mapping of [`OpenedImage`] to [`EncodedImage`]):
            The images whose features are kept.
    """

    def __init__(self, model: "PreTrainedModel", processor: "ProcessorMixin"):
        self.model = model
        self.processor = processor
        # A copy in which another function replaces `ProcessorMixin._process_images`, the only step of a processor that
        # reads pixels. Placeholders, tokens and token types follow from what it returns.
        self._processor = copy(processor)
        self.tokens: WeakKeyDictionary[OpenedImage, int] = WeakKeyDictionary()
        self.known: WeakKeyDictionary[OpenedImage, EncodedImage] = WeakKeyDictionary()
        self._output_type: type | None = None
        self._is_tensor = False

    def encode(self, images: Collection[OpenedImage], keep: Container[OpenedImage] = ()) -> None:
        """
        Preprocess and encode images, and keep their features: as long as the images exist if all features fit into
        `MOST_BYTES`, otherwise until the next call.

        Args:
            images (collection of [`OpenedImage`]):
                The images, at least one.
            keep (container of [`OpenedImage`], *optional*):
                Images whose features must stay in memory.
        """
        import torch

        self._trim(keep)
        placeholders, grids, tiles = [], [], []

        def record_images(*args, **kwargs):
            processed, texts = self.processor._process_images(*args, **kwargs)
            placeholders.extend(texts)
            grids.extend(torch.as_tensor(grid) for grid in processed.get("image_grid_thw", ()))
            tiles.extend(map(int, processed.get("num_patches", ())))
            return processed, texts

        # Prompts with nothing but an image: the numbers of their tokens divide the features among the images.
        bare = [{"role": "user", "content": [{"type": "image"}], "vusr": True}]
        self._processor._process_images = record_images
        inputs = prompt_inputs(self._processor, [Prompt(bare, [image]) for image in images])
        inputs = inputs.to(self.model.device, self.model.dtype)
        get_features = self.model.base_model.get_image_features
        wanted = [name for name in inspect.signature(get_features).parameters if name in inputs]
        with torch.inference_mode():
            output = get_features(**{name: inputs[name] for name in wanted}, return_dict=True)
        # The model accepts its own output type, with one tensor in it or a list of tensors.
        self._output_type, self._is_tensor = type(output), isinstance(output.pooler_output, torch.Tensor)
        tokens = (inputs["input_ids"] == self.model.config.image_token_id).sum(1).tolist()
        layers = (output.pooler_output, *(getattr(output, "deepstack_features", None) or ()))
        # One row per image token. Families split their features by image, crop or prompt, or not at all.
        flat = [torch.cat([part.reshape(-1, part.shape[-1]) for part in layer]).cpu() for layer in layers]
        by_image, none = zip(*(layer.split(tokens) for layer in flat)), [None] * len(images)
        facts = zip(images, placeholders, by_image, grids or none, tiles or none, strict=True)
        for image, placeholder, features, grid, count in facts:
            own = tuple(layer.clone() for layer in features)  # a view would keep the features of the whole batch
            self.known[image] = EncodedImage(placeholder, own, grid, count)
        self.tokens.update(zip(images, tokens, strict=True))

    def _trim(self, keep: Container[OpenedImage]) -> None:
        """Free the last images if all together exceed `MOST_BYTES`."""
        # The first ones stay: they are also the first to be needed again.
        held = 0
        for image, encoded in list(self.known.items()):
            held += encoded.bytes
            if held > MOST_BYTES and image not in keep:
                del self.known[image]

    def inputs(self, prompts: Sequence[Prompt]) -> "BatchFeature":
        """
        Return [`chat_inputs`] of prompts with features (`mm_encoder_outputs`) instead of pixels, which are not read.

        All images must have been encoded.
        """
        import torch

        known = [self.known[image] for prompt in prompts for image in prompt.images]
        grids = [image.grid for image in known if image.grid is not None]

        def replay_images(*args, **kwargs):
            processed = {"image_grid_thw": torch.stack(grids)} if grids else {}
            if known[0].tiles is not None:  # InternVL's processor cuts the pixels into tiles; there are none
                processed = {"num_patches": [image.tiles for image in known], "pixel_values": torch.empty(0)}
            return processed, [image.placeholder for image in known]

        self._processor._process_images = replay_images
        inputs = prompt_inputs(self._processor, prompts)
        inputs.pop("pixel_values", None)
        if not known:
            return inputs

        by_layer = zip(*(image.layers for image in known))
        features, *deepstack = (torch.cat(rows).to(self.model.device) for rows in by_layer)
        layers = {"pooler_output": features[None] if self._is_tensor else [features]}
        if deepstack:
            layers["deepstack_features"] = [[layer] for layer in deepstack]
        inputs["mm_encoder_outputs"] = {"image": self._output_type(**layers)}
        return inputs
