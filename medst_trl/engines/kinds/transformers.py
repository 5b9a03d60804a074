# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine `transformers`: the policy in this process, in batches of prompts of similar length."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import Event
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.processes import process_state
from medst_trl.base.settings import check_bounds, check_choice, documented
from medst_trl.data.schema import text_of
from medst_trl.engines.decoding import SeededSampler, StopStrings, prompt_inputs, write_texts
from medst_trl.engines.engine import ENGINES, BatchEngine, EngineKind, OpenedImage, Prompt, Reply, Sampling
from medst_trl.engines.image_features import ImageFeatureCache
from medst_trl.policy.families import EXTREME_ASPECT_RATIO, aspect_ratio_error, base_of, family_of


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

CPU_BATCH_SIZE = 16  # default batch size, also on a device that does not report its free memory
# Windows of records assume this batch size when the real one depends on free memory: free memory differs between
# processes and runs, but all processes must use the same windows.
WINDOW_BATCH_SIZE = 64
IMAGES_PER_BATCH = 32  # images; more do not make a vision tower faster

MAX_BATCH_SIZE = 256  # larger batches are hardly faster: reading the cache then takes most time
SHARE_OF_FREE = 0.8  # allocators leave gaps, and a layer of the cache is in memory twice while it grows
_TOO_LARGE = (
    "Not enough memory for a single {}. Use a smaller model or --dtype bfloat16, smaller images (max_pixels of the "
    "model's processor) or shorter texts (max_new_tokens). If main memory is full, use a smaller --batch_size."
)
# For each token of the vocabulary: scores in float32, warped, sorted, and cumulated in float64.
BYTES_PER_SCORE = 64


@documented
@dataclass
class TransformersSettings:
    """
    Settings of the engine `transformers`.

    Args:
        base_model_name_or_path (`str`, *optional*):
            Base model of the adapter, if it has moved.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights: auto (the type of the checkpoint), float32 or bfloat16.
        batch_size (`int`, *optional*):
            Number of texts per batch on each process. Default: 16 in `medst evaluate` and on a CPU, otherwise as many
            as fit into memory.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run code from the model's repository. Use it only with models you trust.
    """

    base_model_name_or_path: str | None = None
    dtype: str = "auto"
    batch_size: int | None = None
    trust_remote_code: bool = False


