# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Models with random weights and data with exact token lengths for the benchmarks.

Speed depends only on sizes and lengths, so nothing is downloaded. The lengths are recorded from real data; the words
are random.
"""

import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value

from medst_trl.data.schema import image_part, instruct_features, message, text_part
from medst_trl.demo.tiny_model import CHAT_TEMPLATE, WORDS, all_texts, train_tokenizer


if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


@dataclass(frozen=True)
class Shape:
    """
    Sizes of a LLaVA model and of the data of its benchmarks.

    Args:
        vision (`dict`): Arguments of `CLIPVisionConfig` for the vision tower.
        text (`dict`): Arguments of `LlamaConfig` for the language model.
        dtype (`torch.dtype`): Data type of the weights.
        device (`str`): Default device.
        lora (`bool`): Whether to train the paper's adapter instead of all weights.
        dpo (`tuple[int, int]`): Number of pairs per batch and of batches per repetition.
        sft (`tuple[int, int]`): Number of conversations per batch and of batches per repetition.
        generation (`tuple[int, int, int, int]`):
            Number of images for ours, of images for `batch 1`, of tokens per question and of tokens per answer.
    """

    vision: dict
    text: dict
    dtype: torch.dtype
    device: str
    lora: bool
    dpo: tuple[int, int]
    sft: tuple[int, int]
    generation: tuple[int, int, int, int]

    @property
    def image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


SHAPES = {
    # For tests; its speed is meaningless.
    "tiny": Shape(
        vision={"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 2},
        text={"vocab_size": 1088, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 2048},
        dtype=torch.float32, device="cpu", lora=False, dpo=(2, 2), sft=(4, 2), generation=(3, 2, 8, 6),
    ),
    # LLaVA-1.5's image (336 pixels, 576 tokens) and so its lengths, with a model for which 5 repetitions of everything
    # take minutes on two cores. It is wide and deep enough (384, 4 layers) that matrix products dominate, not Python.
    # The vision tower has about 5% of the operations of a step of stock TRL, similar to the 7B model (4%).
    "cpu": Shape(
        vision={"image_size": 336, "patch_size": 14, "hidden_size": 128, "intermediate_size": 512,
                "num_hidden_layers": 4, "num_attention_heads": 2},
        text={"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
              "num_attention_heads": 6, "max_position_embeddings": 2048},
        dtype=torch.float32, device="cpu", lora=False, dpo=(2, 2), sft=(4, 2), generation=(8, 2, 24, 80),
    ),
    # The same with 64 tokens per image, as in SmolVLM and for small images in Qwen-VL: texts determine the lengths.
    "cpu_64": Shape(
        vision={"image_size": 112, "patch_size": 14, "hidden_size": 128, "intermediate_size": 512,
                "num_hidden_layers": 4, "num_attention_heads": 2},
        text={"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
              "num_attention_heads": 6, "max_position_embeddings": 2048},
        dtype=torch.float32, device="cpu", lora=False, dpo=(4, 2), sft=(8, 2), generation=(8, 2, 24, 80),
    ),
    # https://huggingface.co/llava-hf/llava-1.5-7b-hf/blob/main/config.json
    "llava_7b": Shape(
        vision={"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096,
                "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768},
        text={"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        dtype=torch.bfloat16, device="cuda", lora=True, dpo=(8, 4), sft=(16, 4), generation=(128, 2, 32, 128),
    ),
}  # fmt: skip

# Tokens of LLaVA-1.5's prompt with a short question, including the image and the template.
PROMPT_TOKENS = 600

# Tokens of answer pairs, including the terminator, with the tokenizer of Llama 2.
ANSWER_LENGTHS = {
    "80": [(80, 80)],
    # GPT-4's and LLaVA-Med's answers to 30 of LLaVA-Med's 193 questions (`llava_med_eval_qa50_gpt4_judged.jsonl`), for
    # which both answers have 80 to 150 tokens.
    "gpt": [
        (142, 100), (147, 133), (112, 94), (95, 90), (132, 83), (125, 138), (136, 104), (91, 111), (88, 114),
        (96, 92), (116, 105), (81, 121), (150, 130), (124, 111), (102, 108), (92, 84), (116, 119), (124, 141),
        (102, 107), (81, 120), (85, 85), (115, 109), (129, 139), (102, 108), (145, 125), (116, 98), (148, 124),
        (121, 116), (103, 108), (130, 87),
    ],
    # Chosen and rejected answers of every 56th of MMedPO's 1,797 pairs about VQA-RAD
    # (`mmedpo_vqa-rad_dpo_weighted.json`).
    "short": [
        (2, 44), (2, 23), (13, 18), (5, 19), (2, 14), (4, 13), (2, 16), (2, 18), (3, 3), (2, 23), (8, 37), (7, 18),
        (8, 31), (2, 35), (3, 15), (2, 14), (6, 26), (4, 113), (5, 15), (2, 20), (22, 43), (8, 19), (2, 22), (6, 20),
        (2, 17), (2, 19), (2, 32), (6, 5), (2, 18), (2, 33), (5, 14), (2, 2),
    ],
}  # fmt: skip

# Tokens of question, answer, question, answer, ... of VQA-RAD's training questions as conversations about an image
# (`medst prepare --source vqa_rad`): every 12th of 588, with the tokenizer of Llama 2.
VQA_RAD_TURNS = [
    [9, 1, 9, 3, 8, 8, 8, 2], [10, 1, 12, 1, 9, 1], [10, 1, 20, 3, 23, 1, 7, 1], [11, 1, 13, 1, 9, 1, 10, 1],
    [14, 1], [10, 4, 9, 7, 8, 4], [9, 1, 7, 3, 8, 3], [6, 6, 10, 2, 8, 1], [8, 1, 9, 5, 9, 1], [8, 6, 13, 5, 15, 1],
    [13, 4, 10, 4, 12, 1], [9, 1, 11, 4], [10, 2, 14, 1], [13, 1, 10, 1], [9, 1, 10, 1, 12, 1, 9, 1],
    [11, 1, 7, 5, 20, 13, 10, 1, 12, 1, 9, 1, 9, 1], [7, 1, 10, 1, 10, 1, 11, 1], [8, 1, 9, 1, 6, 12],
    [7, 1, 6, 2, 10, 3, 13, 4, 10, 3, 13, 16], [11, 1, 7, 1, 5, 2, 6, 8, 11, 1, 7, 1], [7, 1, 7, 1, 6, 1],
    [11, 1, 10, 1, 11, 2], [16, 1], [7, 4, 10, 1, 6, 1, 10, 16, 9, 1, 11, 5], [9, 1, 7, 6, 6, 1, 13, 5],
    [9, 1, 11, 2, 8, 4, 11, 2], [8, 1, 7, 1, 8, 1, 21, 3, 10, 1, 13, 16], [11, 4, 7, 1, 8, 1, 10, 1],
    [14, 1, 13, 1, 8, 2, 8, 7], [8, 2, 6, 1, 20, 3], [11, 1, 8, 1, 12, 2], [10, 1, 15, 5], [9, 1, 11, 1],
    [9, 1, 7, 1, 15, 1], [5, 3, 18, 1, 8, 4], [7, 1, 7, 2], [8, 1, 13, 6], [8, 6, 7, 20, 11, 3],
    [14, 1, 14, 1, 10, 4], [13, 7, 13, 1], [9, 3], [13, 1, 10, 4], [11, 1, 8, 2, 9, 4], [6, 1, 12, 3, 8, 6, 18, 2],
    [8, 2, 11, 3, 13, 6], [10, 1, 8, 1, 12, 6, 10, 1], [15, 1, 8, 4, 11, 1, 7, 3, 7, 1, 6, 1], [9, 14],
]  # fmt: skip


def build_processor(shape: Shape) -> "LlavaProcessor":
    """
    Build a processor like LLaVA-1.5's. Its template contains the beginning-of-sequence token, so that stock TRL, which
    does not add one, encodes the same text.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = shape.vision["image_size"]
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=train_tokenizer(all_texts(), 1024),
        patch_size=shape.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the select strategy removes
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    shape: Shape, processor: "LlavaProcessor", device: torch.device, attention: str = "sdpa", seed: int = 0
) -> "LlavaForConditionalGeneration":
    """
    Build a LLaVA with random weights on the device. Its vocabulary has spare rows, so `<vusr>` does not resize it.
    """
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    tokenizer = processor.tokenizer
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision),
        text_config=LlamaConfig(**shape.text, **special),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **special,
    )
    with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=shape.dtype, attn_implementation=attention).eval()


