# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What cards say of each kind of result, of its columns and of its sources."""

ABOUT = {
    "instruct": "Conversations about medical images, for instruction tuning.",
    "images": "Medical images without labels, to ask questions about.",
    "benchmark": "Questions about medical images with reference answers, for evaluation.",
    "candidates": "Questions that a model asked about medical images, each with answers it gave, to be judged.",
    "preferences": "Preference pairs about medical images: a question and two answers, the better one chosen.",
    "adapter": "A LoRA adapter that makes a vision-language model answer and ask questions about medical images.",
    "model": "A vision-language model for questions about medical images.",
}
USE = {
    "instruct": "Train on it with `medst sft --dataset {id}`.",
    "images": "Ask about them with `medst generate --images {id}`.",
    "benchmark": "Evaluate on it with `medst evaluate --benchmark {id}`.",
    "candidates": "Judge them with `medst judge --candidates {id}`.",
    "preferences": "Train on it with `medst dpo --dataset {id}`, or with TRL's `DPOTrainer`, whose columns it has.",
}
COLUMNS = {
    "id": "name of the record",
    "images": "the images, in the order of the image parts",
    "image": "the image",
    "image_ids": "SHA-256 of the pixels of each image",
    "image_id": "SHA-256 of the pixels of the image",
    "messages": "`role` and `content` as typed parts (`image`, `text`); `vusr`: the model is to write this user turn",
    "questions": "`question`, `answer`, `answer_type` (open, closed), `question_type`, `link` (of wordings of one)",
    "prompt": "messages up to the question",
    "answers": "the answers, the first and second of which are compared",
    "chosen": "the better answer, as a message",
    "rejected": "the worse answer, as a message",
    "score_chosen": "the judge's mean score of the better answer",
    "score_rejected": "that of the worse one",
    "generation": "how question and answers were drawn, as JSON",
    "judge": "who judged, and what was said in both orders, as JSON",
}
SOURCES = {
    "vqa_rad": "[VQA-RAD](https://osf.io/89kps/) (radiology; images from MedPix)",
    "vqa_rad_mevf": "[VQA-RAD](https://osf.io/89kps/) in MEVF's split (radiology; images from MedPix)",
    "slake": "[SLAKE](https://www.med-vqa.com/slake/) (radiology)",
    "pathvqa": "[PathVQA](https://github.com/UCSD-AI4H/PathVQA) (pathology)",
    "llava": "conversations in LLaVA's form, of a collection named by whoever published this",
    "images": "images of whoever published this",
    "phantoms": "phantoms: drawn scans with known truth, of no patient",
}
