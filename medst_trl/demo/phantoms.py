# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The source `phantoms`: synthetic scans with known truth, to try and to measure everything without medical data.

A phantom is a 64 x 64 gray image that looks a little like a CT, MRI or ultrasound scan, with or without one round
lesion. Because it is drawn, every question about it has one right answer, and an oracle can tell a right answer from
a wrong one. Left and right are those of the image, not of the patient.

Example:

```python
>>> from medst_trl.demo.phantoms import answer, instruct_rows, make_phantoms
>>> train, test = make_phantoms(1000, seed=0), make_phantoms(100, seed=0, split="test")
>>> conversations = list(instruct_rows(train, seed=0))
>>> answer("Is there a lesion in the scan?", test[0].truth)
'Yes'
```
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice, product

import numpy as np
from PIL import Image

from medst_trl.base.settings import documented
from medst_trl.data.images import MemoryImages, image_id
from medst_trl.data.schema import dialogue
from medst_trl.data.source import SOURCES, Conversation, Question, Records, Source, SourceCard, SourceRequest


SIZE = 64  # pixels
MODALITIES = ("CT", "MRI", "ultrasound")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
SIZES = ("small", "large")
BRIGHTNESSES = ("dark", "bright")
# A phantom's random stream starts from (split, seed, position), so no two splits and no two seeds share an image.
SPLITS = {"train": 0, "validation": 1, "test": 2, "unlabelled": 3}


@dataclass(frozen=True)
class Truth:
    """What a phantom shows. Without a lesion, `quadrant`, `size` and `brightness` are `None`."""

    modality: str
    lesion: bool
    quadrant: str | None = None
    size: str | None = None
    brightness: str | None = None


@dataclass(frozen=True)
class Phantom:
    """A drawn image (mode "L", 64 x 64), its truth and its questions in the format of a benchmark."""

    id: str
    image: Image.Image
    truth: Truth
    questions: list[dict]


# Every wording of every kind of question; {view} stands for any word of VIEWS. The kinds "bright" and "dark" are the
# two forms of one closed question, so that neither "Yes" nor "No" is the safer guess.
VIEWS = ("image", "scan")
QUESTIONS = {
    "presence": (
        "Is there a lesion in the {view}?",
        "Does the {view} show a lesion?",
        "Is a lesion visible in the {view}?",
    ),
    "modality": (
        "Which modality is shown?",
        "What kind of scan is this?",
        "Which imaging modality was used for this {view}?",
    ),
    "location": ("Where is the lesion?", "In which quadrant is the lesion?", "Where in the {view} is the lesion?"),
    "appearance": (
        "What does the lesion look like?",
        "How large and how bright is the lesion?",
        "What is the appearance of the lesion in the {view}?",
    ),
    "bright": ("Is the lesion bright?", "Is the lesion brighter than the tissue around it?"),
    "dark": ("Is the lesion dark?", "Is the lesion darker than the tissue around it?"),
    "description": ("What does the {view} show?", "Please describe the {view}.", "What is the finding in the {view}?"),
}
ANY_SCAN = ("presence", "modality", "description")  # kinds that a scan without a lesion answers too
CLOSED = ("presence", "bright", "dark")


def _normalize(question: str) -> str:
    return " ".join(question.split()).rstrip("?. ").lower()


_KINDS = {
    _normalize(wording.format(view=view)): kind
    for kind, wordings in QUESTIONS.items()
    for wording in wordings
    for view in VIEWS
}


def question_kind(question: str) -> str | None:
    """Return the kind of a question (a key of `QUESTIONS`) in any wording; `None` for other text."""
    return _KINDS.get(_normalize(question))


def is_well_formed(question: str, truth: Truth | None = None) -> bool:
    """
    Return whether the text is a question that phantoms answer; with `truth`, whether that phantom answers it.

    A scan without a lesion does not answer where the lesion is or what it looks like.
    """
    kind = question_kind(question)
    return kind is not None and (truth is None or truth.lesion or kind in ANY_SCAN)


