# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine `transformers`: the policy in this process, in batches of like length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from medst_trl.data.schema import text_of
from medst_trl.errors import UserError
from medst_trl.policy.decoding import chat_inputs, write_texts
from medst_trl.selftrain.generate.prompts import Prompt, Reply, Sampling, to_ask


if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class TransformersEngine:
    """
    Writes texts with a model in this process. A text depends on its prompt and its random stream alone, not on what
    else is in the batch (up to floating-point ties).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy, as [`load_policy`] gives it, on the device it shall run on.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        batch_size (`int`, *optional*, defaults to `16`):
            Texts written at a time. Where they do not fit into memory it is halved, for good.
    """

    name = "transformers"

    def __init__(self, model: "PreTrainedModel", processor: "ProcessorMixin", batch_size: int = 16):
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self._fits = batch_size
        self._image_lengths = {}

    def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        """
        One text for each prompt.

        Raises:
            UserError: if not even one fits into memory, or the model's scores are no numbers.
        """
        if not prompts:
            return []
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        lengths = self._lengths(prompts)
        order = sorted(range(len(prompts)), key=lambda place: (-lengths[place], place))  # the hardest batch first
        replies = {}
        while len(replies) < len(order):
            batch = order[len(replies) : len(replies) + self._fits]
            texts = None
            try:
                texts = self._write_batch([prompts[place] for place in batch], sampling)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            if texts is None:  # outside of `except`: the error holds on to what takes the memory
                self._halve(len(batch))
                clear_device_cache(garbage_collection=True)
            else:
                replies |= {place: Reply(*text) for place, text in zip(batch, texts, strict=True)}
        return [replies[place] for place in range(len(prompts))]

    def _write_batch(self, prompts: list[Prompt], sampling: Sampling) -> list[tuple[str, bool]]:
        from medst_trl.selftrain.generate.sampling import SeededSampler

        conversations = [prompt.messages for prompt in prompts]
        images = [[opened.image for opened in prompt.images] for prompt in prompts]
        inputs = chat_inputs(self.processor, conversations, images)
        sampler = None
        if sampling.temperature > 0:
            sampler = SeededSampler(sampling, [prompt.stream for prompt in prompts])
        texts = write_texts(self.model, self.processor, inputs, sampling.max_new_tokens, sampler)
        if sampler is not None:
            sampler.check()
        return texts

    def _lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """About how many tokens each prompt has: its texts, and what images of its sizes add."""
        texts = [" ".join(text_of(message["content"]) for message in prompt.messages) for prompt in prompts]
        tokens = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        lengths = []
        for prompt, own in zip(prompts, tokens, strict=True):
            sizes = tuple(opened.image.size for opened in prompt.images)
            if sizes not in self._image_lengths:
                bare = chat_inputs(
                    self.processor, [to_ask([], len(sizes))], [[opened.image for opened in prompt.images]]
                )
                self._image_lengths[sizes] = bare["input_ids"].shape[1]
            lengths.append(self._image_lengths[sizes] + len(own))
        return lengths

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError(
                "Not even one text at a time fits into memory. Use a smaller model or --dtype bfloat16, shorter texts "
                "(max_new_tokens, max_question_tokens), or a machine with more memory; what is finished is kept."
            )
        self._fits = tried // 2
        print(f"generate: not enough memory for {tried} texts at a time, going on with {self._fits}.")
