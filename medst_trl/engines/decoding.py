# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Convert conversations to model inputs, and generated tokens to texts.

A prompt is prefilled once for all of its texts ([`prefill`]), finished texts leave their batch
([`generate_dropping_finished`]), and each text has its own random stream ([`SeededSampler`]), so that it does not
depend on its batch.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.policy.chat_template import VUSR
from medst_trl.policy.vusr import neutralise_parts

from .engine import Prompt, Sampling, sent_parts


if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# Tokens per call of `generate`: with fewer, finished texts leave sooner; with more, less time goes to starting calls.
STEPS_PER_CALL = 32

# Settings of `generate` beside transformers' defaults. Of the model's generation config only `USED_SETTINGS` count:
# other settings change the distribution or the way of decoding, or count from the start of a call, and a text may take
# several calls.
GREEDY = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True,
    "use_cache": True,  # configurations saved after gradient checkpointing may disable it
}  # fmt: skip


def chat_inputs(
    processor: "ProcessorMixin", conversations: Sequence[list[dict[str, Any]]], images: "Sequence[list[Image.Image]]"
) -> "BatchFeature":
    """
    Render conversations with the chat template, open for the model's turn, and pad them on the left.

    transformers decides whether the tokenizer adds a beginning-of-sequence token, as in a pipeline: templates such as
    LLaVA-1.5's do not write one.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The policy's processor.
        conversations (sequence of `list[dict]`):
            Messages whose content is a list of typed parts. The model writes a last message with `vusr: True` and no
            text. Text that spells a control token is neutralised.
        images (sequence of `list[PIL.Image.Image]`):
            The images of each conversation, in the order of its image parts.

    Returns:
        [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` of shape (batch, length), and the pixel
        inputs.
    """
    pairs = zip(conversations, map(iter, images), strict=True)
    rendered = [[_message(processor, message, left) for message in messages] for messages, left in pairs]
    kwargs = {"padding": True, "padding_side": "left"}
    returned = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(rendered, add_generation_prompt=True, processor_kwargs=kwargs, **returned)


def prompt_inputs(processor: "ProcessorMixin", prompts: Sequence[Prompt]) -> "BatchFeature":
    """Return [`chat_inputs`] of prompts."""
    images = [[opened.image for opened in prompt.images] for prompt in prompts]
    return chat_inputs(processor, [prompt.messages for prompt in prompts], images)


def _message(processor: "ProcessorMixin", message: dict[str, Any], images) -> dict[str, Any]:
    def image_part() -> dict[str, Any]:
        return {"type": "image", "image": next(images).convert("RGB")}

    parts = sent_parts(message, lambda texts: neutralise_parts(texts, processor), image_part)
    return {"role": message["role"], "content": parts}


def write_texts(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    inputs: "BatchFeature",
    max_new_tokens: int,
    sampler: "SeededSampler | None" = None,
    samples_per_prompt: Sequence[int] | None = None,
    **generates: Any,
) -> list[tuple[str, bool]]:
    """
    Generate one or several texts for each prompt of a batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy on its device. Its generation config has the tokens that end a text.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        inputs ([`~transformers.BatchFeature`]):
            From [`chat_inputs`].
        max_new_tokens (`int`):
            Maximum length of a text.
        sampler ([`SeededSampler`], *optional*):
            Chooses the tokens. By default the most likely token.
        samples_per_prompt (sequence of `int`, *optional*):
            Number of texts for each prompt, which is prefilled once; only for a [`Family`] that shares prompts.
            By default one text, and nothing is shared.
        **generates:
            Further arguments of `generate`, if `samples_per_prompt` is None.

    Returns:
        `list[tuple[str, bool]]`: each text, and whether the model ended it. The texts of the first prompt come first.

    Raises:
        UserError: if the model's scores are not numbers, so that nothing can be sampled.
    """
    import torch

    inputs = inputs.to(model.device, model.dtype)
    settings = _settings(model, processor.tokenizer)
    prompt_length = inputs["input_ids"].shape[1]
    stops = StopStrings(model.generation_config.stop_strings, processor.tokenizer, prompt_length)
    with torch.inference_mode():
        if samples_per_prompt is None:
            settings |= {"logits_processor": None if sampler is None else [sampler]} | generates
            settings["stopping_criteria"] = [*settings.get("stopping_criteria", ()), stops]
            tokens = model.generate(**inputs, **settings, max_new_tokens=max_new_tokens).sequences[:, prompt_length:]
        else:
            if max(samples_per_prompt) > 1:
                inputs = prefill(model, inputs, samples_per_prompt, **settings)
            tokens = generate_dropping_finished(model, inputs, max_new_tokens, sampler, stops, **settings)
    if sampler is not None:
        sampler.check()
    ended = torch.isin(tokens, torch.tensor(settings["eos_token_id"], device=tokens.device)).any(1).tolist()
    texts = zip(processor.batch_decode(tokens, skip_special_tokens=True), stops.found_in(tokens), ended)
    return [(stops.cut(text).strip(), end or stopped) for text, stopped, end in texts]