def known_words(processor: "LlavaProcessor") -> list[str]:
    """Return the words that are a single token after a space and at the start of a line."""
    tokens = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    newline = len(tokens("\n"))
    return [w for w in WORDS if len(tokens(f" {w}")) == 1 and len(tokens(f"\n{w}")) == newline + 1]


def image_files(count: int, directory: Path | None, seed: int = 0) -> Iterator[bytes]:
    """Yield JPEG files: those of a directory, repeated, or generated ones of 0.65 megapixels, the mean of VQA-RAD."""
    from PIL import Image as PILImage

    if directory is not None:
        paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        yield from (path.read_bytes() for path in islice(cycle(paths), count))
        return
    rng = np.random.default_rng(seed)
    for _ in range(count):
        coarse = PILImage.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((768, 848), PILImage.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield file.getvalue()


def answer_lengths(name_or_file: str) -> list[tuple[int, int]]:
    """
    Return the tokens of chosen and rejected answers, from `ANSWER_LENGTHS` or from a JSON file: `[[120, 95], ...]`.
    """
    if name_or_file in ANSWER_LENGTHS:
        return ANSWER_LENGTHS[name_or_file]
    return [(int(chosen), int(rejected)) for chosen, rejected in json.loads(Path(name_or_file).read_text())]


def preference_pairs(
    shape: Shape,
    processor: "LlavaProcessor",
    lengths: Sequence[tuple[int, int]],
    count: int,
    images: Path | None = None,
    seed: int = 0,
) -> Dataset:
    """
    Make pairs with prompts of exactly [`prompt_tokens`] tokens and answers of the given lengths, which are repeated.

    Returns:
        `Dataset`: Columns `id`, `images`, `prompt`, `chosen`, `rejected`.
    """
    words, rng = known_words(processor), random.Random(seed)
    question_words = prompt_tokens(shape) - _tokens_around_question(shape, processor)
    part = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(part)})
    features = Features({"id": Value("string"), "images": List(Image())} | dict.fromkeys(_MESSAGE_COLUMNS, messages))
    rows = []
    for number, image in enumerate(image_files(count, images)):
        chosen, rejected = lengths[number % len(lengths)]
        # Different first words, because pairs with equal answers are rejected.
        first, other = rng.sample(words, 2)
        question = _words(words, question_words, rng)
        rows.append(
            {
                "id": f"p{number}",
                "images": [{"bytes": image, "path": None}],
                "prompt": [{"role": "user", "content": [image_part(), text_part(question)]}],
                "chosen": [_answer(_words(words, chosen - 1, rng, first))],
                "rejected": [_answer(_words(words, rejected - 1, rng, other))],
            }
        )
    return Dataset.from_list(rows, features=features)