def answer(question: str, truth: Truth) -> str:
    """
    Return the right answer to a question about a phantom with this truth.

    Raises:
        ValueError: if the phantom cannot answer the question (see `is_well_formed`).
    """
    if not is_well_formed(question, truth):
        raise ValueError(f"A phantom with {truth} does not answer {question!r}.")
    kind = question_kind(question)
    lesion = f"a {truth.size} {truth.brightness} lesion in the {truth.quadrant} quadrant"
    return {
        "presence": "Yes" if truth.lesion else "No",
        "bright": "Yes" if truth.brightness == "bright" else "No",
        "dark": "Yes" if truth.brightness == "dark" else "No",
        "modality": truth.modality,
        "location": f"In the {truth.quadrant} quadrant.",
        "appearance": f"It is {truth.size} and {truth.brightness}.",
        "description": f"The {truth.modality} scan shows {lesion if truth.lesion else 'no lesion'}.",
    }[kind]


def make_phantoms(n: int, seed: int, split: str = "train") -> list[Phantom]:
    """
    Draw `n` phantoms with balanced truths.

    Each block of 81 phantoms has each of the 48 truths with a lesion once, and each modality 11 times without one. The
    first phantoms of a longer list are those of a shorter one.

    Args:
        n (`int`):
            Number of phantoms.
        seed (`int`):
            Seed, not negative. Other seeds give other images.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"`, `"test"` or `"unlabelled"`. The splits share no image at any seed.

    Returns:
        `list[Phantom]`, with ids that are unique over splits and seeds.

    Raises:
        ValueError: for an unknown split.
    """
    return list(islice(draw_phantoms(seed, split), n))


def draw_phantoms(seed: int, split: str = "train") -> Iterator[Phantom]:
    """Yield the phantoms of [`make_phantoms`] one after another, without end."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r} of phantoms. Choose one of {', '.join(SPLITS)}.")
    for position in count():
        if position % len(_TRUTHS) == 0:
            order = np.random.default_rng((SPLITS[split], seed, 1, position)).permutation(len(_TRUTHS))
        truth = _TRUTHS[order[position % len(_TRUTHS)]]
        rng = np.random.default_rng((SPLITS[split], seed, 0, position))
        image, name = Image.fromarray(_draw(truth, rng)), f"phantom-{split}-{seed}-{position}"
        yield Phantom(name, image, truth, _ask(name, truth, rng))


def instruct_rows(phantoms: Iterable[Phantom], seed: int, turns: int | None = None) -> Iterator[dict]:
    """
    Yield one conversation per image in the instruct columns: `id`, `images`, `image_ids`, `messages`.

    Args:
        phantoms (iterable of [`Phantom`]):
            The phantoms.
        seed (`int`):
            Seed of the order of the questions, which is drawn for each image separately.
        turns (`int`, *optional*):
            Maximum number of questions. All by default: three without a lesion, otherwise six.
    """
    for phantom in phantoms:
        rng = np.random.default_rng((seed, *phantom.id.encode()))
        asked = [phantom.questions[index] for index in rng.permutation(len(phantom.questions))[:turns]]
        yield instruct_row(phantom.id, [(row["question"], row["answer"]) for row in asked], phantom.image)


def instruct_row(name: str, turns: Iterable[tuple[str, str]], *images: Image.Image) -> dict:
    """Return a conversation of questions and answers about phantoms, in the instruct columns."""
    ids = [image_id(image) for image in images]
    return {"id": name, "images": list(images), "image_ids": ids, "messages": dialogue(turns, len(images))}


_TRUTHS = [Truth(m, True, q, s, b) for m, q, s, b in product(MODALITIES, QUADRANTS, SIZES, BRIGHTNESSES)]
_TRUTHS += [Truth(m, False) for m in MODALITIES for _ in range(11)]


def _ask(name: str, truth: Truth, rng: np.random.Generator) -> list[dict]:
    """Return one question of each kind that the image answers, in a drawn wording; "bright" or "dark", not both."""
    kinds = ["presence", "modality", "description"]
    if truth.lesion:
        kinds += ["location", "appearance", str(rng.choice(BRIGHTNESSES))]
    questions = []
    for kind in kinds:
        question = str(rng.choice(QUESTIONS[kind])).format(view=rng.choice(VIEWS))
        topic = "brightness" if kind in BRIGHTNESSES else kind
        row = {"id": f"{name}-{topic}", "question": question, "answer": answer(question, truth)}
        row |= {"answer_type": "closed" if kind in CLOSED else "open", "question_type": topic, "link": None}
        questions.append(row)
    return questions


def _draw(truth: Truth, rng: np.random.Generator) -> np.ndarray:
    """Draw pixels, uint8 of shape (64, 64): background, tissue as the modality shows it, lesion, noise."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    center_x, center_y = SIZE / 2 + rng.uniform(-3, 3, size=2)
    if truth.modality == "ultrasound":  # a fan of speckle, as from a curved probe above the image
        depth, angle = np.hypot(x - center_x, y + 26), np.arctan2(x - center_x, y + 26)
        tissue = (depth > 29) & (depth < 86) & (np.abs(angle) < 0.62)
        pixels = np.where(tissue, 75 * rng.rayleigh(0.9, size=(SIZE, SIZE)), 0)
    else:
        width, height = SIZE * rng.uniform(0.40, 0.46, size=2)
        radius = np.hypot((x - center_x) / width, (y - center_y) / height)
        tissue = radius <= 1
        if truth.modality == "CT":  # uniform tissue inside a bright ring of bone
            pixels = np.where(tissue, np.where(radius > 0.92, 220, 110), 0)
        else:  # MRI: folded soft tissue without bone
            pixels = np.where(tissue, 110 + 40 * np.cos(12 * radius), 0)
    if truth.lesion:
        reach = SIZE * 0.19
        lesion_x = center_x + (reach if "right" in truth.quadrant else -reach) + rng.uniform(-3, 3)
        lesion_y = center_y + (reach if "lower" in truth.quadrant else -reach) + rng.uniform(-3, 3)
        radius = SIZE * (rng.uniform(0.115, 0.145) if truth.size == "large" else rng.uniform(0.055, 0.08))
        pixels[np.hypot(x - lesion_x, y - lesion_y) <= radius] = 245 if truth.brightness == "bright" else 8
    return np.clip(pixels + rng.normal(0, 8, size=(SIZE, SIZE)), 0, 255).astype(np.uint8)


