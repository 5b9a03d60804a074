# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
How long it takes to ask a question about an image and to answer it twice: ours, and one text at a time.

```bash
python tests/benchmarks/bench_generate.py                                  # a minute on two cores
python tests/benchmarks/bench_generate.py --shape llava_7b --output generate_7b.json
```

- `batch 1`: as the first STLLaVA-Med code does it, `model.generate` for one text at a time, drawn by one global seed;
  the image is preprocessed and encoded for each of the three texts
- `ours`: `CandidateGenerator` with its own engine

The same weights, images, kind of prompt and sampling (temperature 1.2, top-k 100, top-p 0.95). The terminator is made
so unlikely that every text has exactly as many tokens as asked for. `batch 1` takes the first of the images alone, and
figures are for one candidate (a question and two answers). The floor: prompts at the rate of a large matrix product;
then, for each token, all weights and the cache at the rate of a copy, shared by the texts written at a time, or their
operations where those take longer. A small model's weights may stay in a CPU's cache and then beat that floor.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from datasets import Dataset
from flops import Layout, decoding_bytes, forward, weights_of
from measure import Machine, PeakMemory, Row, Run, add_common_arguments, alternate, report, synchronise
from shapes import PROMPT_TOKENS, SHAPES, build_model, build_processor, unlabelled_images

from medst_trl.engines.decoding import chat_inputs
from medst_trl.engines.engine import Sampling, to_answer, to_ask
from medst_trl.engines.transformers import largest_batch
from medst_trl.policy.loading import prepare_policy
from medst_trl.selftrain.candidates import CandidateGenerator


NUM_ANSWERS = 2


@dataclass(frozen=True)
class Lengths:
    """Tokens of a question and of an answer."""

    question: int
    answer: int

    @property
    def candidate(self) -> int:
        return self.question + NUM_ANSWERS * self.answer


class EveryQuestion:
    """Lets every text pass as a question: those of random weights are none."""

    def problem(self, reply, earlier=()) -> None:
        return None


def never_ends(model, processor) -> None:
    """
    Puts the terminator, and rows of the vocabulary that no token has, behind the 100 likeliest tokens, in place.

    A score of zero is below half of the others.
    """
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[len(processor.tokenizer) :] = 0
        head[processor.tokenizer.all_special_ids] = 0


def one_at_a_time(model, processor, dataset: Dataset, lengths: Lengths, seed: int = 0) -> list[list[str]]:
    """The question and the answers about each image, each text by a `generate` of its own."""
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


def generator(model, processor, lengths: Lengths, batch_size: int | None) -> CandidateGenerator:
    """Ours, for texts of such lengths."""
    return CandidateGenerator(
        model, processor, num_questions=1, num_answers=NUM_ANSWERS, batch_size=batch_size,
        question_sampling=Sampling(max_new_tokens=lengths.question),
        answer_sampling=Sampling(max_new_tokens=lengths.answer), question_filter=EveryQuestion(),
    )  # fmt: skip


def timed(device: torch.device, model, candidates: int, work) -> Run:
    with PeakMemory(device, lambda: [*model.parameters(), *model.buffers()]) as memory:
        synchronise(device)
        begun = time.perf_counter()
        work()
        synchronise(device)
        seconds = time.perf_counter() - begun
    return Run(seconds, candidates, peak_bytes=memory.peak_bytes)


