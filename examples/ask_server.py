# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Ask a served policy about an image, and let it ask questions.

```bash
medst merge --model_name_or_path runs/demo/dpo --output_dir runs/demo/merged
transformers serve runs/demo/merged          # pip install "transformers[serving]"; or: vllm serve runs/demo/merged
python examples/ask_server.py http://localhost:8000/v1 runs/demo/merged --image scan.png
```

The client needs medst_trl only to draw a synthetic scan if `--image` is missing. The merged model includes its chat
template: if a message contains only an image and `<vusr>`, the model replies with a question.
"""

import argparse
import base64
import io
import os

from openai import OpenAI
from PIL import Image


VUSR = "<vusr>"


def complete(client: OpenAI, model: str, image: Image.Image, text: str, temperature: float) -> str:
    """Return the model's reply to an image and a text: an answer, or a question if the text is `<vusr>`."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], temperature=temperature, max_tokens=128
    )
    return (reply.choices[0].message.content or "").strip()


def main(base_url: str, model: str, image: Image.Image, question: str, count: int = 3, temperature: float = 1.2):
    """Ask one question, then let the model ask `count` questions and answer them."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
    pairs = [(question, complete(client, model, image, question, temperature=0))]
    for _ in range(count):
        asked = complete(client, model, image, VUSR, temperature)
        pairs.append((asked, complete(client, model, image, asked, temperature=0)))
    for number, (asked, answer) in enumerate(pairs):
        print(f"{'it asks' if number else 'you ask'}: {asked}\nanswer:  {answer}")
    return pairs


def synthetic_scan() -> Image.Image:
    from medst_trl.demo.phantoms import make_phantoms

    return make_phantoms(1, seed=0, split="test")[0].image


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="URL of the server's API, for example http://localhost:8000/v1")
    parser.add_argument("model", help="name of the model on the server, usually its directory or Hub id")
    parser.add_argument("--image", help="image file; default: a synthetic scan")
    parser.add_argument("--question", default="What does the image show?")
    parser.add_argument("--count", type=int, default=3, help="number of questions that the model asks")
    args = parser.parse_args()
    image = Image.open(args.image) if args.image else synthetic_scan()
    main(args.base_url, args.model, image, args.question, args.count)
