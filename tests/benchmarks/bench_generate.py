# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Time to generate a question about an image and two answers to it: ours, and one text per batch.

```bash
python tests/benchmarks/bench_generate.py                                  # a minute on two cores
python tests/benchmarks/bench_generate.py --shape llava_7b --output generate_7b.json
```

- `batch 1`: as in the original STLLaVA-Med code, `model.generate` for one text per batch, with one global seed; the
  image is preprocessed and encoded for each of the three texts
- `ours`: `CandidateGenerator` with its own engine

Both use the same weights, images, prompts and sampling (temperature 1.2, top-k 100, top-p 0.95). Terminators are
suppressed, so every text has exactly the requested number of tokens. `batch 1` uses only the first of the images, and
figures are per candidate (a question and two answers). The floor is the time of the prompts at the rate of a large
matrix product plus the time of each token: reading all weights and the cache at the rate of a memory copy, shared by
the texts of a batch, or computing the operations, whichever takes longer. Small weights may stay in the CPU's cache,
and the measured time can then be below this floor.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from datasets import Dataset
from flops import Layout, decoding_bytes, forward, weights_of
from measure import Machine, PeakMemory, Row, Run, add_common_arguments, alternate, report, synchronize
from shapes import PROMPT_TOKENS, SHAPES, build_model, build_processor, unlabeled_images

from medst_trl.engines.decoding import chat_inputs
from medst_trl.engines.engine import Sampling, to_answer, to_ask
from medst_trl.engines.kinds.transformers import largest_batch
from medst_trl.policy.loading import prepare_policy
from medst_trl.selftrain.candidates import CandidateGenerator