@documented
@dataclass
class PhantomSettings:
    """
    Settings of the source `phantoms`.

    Args:
        num_phantoms (`int`, *optional*, defaults to `1000`):
            Number of scans with conversations, before the validation split.
        num_test_phantoms (`int`, *optional*, defaults to `300`):
            Number of scans in the benchmark.
        num_unlabelled_phantoms (`int`, *optional*, defaults to `0`):
            Number of scans without conversations.
        phantom_turns (`int`, *optional*):
            Maximum number of questions per conversation. Default: all.
    """

    num_phantoms: int = 1000
    num_test_phantoms: int = 300
    num_unlabelled_phantoms: int = 0
    phantom_turns: int | None = None


def read_phantoms(request: SourceRequest) -> Records:
    """Draw phantoms with their conversations and questions, as the settings say."""
    settings, seed = request.settings, request.seed
    train = make_phantoms(settings.num_phantoms, seed)
    test = make_phantoms(settings.num_test_phantoms, seed, split="test")
    unlabelled = make_phantoms(settings.num_unlabelled_phantoms, seed, split="unlabelled")
    rows = instruct_rows(train, seed, settings.phantom_turns)
    talks = [Conversation(row["id"], (row["id"],), row["messages"]) for row in rows]
    talks += [Conversation(phantom.id, (phantom.id,), []) for phantom in unlabelled]
    questions = [Question(images=(phantom.id,), split="test", **row) for phantom in test for row in phantom.questions]
    images = MemoryImages({phantom.id: phantom.image for phantom in train + test + unlabelled})
    return Records("phantoms", images=images, conversations=talks, questions=questions)


def _count(settings: PhantomSettings, kind: str, split: str) -> int | None:
    return {
        ("instruct", "train"): settings.num_phantoms,
        ("images", "train"): settings.num_unlabelled_phantoms,
        ("benchmark", "test"): settings.num_test_phantoms,
    }.get((kind, split))


SOURCES.register(
    Source(
        name="phantoms",
        summary="synthetic scans with known truth; needs no data",
        read=read_phantoms,
        card=SourceCard(
            "phantoms: synthetic scans with known truth, of no patient", licence="apache-2.0", synthetic=True
        ),
        settings=PhantomSettings,
        count=_count,
        needs_data=False,
    )
)
