# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A LLaVA small enough to be built and trained anywhere, with every part of a real one, and its training data.

CLIP vision tower, two-layer projector, Llama, byte-level BPE tokenizer, Vicuna's chat template. The weights are
random: `medst base` trains them on the data below; tests use them as they are.

The data are plain text (`plain_text.yaml`), which explains a few everyday and medical words, and pictures of plain
shapes with questions about them. Nothing in the text says what any picture shows, and nothing in the pictures is
medical: a picture is 64 x 64, gray, and shows one shape or none on a plain, striped, shaded or grainy background.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from medst_trl.policy.chat_template import vicuna_template

from .phantoms import BRIGHTNESSES, QUADRANTS, SIZE, SIZES, instruct_row


CHAT_TEMPLATE = vicuna_template(write_bos=True, system="")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

_TEXT = yaml.safe_load(Path(__file__).with_name("plain_text.yaml").read_text(encoding="utf-8"))
DEFINITIONS: dict[str, str] = _TEXT["definitions"]
WORDS = tuple(_TEXT["words"].split())
BACKGROUNDS = ("plain", "striped", "shaded", "grainy")
SHAPES = ("square", "circle", "triangle")  # all are named "shape": at this size they are hard to tell apart


def tiny_llava(
    *,
    image_size: int = 64,
    patch_size: int = 16,
    vision_size: int = 128,
    vision_layers: int = 3,
    text_size: int = 128,
    text_layers: int = 2,
    head_size: int = 32,
    vocab_size: int = 1024,
    spare_rows: int = 0,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    Build a LLaVA with random weights, and its processor.

    Args:
        image_size (`int`, *optional*, defaults to `64`):
            Side of the square that images are resized and cropped to, in pixels.
        patch_size (`int`, *optional*, defaults to `16`):
            Side of a patch, in pixels. An image takes `(image_size / patch_size) ** 2` tokens.
        vision_size (`int`, *optional*, defaults to `128`):
            Hidden size of the vision tower, a multiple of `head_size`.
        vision_layers (`int`, *optional*, defaults to `3`):
            Number of layers of the vision tower. As in LLaVA-1.5 the features are those before the last layer, which
            is not used.
        text_size (`int`, *optional*, defaults to `128`):
            Hidden size of the language model, a multiple of `head_size`.
        text_layers (`int`, *optional*, defaults to `2`):
            Number of layers of the language model.
        head_size (`int`, *optional*, defaults to `32`):
            Size of one attention head.
        vocab_size (`int`, *optional*, defaults to `1024`):
            Largest number of tokens of the tokenizer, at least 261 (the bytes and the special tokens).
        spare_rows (`int`, *optional*, defaults to `0`):
            Rows of the embedding after the last token, as in models with a padded vocabulary.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output layer shares the embedding's weights.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state does not change.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`

    Example:
    ```python
    >>> model, processor = tiny_llava()  # 1.0M parameters
    >>> small = {"vision_size": 32, "vision_layers": 2, "text_size": 32, "text_layers": 1, "vocab_size": 300}
    >>> model, processor = tiny_llava(**small)  # 50k
    ```
    """
    tokenizer = train_tokenizer(all_texts(), vocab_size)
    processor = _processor(tokenizer, image_size, patch_size)
    vision, text = _tower(vision_size, vision_layers, head_size), _tower(text_size, text_layers, head_size)
    vision |= {"image_size": image_size, "patch_size": patch_size}
    text |= {"vocab_size": len(tokenizer) + spare_rows, "tie_word_embeddings": tie_word_embeddings}
    config = _config(tokenizer, vision, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # CLIP draws position embeddings 25 times smaller than patch embeddings turn out. A large tower learns to read
        # them over millions of images; a tiny one never learns where anything is.
        model.model.vision_tower.embeddings.position_embedding.weight.mul_(25)
        if not tie_word_embeddings:
            # Adapters do not train the output layer. Drawn as small as the others, it would give no token a
            # probability near one, and sampled texts would be random.
            model.lm_head.weight.mul_(4)
    return model.eval(), processor


def _processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaProcessor:
    square = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        # The other image processor needs torchvision.
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the select strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def _tower(size: int, layers: int, head_size: int) -> dict[str, int]:
    return {
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_hidden_layers": layers,
        "num_attention_heads": size // head_size,
    }


def _config(tokenizer: PreTrainedTokenizerFast, vision: dict, text: dict) -> LlavaConfig:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(
            max_position_embeddings=2048,
            initializer_range=0.06,  # the usual 0.02 suits sizes in the thousands; at 128 little would pass through
            **text,
            **special,
        ),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=text["tie_word_embeddings"],
        **special,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer. It can write any text, and the words of `texts` take few tokens.

    Args:
        texts (`Iterable[str]`):
            Texts that give the words.
        vocab_size (`int`):
            Largest number of tokens, at least 261 (the bytes and the special tokens).

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


# --- Training data ---------------------------------------------------------------------------------------------------


def training_conversations(num_texts: int, num_pictures: int, turns: int | None, seed: int) -> list[dict]:
    """Return the training data in order: text first, then pictures with a little text between them."""
    texts = list(explanations(num_texts, seed))
    later = [*conversations(draw_pictures(num_pictures, seed), seed, turns), *texts[: num_pictures // 30]]
    random.Random(seed).shuffle(later)
    return texts + later


def all_texts() -> Iterator[str]:
    """Yield all of the text once, to train a tokenizer on."""
    for question, answer in DEFINITIONS.items():
        yield f"{question} {answer}"
    yield "\n".join(WORDS)
    yield " " + " ".join(WORDS * 2)  # most words follow a space
    yield "USER: x ASSISTANT: x USER: x ASSISTANT: x"


def explanations(n: int, seed: int) -> Iterator[dict]:
    """
    Yield conversations without a picture in the instruct columns, each explaining one word.

    Args:
        n (`int`): Number of conversations.
        seed (`int`): Seed of their order.
    """
    rng, questions = random.Random(seed), list(DEFINITIONS)
    for index in range(n):
        if index % len(questions) == 0:
            rng.shuffle(questions)
        question = questions[index % len(questions)]
        yield instruct_row(f"text-{seed}-{index}", [(question, DEFINITIONS[question])])


@dataclass(frozen=True)
class Picture:
    """
    A drawn picture (mode "L", 64 x 64) and what it shows; `corner`, `size` and `brightness` only with a shape.
    """

    image: Image.Image
    background: str
    corner: str | None = None
    size: str | None = None
    brightness: str | None = None


def draw_pictures(n: int, seed: int) -> list[Picture]:
    """
    Draw pictures, seven in ten of them with a shape.

    Args:
        n (`int`): Number of pictures. A longer list starts with the pictures of a shorter one.
        seed (`int`): Seed, not negative.
    """
    return [_picture(np.random.default_rng((seed, position))) for position in range(n)]


def questions(picture: Picture, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return questions about a picture with their answers, in random order and wording."""
    view, guess = rng.choice(("picture", "image")), rng.choice(BRIGHTNESSES)
    asked = [
        (f"What is the background of the {view}?", f"The background is {picture.background}."),
        (f"Is there a shape in the {view}?", "Yes" if picture.corner else "No"),
    ]
    if picture.corner is None:
        asked.append((f"Please describe the {view}.", f"A {picture.background} {view} with no shape."))
    else:
        where, look = f"the {picture.corner} corner", f"{picture.size} {picture.brightness} shape"
        asked += [
            (str(rng.choice(("Where is the shape?", "In which corner is the shape?"))), f"In {where}."),
            ("What does the shape look like?", f"It is {picture.size} and {picture.brightness}."),
            (f"Is the shape {guess}?", "Yes" if guess == picture.brightness else "No"),
            (f"Please describe the {view}.", f"A {picture.background} {view} with a {look} in {where}."),
        ]
    return [asked[index] for index in rng.permutation(len(asked))]


def conversations(pictures: list[Picture], seed: int, turns: int | None = None) -> Iterator[dict]:
    """
    Yield one conversation per picture in the instruct columns: `id`, `images`, `image_ids`, `messages`.

    Args:
        pictures (`list[Picture]`): The pictures.
        seed (`int`): Seed of the order and wording of the questions.
        turns (`int`, *optional*): Largest number of questions. Defaults to all.
    """
    for position, picture in enumerate(pictures):
        asked = questions(picture, np.random.default_rng((seed, position, 1)))[:turns]
        yield instruct_row(f"shape-{seed}-{position}", asked, picture.image)


def _picture(rng: np.random.Generator) -> Picture:
    background = str(rng.choice(BACKGROUNDS))
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    pixels = np.full((SIZE, SIZE), 110 + rng.uniform(-20, 20))
    if background == "striped":
        pixels += 35 * np.sin(0.8 * (x if rng.random() < 0.5 else y))
    elif background == "shaded":
        pixels += 1.2 * rng.choice((-1, 1)) * ((x if rng.random() < 0.5 else y) - SIZE / 2)
    elif background == "grainy":
        pixels *= rng.rayleigh(0.75, size=pixels.shape)
    facts = {}
    if rng.random() < 0.7:
        possible = {"corner": QUADRANTS, "size": SIZES, "brightness": BRIGHTNESSES}
        facts = {name: str(rng.choice(values)) for name, values in possible.items()}
        radius = SIZE * (rng.uniform(0.11, 0.14) if facts["size"] == "large" else rng.uniform(0.05, 0.075))
        corner = np.array((1 if "right" in facts["corner"] else -1, 1 if "lower" in facts["corner"] else -1))
        center_x, center_y = SIZE / 2 + SIZE * 0.19 * corner + rng.uniform(-6, 6, size=2)
        inside = _inside(str(rng.choice(SHAPES)), (x - center_x) / radius, (y - center_y) / radius)
        pixels[inside] = 245 if facts["brightness"] == "bright" else 8
    pixels += rng.normal(0, 8, size=pixels.shape)
    return Picture(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), background, **facts)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return whether pixels are inside a shape of radius 1 around the origin."""
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.9
    if shape == "circle":
        return np.hypot(x, y) <= 1
    return (y <= 1) & (np.abs(x) <= 0.65 * (y + 1.2))  # triangle, of nearly the same area