NUM_ANSWERS = 2


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of a question and of an answer."""

    question: int
    answer: int

    @property
    def candidate(self) -> int:
        return self.question + NUM_ANSWERS * self.answer


class AcceptAll:
    """Question filter that accepts every text, because models with random weights write no real questions."""

    def problem(self, reply, earlier=()) -> None:
        return None


def suppress_terminators(model, processor) -> None:
    """
    Keep terminators and vocabulary rows without a token out of the 100 most likely tokens, in place.

    Their logits become zero, which is below half of the other logits.
    """
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[len(processor.tokenizer) :] = 0
        head[processor.tokenizer.all_special_ids] = 0


def one_text_per_batch(model, processor, dataset: Dataset, lengths: Lengths, seed: int = 0) -> list[list[str]]:
    """Generate the question and the answers about each image, with one call of `generate` per text."""
    torch.manual_seed(seed)

    def write(messages: list[dict], image, max_new_tokens: int) -> str:
        inputs = chat_inputs(processor, [messages], [[image]]).to(model.device, model.dtype)
        output = model.generate(
            **inputs, do_sample=True, temperature=1.2, top_k=100, top_p=0.95, max_new_tokens=max_new_tokens,
            use_cache=True,
        )  # fmt: skip
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    candidates = []
    with torch.inference_mode():
        for record in dataset:
            image = record["images"][0]
            question = write(to_ask([], 1), image, lengths.question)
            answers = [write(to_answer([], 1, question), image, lengths.answer) for _ in range(NUM_ANSWERS)]
            candidates.append([question, *answers])
    return candidates


def make_generator(model, processor, lengths: Lengths, batch_size: int | None) -> CandidateGenerator:
    """Make our generator for texts of the given lengths."""
    return CandidateGenerator(
        model, processor, num_questions=1, num_answers=NUM_ANSWERS, batch_size=batch_size,
        question_sampling=Sampling(max_new_tokens=lengths.question),
        answer_sampling=Sampling(max_new_tokens=lengths.answer), question_filter=AcceptAll(),
    )  # fmt: skip


def run_timed(device: torch.device, model, candidates: int, work) -> Run:
    with PeakMemory(device, lambda: [*model.parameters(), *model.buffers()]) as memory:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - start
    return Run(seconds, candidates, peak_bytes=memory.peak_bytes)


def floor(model, processor, machine: Machine, lengths: Lengths, texts: int, shared: bool) -> tuple[float, float]:
    """
    Return the operations of a candidate and the minimum time in seconds.

    Args:
        texts (`int`): Number of answers per batch.
        shared (`bool`): Whether each image and each prompt of answers is encoded only once.
    """
    config, weights = model.config, weights_of(model)
    image = Layout(images=1, lengths=(), scored=0)
    ask_tokens = _prompt_tokens(processor, to_ask([], 1))
    answer = _prompt_tokens(processor, to_answer([], 1, "")) + lengths.question
    num_answer_prompts = 1 if shared else NUM_ANSWERS
    images = 1 if shared else 1 + NUM_ANSWERS
    prompts = images * forward(config, weights, image) + forward(config, weights, Layout(0, [ask_tokens], 1))
    prompts += num_answer_prompts * forward(config, weights, Layout(0, [answer], 1))
    seconds, per_token = machine.seconds_for(prompts), forward(config, weights, Layout(0, [1], 1))
    questions = max(1, texts // NUM_ANSWERS) if shared else 1
    for prompt, new, rows, draws in (
        (ask_tokens, lengths.question, questions, 1),
        (answer, lengths.answer, texts, NUM_ANSWERS),
    ):
        context = prompt + new / 2  # on average
        reading = decoding_bytes(config, weights, model.dtype.itemsize, rows, context) / machine.bytes_per_second
        computing = machine.seconds_for(rows * per_token)
        seconds += draws * new * max(reading, computing) / rows
    return prompts + lengths.candidate * per_token, seconds


def _prompt_tokens(processor, messages: list[dict]) -> int:
    from PIL import Image

    return chat_inputs(processor, [messages], [[Image.new("RGB", (32, 32))]])["input_ids"].shape[1]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--num_images", type=int, help="number of images for ours")
    parser.add_argument("--num_images_at_batch_1", type=int, help="number of images for batch 1, the first of them")
    parser.add_argument("--question_tokens", type=int)
    parser.add_argument("--answer_tokens", type=int)
    parser.add_argument("--batch_size", type=int, help="texts per batch for ours; default: chosen automatically")
    args = parser.parse_args(arguments)

    shape, device = SHAPES[args.shape], torch.device(args.device or SHAPES[args.shape].device)
    num_images, at_batch_1, question_tokens, answer_tokens = shape.generation
    num_images, at_batch_1 = args.num_images or num_images, args.num_images_at_batch_1 or at_batch_1
    lengths = Lengths(args.question_tokens or question_tokens, args.answer_tokens or answer_tokens)
    machine = Machine.measure(device, shape.dtype, quick=args.shape == "tiny")
    processor = build_processor(shape)
    model = prepare_policy(build_model(shape, processor, device).requires_grad_(False), processor).eval()
    suppress_terminators(model, processor)
    dataset = unlabeled_images(num_images, args.images)
    first_images = dataset.select(range(at_batch_1))
    generate = make_generator(model, processor, lengths, args.batch_size)
    variants = {
        "batch 1": lambda: run_timed(
            device, model, len(first_images), lambda: one_text_per_batch(model, processor, first_images, lengths)
        ),
        "ours": lambda: run_timed(device, model, len(dataset), lambda: list(generate.outcomes(dataset))),
    }
    one_text_per_batch(model, processor, first_images.select([0]), Lengths(4, 4))
    list(make_generator(model, processor, Lengths(4, 4), 4).outcomes(first_images))
    runs = alternate(variants, args.repeats)
    texts = generate.engine.batch_size
    if args.batch_size is None and device.type == "cuda":
        texts = largest_batch(model, PROMPT_TOKENS, lengths.answer)
    texts = min(texts, NUM_ANSWERS * num_images)
    rows = []
    for variant in variants:
        shared = variant == "ours"
        flops, seconds = floor(model, processor, machine, lengths, texts if shared else 1, shared)
        rows.append(
            Row(
                what=f"a question of {lengths.question} and {NUM_ANSWERS} answers of {lengths.answer} tokens",
                variant=variant, unit="candidate", tokens=lengths.candidate, runs=runs[variant], stock=runs["batch 1"],
                flops=flops, floor_seconds=seconds,
                notes=f"{num_images} images, {texts} texts per batch" if shared else f"{at_batch_1} images",
            )
        )  # fmt: skip
    settings = {"shape": args.shape, "repeats": args.repeats, "images": "real" if args.images else "generated"}
    return report("Generation", settings, machine, rows, args.output)


if __name__ == "__main__":
    main()