_MESSAGE_COLUMNS = ("prompt", "chosen", "rejected")


def prompt_tokens(shape: Shape) -> int:
    """Return the tokens of a preference pair's prompt: 24 more than an image has, and so 600 for 576 image tokens."""
    return shape.image_tokens + PROMPT_TOKENS - 576


def conversations(
    shape: Shape,
    processor: "LlavaProcessor",
    count: int,
    turns: Sequence[Sequence[int]] = VQA_RAD_TURNS,
    images: Path | None = None,
    seed: int = 0,
) -> Dataset:
    """Make conversations about images with questions and answers of exactly the given lengths, which are repeated."""
    words, rng = known_words(processor), random.Random(seed)
    rows = []
    for number, image in enumerate(image_files(count, images)):
        messages = []
        for turn, length in enumerate(turns[number % len(turns)]):
            image_parts = [] if messages else [image_part()]
            role = "assistant" if turn % 2 else "user"
            messages.append(message(role, [*image_parts, text_part(_words(words, length, rng))]))
        rows.append(
            {
                "id": f"c{number}",
                "images": [{"bytes": image, "path": None}],
                "image_ids": [f"i{number}"],
                "messages": messages,
            }
        )
    return Dataset.from_list(rows, features=instruct_features())


def unlabeled_images(count: int, images: Path | None = None, seed: int = 0) -> Dataset:
    """Make a dataset of images without conversations, like that of `medst prepare --source images`."""
    rows = [
        {"id": f"u{number}", "images": [{"bytes": image, "path": None}], "image_ids": [f"i{number}"], "messages": []}
        for number, image in enumerate(image_files(count, images, seed))
    ]
    return Dataset.from_list(rows, features=instruct_features())


def _words(words: list[str], count: int, rng: random.Random, first: str | None = None) -> str:
    chosen_words = [rng.choice(words) for _ in range(count)]
    return " ".join([first, *chosen_words[1:]] if first and chosen_words else chosen_words)


def _answer(text: str) -> dict:
    return {"role": "assistant", "content": [text_part(text)]}


def _tokens_around_question(shape: Shape, processor: "LlavaProcessor") -> int:
    text = processor.apply_chat_template(
        [{"role": "user", "content": [image_part(), text_part("")]}], add_generation_prompt=True, tokenize=False
    )
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) - 1 + shape.image_tokens
