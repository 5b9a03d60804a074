# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the tiny general-purpose model is trained on: plain text, and pictures of plain shapes with questions about them.

The text (`plain_text.yaml`) explains a few everyday and medical words. Nothing in it says what any picture shows, and
nothing in the pictures is medical: a picture is 64 x 64, gray, and shows one shape or none on a plain, striped, shaded
or grainy background.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from .phantoms import BRIGHTNESSES, QUADRANTS, SIZE, SIZES, instruct_row


_TEXT = yaml.safe_load(Path(__file__).with_name("plain_text.yaml").read_text(encoding="utf-8"))
DEFINITIONS: dict[str, str] = _TEXT["definitions"]
WORDS = tuple(_TEXT["words"].split())
BACKGROUNDS = ("plain", "striped", "shaded", "grainy")
SHAPES = ("square", "circle", "triangle")  # all are named "shape": at this size they are hard to tell apart


def training_conversations(num_texts: int, num_pictures: int, turns: int | None, seed: int) -> list[dict]:
    """Return the training data in order: text first, then pictures with a little text between them."""
    texts = list(explanations(num_texts, seed))
    later = [*conversations(draw_pictures(num_pictures, seed), seed, turns), *texts[: num_pictures // 30]]
    random.Random(seed).shuffle(later)
    return texts + later


# --- Text ------------------------------------------------------------------------------------------------------------


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


# --- Pictures --------------------------------------------------------------------------------------------------------


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
