# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Memory of the prototype extractor beside the released form, which builds (batch, centers, positions, channels).

```bash
python tests/benchmarks/bench_extractor.py
```

The most bytes of tensors alive at a time in a forward and backward pass in float32, outputs compared; the tests
compare gradients, too, in float64. 12 GB of memory are enough.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from live_bytes import LiveBytes
from plain_extractor import plain

from medst_trl import PrototypeExtractor


def peak(form, extractor: PrototypeExtractor, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Bytes at the peak of a forward and backward pass, and the output."""
    with LiveBytes() as memory:
        output = form(x)
        torch.autograd.grad(output.square().mean(), [x, *extractor.parameters()])
    return memory.peak, output.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--positions", type=int, default=576)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--channels_out", type=int, nargs="+", default=[1024, 4096])
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| channels out | ours | as released | ratio |\n|---|---|---|---|")
    for channels_out in args.channels_out:
        extractor = PrototypeExtractor(args.channels, channels_out)
        x = torch.randn(args.batch_size, args.positions, args.channels, requires_grad=True)
        ours, mine = peak(extractor, extractor, x)
        theirs, expected = peak(lambda x, extractor=extractor: plain(extractor, x), extractor, x)
        # Not element by element: in float32 a position between two centers may go to the other one.
        assert (mine - expected).norm() < 0.05 * expected.norm(), "the two forms differ"
        print(f"| {channels_out} | {ours / 1e6:.0f} MB | {theirs / 1e6:.0f} MB | {theirs / ours:.0f} |")


if __name__ == "__main__":
    main()
