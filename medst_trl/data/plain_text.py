# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Plain text without pictures: what the tiny general-purpose model has read before it meets a patient.

A real base model knows the language of medicine long before it has seen a labelled scan. The tiny one gets that from
here: definitions and repeated words, everyday and medical. Nothing in it says what any picture shows.
"""

from collections.abc import Iterator

import numpy as np


DEFINITIONS = {
    "What is a lesion?": "A lesion is a place where the tissue has changed.",
    "What is CT?": "CT is an imaging modality that uses x-rays.",
    "What is MRI?": "MRI is an imaging modality that uses a magnetic field.",
    "What is ultrasound?": "An ultrasound scan uses sound.",
    "What is a modality?": "A modality is a kind of imaging.",
    "What is a scan?": "A scan is a medical image of a patient.",
    "What is a quadrant?": "A quadrant is one of the four parts of an image.",
    "What is a finding?": "A finding is what a doctor sees in a scan.",
    "What is a radiologist?": "A radiologist is a doctor who looks at images.",
    "What is tissue?": "Tissue is what a body is made of.",
    "What is a diagnosis?": "A diagnosis is the name of a disease.",
    "What is a corner?": "A corner is where two sides meet.",
    "What is a square?": "A square is a shape with four equal sides.",
    "What is a circle?": "A circle is a round shape.",
    "What is a triangle?": "A triangle is a shape with three sides.",
    "What is a picture?": "A picture shows how something looks.",
    "What does bright mean?": "Bright means full of light.",
    "What does dark mean?": "Dark means without light.",
    "What does brighter mean?": "Brighter means with more light, darker means with less.",
    "What does visible mean?": "Visible means that it can be seen.",
    "What does it mean to describe?": "To describe is to say what something looks like.",
    "What does appearance mean?": "The appearance is how something looks.",
}

# Every word of the phantoms, of the shapes and of everyday talk that should be one token.
WORDS = tuple(
    """
    Yes No yes no A An The It In On This There Is Are Does Do What Which Where How Who Why When Can Please Describe
    Repeat a an the it its in on at of to is are was were be been do does did has have had can could will would should
    may might and or not but if then than as by for from with without into over under around between near about after
    before this that these those there here what which where how who why when one two three four five six all any some
    both each more most less other same such only very also like used shown shows show see seen look looks describe
    please kind type part parts place side sides half full left right upper lower top bottom middle corner corners
    centre center front back quadrant background plain striped shaded grainy square circle triangle shape shapes
    picture pictures image images small large big little tiny bright dark brighter darker light white black grey red
    green blue round visible present absent normal abnormal medical imaging modality modalities scan scans CT MRI
    ultrasound x-ray chest abdomen head brain lung lungs heart liver kidney bone skull tissue lesion lesions tumor mass
    nodule fracture fluid finding findings appearance location size patient doctor body disease diagnosis contrast
    organ man woman child people person dog cat house tree car street water day night year time world work life hand
    eye food good new old first last long great own high different next early young important few public able
    """.split()
)


def everything() -> Iterator[str]:
    """All of the text once, to train a tokenizer on."""
    for question, answer in DEFINITIONS.items():
        yield f"{question} {answer}"
    yield "\n".join(WORDS)
    yield " " + " ".join(WORDS * 2)  # mostly a blank stands before a word
    yield "USER: x ASSISTANT: x USER: x ASSISTANT: x"


def conversations(n: int, seed: int, turns: int = 4) -> Iterator[dict]:
    """Conversations without a picture in the instruct columns: words are explained, or repeated.

    Args:
        n (`int`): How many.
        seed (`int`): Not negative.
        turns (`int`, *optional*, defaults to `4`): Questions in each.
    """
    for index in range(n):
        rng = np.random.default_rng((seed, index))
        messages = [message for _ in range(turns) for message in _exchange(rng)]
        yield {"id": f"text-{seed}-{index}", "images": [], "image_ids": [], "messages": messages}


def _exchange(rng: np.random.Generator) -> list[dict]:
    if rng.random() < 0.3:
        question = str(rng.choice(tuple(DEFINITIONS)))
        answer = DEFINITIONS[question]
    else:
        answer = " ".join(rng.choice(WORDS, size=rng.integers(1, 6)))
        question = f"Please repeat: {answer}"
    return [
        {"role": role, "content": [{"type": "text", "text": text}], "vusr": False}
        for role, text in (("user", question), ("assistant", answer))
    ]