def _settings(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the settings of `generate`: greedy decoding, and what of the model's generation config is used."""
    from transformers import GenerationConfig

    from medst_trl.policy.loading import TOKENS

    config, vusr = model.generation_config, tokenizer.get_vocab().get(VUSR)  # a token of prompts, never written
    never = {*(config.suppress_tokens or ()), vusr} - {None}
    own = {name: getattr(config, name) for name in TOKENS}  # with what `load_policy` has added
    own |= {"pad_token_id": tokenizer.pad_token_id, "suppress_tokens": sorted(never) or None}
    unset = GenerationConfig().to_dict().keys() - {"max_new_tokens"}  # which is given for each call
    return dict.fromkeys(unset) | GREEDY | own


class StopStrings:
    """
    Stopping criterion of `generate` that ends a text at a string in it. transformers' own also ends it at a string
    that begins in the prompt.

    Args:
        strings (`list[str]`, *optional*):
            The strings, from the model's generation config.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        prompt_length (`int`, *optional*, defaults to `0`):
            Number of tokens before a text.
    """

    def __init__(self, strings: list[str] | None, tokenizer: "PreTrainedTokenizerBase", prompt_length: int = 0):
        self.strings, self.tokenizer, self.prompt_length = strings or [], tokenizer, prompt_length

    def __call__(self, input_ids: "torch.LongTensor", scores: Any = None, **kwargs: Any) -> "torch.BoolTensor":
        if not self.strings:
            return input_ids.new_zeros(len(input_ids), dtype=bool)
        # Only the end is new. A character is at most 4 tokens, and special tokens may be between them.
        start = max(self.prompt_length, input_ids.shape[1] - 4 * max(map(len, self.strings)) - 16)
        return input_ids.new_tensor(self.found_in(input_ids[:, start:]), dtype=bool)

    def found_in(self, tokens: "torch.LongTensor") -> list[bool]:
        """Return for each text whether it has one of the strings, which may be a special token."""
        if not self.strings:
            return [False] * len(tokens)
        forms = zip(*(self.tokenizer.batch_decode(tokens, skip_special_tokens=skip) for skip in (False, True)))
        return [any(string in text for string in self.strings for text in texts) for texts in forms]

    def cut(self, text: str) -> str:
        """Return the part of a text before the first string."""
        return text[: min((text.find(string) for string in self.strings if string in text), default=len(text))]

    def cut_pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of a text before the first string, as soon as they cannot belong to one."""
        text, shown, longest = "", 0, max(map(len, self.strings), default=1)
        for piece in chain(pieces, [None]):  # the text is complete
            text += piece or ""
            end = len(self.cut(text))
            end -= (longest - 1) * (piece is not None and end == len(text))
            if end > shown:
                yield text[shown:end]
                shown = end


def prefill(
    model: "PreTrainedModel", inputs: "Mapping[str, Any]", samples_per_prompt: Sequence[int], **settings: Any
) -> "dict[str, torch.Tensor]":
    """
    Prefill each prompt of a batch once, and repeat its cache for each of its texts.

    The last token is left out: `generate` needs one to continue from. (`num_return_sequences` would repeat the prompts
    before the prefill.)

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model of a [`Family`] that shares prompts.
        inputs (`Mapping`):
            Inputs of `generate`, padded on the left.
        samples_per_prompt (sequence of `int`):
            Number of texts for each prompt.
        **settings:
            Further arguments of `generate`.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` of shape (number of texts, length), and
        `past_key_values`, for `generate`.
    """
    import torch

    ids = inputs["input_ids"]
    prefilled = {
        name: value[:, :-1] if isinstance(value, torch.Tensor) and value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    cache = model.generate(**prefilled, **settings, max_new_tokens=1).past_key_values
    counts = torch.tensor(samples_per_prompt, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
    return _rows(model, ids, inputs["attention_mask"], cache, rows)


def generate_dropping_finished(
    model: "PreTrainedModel",
    inputs: "Mapping[str, Any]",
    max_new_tokens: int,
    sampler: "SeededSampler | None",
    stops: "StopStrings",
    **settings: Any,
) -> "torch.Tensor":
    """
    Call `generate` repeatedly, and remove finished texts from the batch after every `STEPS_PER_CALL` tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model of a [`Family`] that shares prompts.
        inputs (`Mapping`):
            Inputs of `generate`, padded on the left.
        max_new_tokens (`int`):
            Maximum length of a text.
        sampler ([`SeededSampler`] or `None`):
            Chooses the tokens.
        stops ([`StopStrings`]):
            Ends texts.
        **settings:
            Further arguments of `generate`, with `eos_token_id` (a list) and `pad_token_id`.

    Returns:
        `torch.Tensor` of shape (rows, `max_new_tokens`): the new tokens, padded on the right.
    """
    import torch

    ids = inputs["input_ids"]
    left = torch.arange(len(ids), device=ids.device)
    ends = torch.tensor(settings["eos_token_id"], device=ids.device)
    tokens = ids.new_full((len(ids), max_new_tokens), settings["pad_token_id"])
    settings |= {"logits_processor": None if sampler is None else [sampler], "stopping_criteria": [stops]}
    for done in range(0, max_new_tokens, STEPS_PER_CALL):
        steps = min(STEPS_PER_CALL, max_new_tokens - done)
        output = model.generate(**inputs, **settings, max_new_tokens=steps)
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        tokens[left, done : done + new.shape[1]] = new
        stopped = ids.new_tensor(stops.found_in(output.sequences[:, stops.prompt_length :]), dtype=bool)
        rows = (~torch.isin(new, ends).any(1) & ~stopped).nonzero()[:, 0]
        if done + steps == max_new_tokens or not len(rows):
            break
        left = left[rows]
        if sampler is not None:
            sampler.keep(rows)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
        inputs = _rows(model, output.sequences, mask, output.past_key_values, rows)
    return tokens


def _rows(model, ids, mask, cache, rows: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """Return the inputs with which `generate` continues some rows of a batch."""
    cache.batch_select_indices(rows)
    inner = model.base_model
    if getattr(inner, "rope_deltas", None) is not None:  # m-RoPE models store the position shift of each row
        inner.rope_deltas = inner.rope_deltas[rows]
    return {"input_ids": ids[rows], "attention_mask": mask[rows], "past_key_values": cache}


class SeededSampler:
    """
    A logits processor that samples the next token of each row of a batch with that row's own random numbers.

    transformers' own sampling uses one global stream for the whole batch, so a text would change with the rest of the
    batch. Here temperature, top-k and top-p (transformers' warpers) make the distribution, and one uniform number per
    row and step picks from it by the inverse of its cumulative distribution, in the order of the vocabulary. The
    picked token is the only one with a finite score, so `generate(do_sample=False)` takes it.

    Args:
        sampling ([`Sampling`]):
            Temperature above 0, top-k, top-p, and the maximum number of tokens.
        streams (sequence of `str`):
            One for each row. The same stream gives the same numbers on any machine.

    Example:

    ```python
    >>> sampler = SeededSampler(Sampling(temperature=1.2), streams=["record 1", "record 2"])
    >>> model.generate(**inputs, do_sample=False, logits_processor=[sampler], max_new_tokens=64)
    ```
    """

    def __init__(self, sampling: Sampling, streams: Sequence[str]):
        self.warpers = warpers(sampling)
        import torch

        # Python's generator, not torch's: its numbers are guaranteed to stay the same.
        rows = [random.Random(stream) for stream in streams]
        uniforms = [[row.random() for _ in range(sampling.max_new_tokens)] for row in rows]
        self._uniforms = torch.tensor(uniforms, dtype=torch.float64)
        self._step = 0
        self._broken = False

    def __call__(self, input_ids: "torch.LongTensor", scores: "torch.FloatTensor") -> "torch.FloatTensor":
        """
        Args:
            input_ids (`torch.LongTensor` of shape (batch, length)): Tokens so far.
            scores (`torch.FloatTensor` of shape (batch, vocabulary)): Scores of the next token.

        Returns:
            `torch.FloatTensor`: 0 for the sampled token and minus infinity for all others.
        """
        import torch

        self._uniforms = self._uniforms.to(scores.device)
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        # In float64, so that rounding in the sum does not move the borders between tokens.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        # There is one step too many when `generate` notices late that all rows have ended.
        uniform = self._uniforms[:, min(self._step, self._uniforms.shape[1] - 1), None]
        below_total = torch.nextafter(total, torch.zeros_like(total))  # `uniform * total` may round up to it
        token = torch.searchsorted(cumulative, torch.minimum(uniform * total, below_total), right=True)
        # Checked only after generation: on a GPU each check would wait for it.
        self._broken = self._broken | ~total.isfinite().all()
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token.clamp(max=scores.shape[1] - 1), 0.0)

    def keep(self, rows: "torch.LongTensor") -> None:
        """Continue with some rows of the batch, given by their numbers."""
        self._uniforms = self._uniforms[rows]

    def check(self) -> None:
        """Raise a `UserError` if the model's scores were NaN or infinite at some step."""
        if self._broken:
            raise UserError(
                "The model's scores are not numbers (NaN or infinity), so nothing can be sampled. Load it with "
                "--dtype bfloat16 or float32. If that does not help, its training has diverged."
            )


def warpers(sampling: Sampling) -> "list[LogitsProcessor]":
    """Return transformers' warpers in transformers' order."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    chosen = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k > 0:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    return chosen
