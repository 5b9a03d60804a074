# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny processors of the tested families, built in code: real templates, real special tokens, no weights.

Most templates come from the installed TRL. It has none for LLaVA-1.5, Llama 3.2-Vision and InternVL; their templates
are written here and follow the published ones.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)


# llava-hf/llava-1.5: images first, then texts, each followed by a space; turns do not end with the EOS token
LLAVA_15_HF = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ part['text'] + ' ' }}{%- endgeneration -%}
{%- else -%}{{ part['text'] + ' ' }}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""

# meta-llama/Llama-3.2-11B-Vision: string or list content, trimmed, `<|image|>` for each image
LLAMA_32_VISION = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# OpenGVLab/InternVL3-*-hf: ChatML, string or list content, a newline after each image
INTERNVL = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<IMG_CONTEXT>\n' }}
            {%- elif part['type'] == 'video' %}
                {{- '<video>\n' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

_CORPUS = [
    "What is in the image? The heart is enlarged. USER: ASSISTANT: user assistant system model\n",
    "Is there a pleural effusion? No. Yes.\n\n",
]


# Words as split by Llama 3 and Qwen. Newlines never join the text that follows, so a token never spans a prompt and
# its answer.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _trl(name: str) -> str:
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def _tokenizer(special: list[str], extra: tuple[str, ...] = (), **kwargs) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        _CORPUS * 10, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **kwargs)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in extra])
    return tokenizer


def _llava(template: str) -> ProcessorMixin:
    tokenizer = _tokenizer(
        ["<unk>", "<s>", "</s>", "<image>", "<pad>"],
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    # Llama's tokenizer adds the BOS token if the template does not write it
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    side = {"height": 16, "width": 16}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _llava_next() -> ProcessorMixin:
    tokenizer = _llava("").tokenizer
    side = {"height": 16, "width": 16}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=side, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
    )
    return LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_trl("llava_next"),
    )  # fmt: skip


class _Qwen2_5_VLWithoutVideo(Qwen2_5_VLProcessor):
    """Qwen2.5-VL without its video processor, which needs torchvision. Images work without it."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(
            tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _qwen(template: str) -> ProcessorMixin:
    tokenizer = _tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>"], extra=("<tool_call>", "</tool_call>", "<think>", "</think>"), eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    return _Qwen2_5_VLWithoutVideo(images, tokenizer, chat_template=_trl(template))


def _gemma3() -> ProcessorMixin:
    tokenizer = _tokenizer(
        ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
        "<image_soft_token>"], extra=("\n\n", "\n\n\n"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
        },
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, tokenizer, chat_template=_trl("gemma3"), image_seq_length=4)


def _idefics3(template: str) -> ProcessorMixin:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = _tokenizer(
        ["<|begin_of_text|>", "<|im_start|>", "<|end_of_text|>", "<end_of_utterance>", "<fake_token_around_image>",
        "<image>", "<global-img>", *grid], bos_token="<|begin_of_text|>", eos_token="<end_of_utterance>",
        pad_token="<|end_of_text|>",
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=_trl(template))


class _InternVLWithoutVideo(InternVLProcessor):
    """InternVL without its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
        self.start_image_token_id, self.end_image_token_id = (
            tokenizer.start_image_token_id, tokenizer.end_image_token_id,
        )  # fmt: skip
        self.image_token, self.video_token = tokenizer.context_image_token, tokenizer.video_token
        self.image_token_id = tokenizer.context_image_token_id
        self.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)")


def _internvl() -> ProcessorMixin:
    tokenizer = _tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=3)
    return _InternVLWithoutVideo(images, tokenizer, image_seq_length=4, chat_template=INTERNVL)


def _llama32_vision() -> ProcessorMixin:
    tokenizer = _tokenizer(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>",
        "<|pad|>"], bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>",
    )  # fmt: skip
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    return MllamaProcessor(images, tokenizer, chat_template=LLAMA_32_VISION)


def _tiny() -> ProcessorMixin:
    from medst_trl.demo.tiny_model import tiny_llava

    return tiny_llava(image_size=16, patch_size=8, vision_size=32, text_size=32, text_layers=1)[1]


def _vuser_text_role() -> ProcessorMixin:
    from medst_trl.policy.vusr import set_vusr_role

    processor = _llava(LLAVA_15_HF)
    set_vusr_role(processor, "text")
    return processor


TEXT_ROLE = "vuser-text-role"  # has no token `<vusr>`
FAMILIES: dict[str, Callable[[], ProcessorMixin]] = {
    "vicuna": _tiny,  # LLaVA-1.5's original format, in which answers end with </s>
    "llava-1.5-hf": partial(_llava, LLAVA_15_HF),
    TEXT_ROLE: _vuser_text_role,
    "llava-next": _llava_next,
    "qwen2.5-vl": partial(_qwen, "qwen2_5_vl"),
    "qwen3-vl": partial(_qwen, "qwen3_vl"),
    "gemma-3": _gemma3,
    "llama-3.2-vision": _llama32_vision,
    "idefics3": partial(_idefics3, "idefics3"),
    "smolvlm": partial(_idefics3, "smolvlm"),
    "internvl": _internvl,
}

# AutoProcessor needs these classes to load a saved processor.
AutoProcessor.register(Qwen2_5_VLConfig, _Qwen2_5_VLWithoutVideo, exist_ok=True)
AutoProcessor.register(InternVLConfig, _InternVLWithoutVideo, exist_ok=True)


@cache
def prepared_processor(family: str) -> ProcessorMixin:
    """Return a family's processor with `<vusr>`. It is cached, so tests must not change it."""
    from medst_trl.policy.vusr import add_vusr

    processor = FAMILIES[family]()
    add_vusr(processor)
    return processor
