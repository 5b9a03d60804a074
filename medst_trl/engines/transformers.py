# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine `transformers`: the policy in this process, in batches of like length."""

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.data.schema import text_of

from .batch_size import MOST, largest_batch
from .decoding import chat_inputs, write_texts
from .image_features import ImageMemory
from .prompts import OpenedImage, Prompt, Reply, Sampling, to_ask
from .shared_prompts import shares_prompts


if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

ON_CPU = 16  # also on a device that does not tell how much memory is free
# Where as many texts are written at a time as fit, windows go by this number: what fits differs between processes and
# from run to run, and all processes have to share the same windows.
NOMINAL = 64
ENCODED_AT_ONCE = 32  # images; more do not make a vision tower faster


class TransformersEngine:
    """
    Writes texts with a model in this process. A text depends on its prompt and its random stream alone, not on what
    else is in the batch (up to floating-point ties).

    An image is preprocessed and encoded once for as long as its [`OpenedImage`] lives, if [`ImageMemory`] has room for
    it, and equal prompts of a batch are read once. Families that are not proven to write the same that way
    ([`shares_prompts`]) do without.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy, as [`load_policy`] gives it, on the device it shall run on.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        batch_size (`int`, *optional*):
            Texts written at a time; where they do not fit into memory it is halved, for good. By default 16 on a CPU,
            and on an accelerator as many as fit.
    """

    name = "transformers"

    def __init__(self, model: "PreTrainedModel", processor: "ProcessorMixin", batch_size: int | None = None):
        # An adapter's layers are inside its base model, and that is the one whose `forward` says what it takes.
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor = processor
        tells = self.model.device.type not in ("cpu", "mps")
        self.batch_size = batch_size or (NOMINAL if tells else ON_CPU)
        self._estimates = batch_size is None and tells
        # At a time; less, for good, where that has run out of memory.
        self._most = {
            "texts": MOST if self._estimates else self.batch_size,
            "images": min(self.batch_size, ENCODED_AT_ONCE),
        }
        self._images = ImageMemory(self.model, processor) if shares_prompts(self.model) else None
        self._image_lengths = {}
        if self._images is None and int(os.environ.get("RANK", "0")) == 0:
            print(
                f"generate: models of the type {self.model.config.model_type} read a prompt, with its images, for "
                "each text behind it: that once would be the same is not proven for them."
            )

    def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        """
        One text for each prompt.

        Raises:
            UserError: if not even one fits into memory, or the model's scores are no numbers.
        """
        if not prompts:
            return []
        if self._images is not None:
            self._encode(image for image in _images_of(prompts) if image not in self._images.tokens)
        lengths = self._lengths(prompts)
        groups = _groups(prompts)
        # The hardest batch first, and equal prompts together.
        order = sorted(range(len(prompts)), key=lambda place: (-lengths[place], groups[place], place))

        def next_batch(start: int) -> list[int]:
            size = self._most["texts"]
            if self._estimates:  # the first is the longest
                size = min(size, largest_batch(self.model, lengths[order[start]], sampling.max_new_tokens))
            end = start + size
            whole = end
            while start < whole < len(order) and groups[order[whole - 1]] == groups[order[whole]]:
                whole -= 1
            return order[start : whole if whole > start else end]

        def write_batch(batch: list[int]) -> list[tuple[str, bool]]:
            return self._write_batch([prompts[place] for place in batch], [groups[place] for place in batch], sampling)

        texts = self._in_batches(len(order), next_batch, write_batch, "texts")
        replies = {place: Reply(*text) for place, text in zip(order, texts, strict=True)}
        return [replies[place] for place in range(len(prompts))]

    def _encode(self, opened: Iterable[OpenedImage], keep: Container = ()) -> None:
        opened = list(opened)

        def next_batch(start: int) -> list[OpenedImage]:
            return opened[start : start + self._most["images"]]

        def encode_batch(batch: list[OpenedImage]) -> list[OpenedImage]:
            self._images.encode(batch, [image.image for image in batch], keep)
            return batch

        self._in_batches(len(opened), next_batch, encode_batch, "images")

    def _in_batches(
        self, total: int, next_batch: Callable[[int], list], work: Callable[[list], list], what: str
    ) -> list:
        """
        What `work` makes of all batches, one behind the other.

        Args:
            total (`int`): Items in all batches.
            next_batch (`Callable`): From the number of items that are done to the next batch.
            work (`Callable`): From a batch to as many results.
            what (`str`): How to call the items.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        results: list[Any] = []
        while len(results) < total:
            batch, done = next_batch(len(results)), None
            try:
                done = work(batch)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            if done is None:  # outside of `except`: the error holds on to what takes the memory
                self._halve(len(batch), what)
                clear_device_cache(garbage_collection=True)
            else:
                results += done
        return results

    def _write_batch(self, prompts: list[Prompt], groups: list[int], sampling: Sampling) -> list[tuple[str, bool]]:
        from .sampling import SeededSampler

        sampler = None
        if sampling.temperature > 0:
            sampler = SeededSampler(sampling, [prompt.stream for prompt in prompts])
        draws = None
        if self._images is not None:  # the first of each group stands for all
            draws = list(Counter(groups).values())
            prompts = [prompt for place, prompt in enumerate(prompts) if groups.index(groups[place]) == place]
        conversations = [prompt.messages for prompt in prompts]
        images = [[opened.image for opened in prompt.images] for prompt in prompts]
        if self._images is None:
            inputs = chat_inputs(self.processor, conversations, images)
        else:
            needed = _images_of(prompts)
            self._encode((image for image in needed if image not in self._images), keep=needed)
            inputs = self._images.inputs(conversations, [prompt.images for prompt in prompts], images)
        texts = write_texts(self.model, self.processor, inputs, sampling.max_new_tokens, sampler, draws)
        if sampler is not None:
            sampler.check()
        return texts

    def _lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """About how many tokens each prompt has: those of its texts and of its images."""
        texts = [" ".join(text_of(message["content"]) for message in prompt.messages) for prompt in prompts]
        tokens = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [self._image_length(prompt) + len(own) for prompt, own in zip(prompts, tokens, strict=True)]

    def _image_length(self, prompt: Prompt) -> int:
        if self._images is not None:
            return sum(self._images.tokens[opened] for opened in prompt.images)
        sizes = tuple(opened.image.size for opened in prompt.images)
        if sizes not in self._image_lengths:
            bare = chat_inputs(self.processor, [to_ask([], len(sizes))], [[opened.image for opened in prompt.images]])
            self._image_lengths[sizes] = bare["input_ids"].shape[1]
        return self._image_lengths[sizes]

    def _halve(self, tried: int, what: str) -> None:
        if tried == 1:
            raise UserError(
                f"Not even one of the {what} at a time fits into memory. Use a smaller model or --dtype bfloat16, "
                "images of fewer pixels (the size or max_pixels of the model's processor), shorter texts "
                "(max_new_tokens, max_question_tokens), or a machine with more memory. If it is main memory that is "
                "short, a smaller --batch_size helps: fewer images are held at a time. What is finished is kept."
            )
        self._most[what] = tried // 2
        print(f"generate: not enough memory for {tried} {what} at a time, going on with {self._most[what]}.")


def _images_of(prompts: Sequence[Prompt]) -> dict[OpenedImage, None]:
    """Each image once, in order."""
    return dict.fromkeys(image for prompt in prompts for image in prompt.images)


def _groups(prompts: Sequence[Prompt]) -> list[int]:
    """For each prompt, the place of the first one that reads the same: only their random streams differ."""
    first: dict[Any, int] = {}
    read = [(repr(prompt.messages), *map(id, prompt.images)) for prompt in prompts]
    return [first.setdefault(key, place) for place, key in enumerate(read)]
