# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Plain text without pictures, for the tiny general-purpose model: a few everyday and medical words explained.

A real base model knows the language of medicine before it sees a labelled scan. The tiny one learns it here. Nothing
in this text says what any picture shows.
"""

import random
from collections.abc import Iterator

from medst_trl.data.schema import message, text_part


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
    "What does brighter mean?": "Brighter means with more light than before, darker means with less.",
    "What does visible mean?": "Visible means that a person can see it.",
    "What does describe mean?": "Describe means to say what something looks like.",
    "What does shown mean?": "Something is shown when pictures show it for a person to see.",
    "What does appearance mean?": "The appearance is how something looks.",
    "What is a question?": "A question begins with What, Which, Where, How, Is or Does and ends with ?",
    "What is an answer?": "An answer begins with Yes, No, It or In.",
    "What is a location?": "The location is where something is, upper or lower, left or right.",
    "What is a size?": "The size is how large or small something is.",
    "Which kinds of scan are there?": "There is CT, there is MRI and there is ultrasound.",
    "What do doctors say?": (
        "Please describe what this scan shows, which modality was used and what kind of lesion it has."
    ),
    "What lies around a lesion?": "The tissue around it.",
}

# Words of the phantoms, the shapes and everyday language that should be one token each.
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
    """.split()  # noqa: SIM905 (as a list of strings it would be unreadable)
)


def all_texts() -> Iterator[str]:
    """Yield all of the text once, to train a tokenizer on."""
    for question, answer in DEFINITIONS.items():
        yield f"{question} {answer}"
    yield "\n".join(WORDS)
    yield " " + " ".join(WORDS * 2)  # most words follow a space
    yield "USER: x ASSISTANT: x USER: x ASSISTANT: x"


def conversations(n: int, seed: int) -> Iterator[dict]:
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
        messages = [
            message("user", [text_part(question)]),
            message("assistant", [text_part(DEFINITIONS[question])]),
        ]
        yield {"id": f"text-{seed}-{index}", "images": [], "image_ids": [], "messages": messages}