def floor(model, processor, machine: Machine, lengths: Lengths, texts: int, shared: bool) -> tuple[float, float]:
    """
    Operations of a candidate, and the least seconds for it.

    Args:
        texts (`int`): Answers written at a time.
        shared (`bool`): Whether an image is encoded, and an answer's prompt read, once for all that need it.
    """
    config, weights = model.config, weights_of(model)
    image = Layout(images=1, lengths=(), scored=0)
    ask = _prompt_tokens(processor, to_ask([], 1))
    answer = _prompt_tokens(processor, to_answer([], 1, "")) + lengths.question
    answer_prompts = 1 if shared else NUM_ANSWERS
    images = 1 if shared else 1 + NUM_ANSWERS
    prompts = images * forward(config, weights, image) + forward(config, weights, Layout(0, [ask], 1))
    prompts += answer_prompts * forward(config, weights, Layout(0, [answer], 1))
    seconds, a_token = machine.seconds_for(prompts), forward(config, weights, Layout(0, [1], 1))
    questions = max(1, texts // NUM_ANSWERS) if shared else 1
    for prompt, new, rows, draws in (
        (ask, lengths.question, questions, 1),
        (answer, lengths.answer, texts, NUM_ANSWERS),
    ):
        context = prompt + new / 2  # on average
        reading = decoding_bytes(config, weights, model.dtype.itemsize, rows, context) / machine.bytes_per_second
        computing = machine.seconds_for(rows * a_token)
        seconds += draws * new * max(reading, computing) / rows
    return prompts + lengths.candidate * a_token, seconds


def _prompt_tokens(processor, messages: list[dict]) -> int:
    from PIL import Image

    return chat_inputs(processor, [messages], [[Image.new("RGB", (32, 32))]])["input_ids"].shape[1]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--num_images", type=int, help="images that ours asks about")
    parser.add_argument("--num_images_at_batch_1", type=int, help="the first of them, which batch 1 asks about")
    parser.add_argument("--question_tokens", type=int)
    parser.add_argument("--answer_tokens", type=int)
    parser.add_argument(
        "--batch_size", type=int, help="texts ours writes at a time, instead of what it chooses itself"
    )
    args = parser.parse_args(arguments)

    shape, device = SHAPES[args.shape], torch.device(args.device or SHAPES[args.shape].device)
    num_images, at_batch_1, question_tokens, answer_tokens = shape.generation
    num_images, at_batch_1 = args.num_images or num_images, args.num_images_at_batch_1 or at_batch_1
    lengths = Lengths(args.question_tokens or question_tokens, args.answer_tokens or answer_tokens)
    machine = Machine.measure(device, shape.dtype, quick=args.shape == "tiny")
    processor = build_processor(shape)
    model = prepare_policy(build_model(shape, processor, device).requires_grad_(False), processor).eval()
    never_ends(model, processor)
    dataset = unlabelled_images(num_images, args.images)
    few = dataset.select(range(at_batch_1))
    generate = generator(model, processor, lengths, args.batch_size)
    ways = {
        "batch 1": lambda: timed(device, model, len(few), lambda: one_at_a_time(model, processor, few, lengths)),
        "ours": lambda: timed(device, model, len(dataset), lambda: list(generate.outcomes(dataset))),
    }
    one_at_a_time(model, processor, few.select([0]), Lengths(4, 4))
    list(generator(model, processor, Lengths(4, 4), 4).outcomes(few))
    runs = alternate(ways, args.repeats)
    texts = generate.engine.batch_size
    if args.batch_size is None and device.type == "cuda":
        texts = largest_batch(model, PROMPT_TOKENS, lengths.answer)
    texts = min(texts, NUM_ANSWERS * num_images)
    rows = []
    for way in ways:
        shared = way == "ours"
        flops, seconds = floor(model, processor, machine, lengths, texts if shared else 1, shared)
        rows.append(
            Row(
                what=f"a question of {lengths.question} and {NUM_ANSWERS} answers of {lengths.answer} tokens",
                way=way, unit="candidate", tokens=lengths.candidate, runs=runs[way], stock=runs["batch 1"],
                flops=flops, floor_seconds=seconds,
                notes=f"{num_images} images, {texts} texts at a time" if shared else f"{at_batch_1} images",
            )
        )  # fmt: skip
    settings = {"shape": args.shape, "repeats": args.repeats, "images": "real" if args.images else "drawn"}
    return report("Generation", settings, machine, rows, args.output)


if __name__ == "__main__":
    main()
