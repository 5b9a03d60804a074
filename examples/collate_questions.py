# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Use the self-questioning collator alone: print which tokens of a conversation are trained on, and which of them belong
to a question.

```bash
python examples/collate_questions.py
```

The collator works with any trainer that accepts TRL's vision collator. Remove `question_mask` from the batch before
you call the model.
"""

from medst_trl import DataCollatorForSelfQuestioning
from medst_trl.demo.phantoms import instruct_rows, make_phantoms
from medst_trl.demo.tiny_model import tiny_llava


def main() -> dict[str, list[str]]:
    _, processor = tiny_llava()  # or AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
    collator = DataCollatorForSelfQuestioning(processor, sq_ratio=0.5, seed=0)
    conversation = next(iter(instruct_rows(make_phantoms(1, seed=0), seed=0)))

    trained = {}
    for epoch in range(2):  # the <vusr> turns are sampled again in every epoch
        collator.set_epoch(epoch)
        batch = collator([conversation])
        questions = batch.pop("question_mask")[0]
        labels = batch["labels"][0]
        print(f"\nepoch {epoch}, as the model reads it:\n  {shorten(processor.decode(batch['input_ids'][0]))}")
        for name, mask in {"questions": questions, "answers": (labels != -100) & ~questions}.items():
            text = processor.decode(labels[mask])
            trained.setdefault(name, []).append(text)
            print(f"trained {name}: {text}")
    return trained


def shorten(text: str, image: str = "<image>") -> str:
    """Replace the image placeholders, one per patch, by a single one."""
    before, _, after = text.partition(image)
    return before + image + after[after.rfind(image) + len(image) if image in after else 0 :].replace("\n", " ")


if __name__ == "__main__":
    main()