class TransformersEngine(BatchEngine):
    """
    Writes texts with a model in this process. A text depends on its prompt and its random stream alone, not on the
    rest of its batch (up to floating-point ties).

    An image is preprocessed and encoded once as long as its [`OpenedImage`] exists and [`ImageFeatureCache`] has room
    for it. Equal prompts of a batch are processed once. Both only for families for which a test shows that this
    changes nothing ([`Family`]).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy, as [`load_policy`] returns it, on its device.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        batch_size (`int`, *optional*):
            Texts per batch; halved for the rest of the run when they do not fit into memory. Defaults to 16 on a CPU
            and to as many as fit on an accelerator.
    """

    name = "transformers"

    def __init__(self, model: "PreTrainedModel", processor: "ProcessorMixin", batch_size: int | None = None):
        # An adapter's layers are inside its base model, and that is the one whose `forward` has the arguments.
        self.model = base_of(model)
        self.processor = processor
        reports_memory = self.model.device.type not in ("cpu", "mps")
        self.batch_size = batch_size or (WINDOW_BATCH_SIZE if reports_memory else CPU_BATCH_SIZE)
        self._estimates = batch_size is None and reports_memory
        # Per batch; less, for the rest of the run, once that has run out of memory.
        texts = MAX_BATCH_SIZE if self._estimates else self.batch_size
        self._most = {"text": texts, "image": min(self.batch_size, IMAGES_PER_BATCH)}
        self.model_name = getattr(self.model.config, "name_or_path", None) or None
        shares_prompts = family_of(self.model.config.model_type).shares_prompts
        self._images = ImageFeatureCache(self.model, processor) if shares_prompts else None
        self._image_lengths: dict[Any, int] = {}

    def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        """
        Write one text for each prompt and return the replies in the order of the prompts. Images of an extreme aspect
        ratio are refused, with the problem `extreme_aspect_ratio`.

        Raises:
            UserError: if not even one text fits into memory, or the model's scores are not numbers.
        """
        reasons = {place: why for place, prompt in enumerate(prompts) if (why := _refusal(prompt))}
        replies = {place: Reply(why, problem=EXTREME_ASPECT_RATIO) for place, why in reasons.items()}
        taken = {place: prompt for place, prompt in enumerate(prompts) if place not in replies}
        if not taken:
            return list(replies.values())
        if self._images is None:
            images = map(self._length_by_size, taken.values())
        else:
            self._encode(image for image in _images_of(taken.values()) if image not in self._images.tokens)
            images = (sum(self._images.tokens[image] for image in prompt.images) for prompt in taken.values())
        lengths = dict(zip(taken, self._lengths(map(_text_of, taken.values()), images)))
        groups = _groups(prompts)
        # The largest batch first, and equal prompts together.
        order = sorted(taken, key=lambda place: (-lengths[place], groups[place], place))

        def size_at(start: int) -> int:
            size = self._most["text"]
            if self._estimates:  # the first prompt is the longest
                size = min(size, largest_batch(self.model, lengths[order[start]], sampling.max_new_tokens))
            end = start + size
            # A group of equal prompts is not divided between batches, unless it is larger than one.
            while start < end < len(order) and groups[order[end - 1]] == groups[order[end]]:
                end -= 1
            return end - start or size

        def write_batch(batch: list[int]) -> list[tuple[str, bool]]:
            return self._write_batch([prompts[place] for place in batch], [groups[place] for place in batch], sampling)

        texts = chain.from_iterable(self._in_batches(order, size_at, write_batch, "text"))
        replies |= {place: Reply(*text) for place, text in zip(order, texts, strict=True)}
        return [replies[place] for place in range(len(prompts))]

    def pieces(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the text of one prompt while the model writes it. Closing the iterator stops the model."""
        import torch
        from transformers import TextIteratorStreamer

        if why := _refusal(prompt):
            raise UserError(f"The model cannot take the image: {why}.")
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = Event()

        def write() -> None:
            stopping = [lambda ids, scores: torch.full((len(ids),), closed.is_set(), device=ids.device)]
            generates = {"streamer": streamer, "stopping_criteria": stopping}
            try:
                inputs, sampler = prompt_inputs(self.processor, [prompt]), _sampler([prompt], sampling)
                write_texts(self.model, self.processor, inputs, sampling.max_new_tokens, sampler, **generates)
            finally:
                streamer.end()

        stops = StopStrings(self.model.generation_config.stop_strings, self.processor.tokenizer)
        with ThreadPoolExecutor(1) as executor:
            written = executor.submit(write)
            try:
                yield from stops.cut_pieces(streamer)
            finally:
                closed.set()
            written.result()

    def batches(self, number: int, prompt_of: Callable[[int], Prompt]) -> list[list[int]]:
        """Divide prompts by their length, the longest first: a batch that is too large fails at the start of a run."""
        sizes = [(_text_of(prompt), self._length_by_size(prompt)) for prompt in map(prompt_of, range(number))]
        lengths = self._lengths([text for text, _ in sizes], [images for _, images in sizes])
        order = sorted(range(number), key=lambda place: (-lengths[place], place))
        return [[order[place] for place in batch] for batch in super().batches(number, prompt_of)]

    def _encode(self, opened: Iterable[OpenedImage], keep: Container = ()) -> None:
        encode = partial(self._images.encode, keep=keep)
        self._in_batches(list(opened), lambda start: self._most["image"], encode, "image")

    def _in_batches(self, items: list, size_at: Callable[[int], int], work: Callable[[list], Any], what: str) -> list:
        """
        Work through batches, halving them when memory runs out, and return the results of all batches.

        Args:
            items (`list`): What to divide into batches.
            size_at (`Callable`): Maps the number of finished items to the size of the next batch.
            work (`Callable`): Maps a batch to its result.
            what (`str`): Name of an item in messages.

        Raises:
            UserError: if not even one item fits into memory.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        results, done = [], 0
        while done < len(items):
            batch = items[done : done + size_at(done)]
            try:
                results.append(work(batch))
                done += len(batch)
                continue
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            # Outside of `except`: the error keeps references to what fills the memory.
            if len(batch) == 1:
                raise UserError(_TOO_LARGE.format(what))
            self._most[what] = len(batch) // 2
            print(f"Not enough memory for {len(batch)} {what}s per batch. Continuing with {self._most[what]}.")
            clear_device_cache(garbage_collection=True)
        return results

    def _write_batch(self, prompts: list[Prompt], groups: list[int], sampling: Sampling) -> list[tuple[str, bool]]:
        sampler, samples_per_prompt = _sampler(prompts, sampling), None
        if self._images is None:
            inputs = prompt_inputs(self.processor, prompts)
        else:  # one prompt of each group is processed for all of it
            samples_per_prompt = list(Counter(groups).values())
            prompts = list(dict(zip(groups, prompts)).values())
            needed = _images_of(prompts)
            self._encode((image for image in needed if image not in self._images.known), keep=needed)
            inputs = self._images.inputs(prompts)
        return write_texts(self.model, self.processor, inputs, sampling.max_new_tokens, sampler, samples_per_prompt)

    def _lengths(self, texts: Iterable[str], images: Iterable[int]) -> list[int]:
        """Return the number of tokens of each prompt: those of its texts and of its images."""
        ids = self.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [len(own) + other for own, other in zip(ids, images, strict=True)]

    def _length_by_size(self, prompt: Prompt) -> int:
        """Return the number of tokens that the images and the template add: it depends on the images' sizes alone."""
        sizes = tuple(opened.image.size for opened in prompt.images)
        if _refusal(prompt):
            return 0
        if sizes not in self._image_lengths:
            (own,) = self._lengths([_text_of(prompt)], [0])
            self._image_lengths[sizes] = prompt_inputs(self.processor, [prompt])["input_ids"].shape[1] - own
        return self._image_lengths[sizes]


def _sampler(prompts: Sequence[Prompt], sampling: Sampling) -> SeededSampler | None:
    return SeededSampler(sampling, [prompt.stream for prompt in prompts]) if sampling.temperature > 0 else None


def _refusal(prompt: Prompt) -> str | None:
    return aspect_ratio_error(opened.image.size for opened in prompt.images)


def _text_of(prompt: Prompt) -> str:
    return " ".join(text_of(message["content"]) for message in prompt.messages)


def _images_of(prompts: Iterable[Prompt]) -> dict[OpenedImage, None]:
    """Return each image once, in order."""
    return dict.fromkeys(image for prompt in prompts for image in prompt.images)


def _groups(prompts: Sequence[Prompt]) -> list[int]:
    """Return for each prompt the place of the first equal one: only their random streams differ."""
    first: dict[Any, int] = {}
    read = [(repr(prompt.messages), *map(id, prompt.images)) for prompt in prompts]
    return [first.setdefault(key, place) for place, key in enumerate(read)]


def largest_batch(model: "PreTrainedModel", prompt_tokens: int, max_new_tokens: int) -> int:
    """
    Estimate how many texts fit into the memory of an accelerator. An estimate that is too high ends in an error.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model on an accelerator.
        prompt_tokens (`int`):
            Number of tokens of the longest prompt.
        max_new_tokens (`int`):
            Largest number of tokens of a text.

    Returns:
        `int`: size of a batch, from 1 to `MAX_BATCH_SIZE`.
    """
    config = model.config.get_text_config(decoder=True)
    deepstack = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    need = bytes_of_a_text(config, model.dtype, prompt_tokens, max_new_tokens, 1 + len(deepstack))
    return max(1, min(MAX_BATCH_SIZE, int(SHARE_OF_FREE * free_bytes(model.device)) // need))


def bytes_of_a_text(
    config: "PreTrainedConfig", dtype: "torch.dtype", prompt_tokens: int, max_new_tokens: int, image_layers: int = 1
) -> int:
    """
    Return the bytes that a row of a batch takes at most: keys and values, features of its images and a layer's
    activations while the prompt is read, and scores.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the language model.
        dtype (`torch.dtype`): Type of the weights.
        prompt_tokens, max_new_tokens (`int`): Length of a row.
        image_layers (`int`, *optional*, defaults to `1`): Number of layers with image features (Qwen3-VL: several).
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cached = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    at_work = (8 + image_layers) * config.hidden_size + 3 * config.intermediate_size
    numbers = cached * (prompt_tokens + max_new_tokens) + at_work * prompt_tokens
    return numbers * dtype.itemsize + BYTES_PER_SCORE * config.vocab_size


def free_bytes(device: "torch.device") -> int:
    """Return the free bytes of an accelerator, including what PyTorch has reserved there and does not use."""
    import torch

    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


def _check(settings: TransformersSettings, model_name_or_path: str) -> None:
    from medst_trl.policy import DTYPES

    check_choice("dtype", settings.dtype, DTYPES)
    check_bounds(settings, at_least={"batch_size": 1})


def _open(model_name_or_path: str, settings: TransformersSettings) -> TransformersEngine:
    from medst_trl.policy.loading import load_policy

    loading = dict(vars(settings))
    batch_size = loading.pop("batch_size")
    model, processor = load_policy(model_name_or_path, **loading)
    return TransformersEngine(model.to(process_state().device), processor, batch_size)


ENGINES.register(
    EngineKind(
        name="transformers",
        summary="the model in this process",
        settings=TransformersSettings,
        open=_open,
        check=_check,
        loads_model=True,
        operational=frozenset({"batch_size"}),
    )
)
