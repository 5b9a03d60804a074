# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Memory of the prototype extractor, compared with the released code, whose tensors are (batch, centers, positions,
channels).

```bash
python tests/benchmarks/bench_extractor.py
```

The figure is the peak size of all live tensors in a forward and backward pass in float32. The outputs are compared;
the tests also compare gradients, in float64. Needs 12 GB of memory.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from live_bytes import LiveBytes
from plain_extractor import plain

from medst_trl import PrototypeExtractor


def peak(implementation, extractor: PrototypeExtractor, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return the peak bytes of a forward and backward pass, and the output."""
    with LiveBytes() as memory:
        output = implementation(x)
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
        ours, output = peak(extractor, extractor, x)
        theirs, expected = peak(lambda x, extractor=extractor: plain(extractor, x), extractor, x)
        # Not element by element: in float32, a position between two centers may be assigned to the other one.
        assert (output - expected).norm() < 0.05 * expected.norm(), "the two implementations differ"
        print(f"| {channels_out} | {ours / 1e6:.0f} MB | {theirs / 1e6:.0f} MB | {theirs / ours:.0f} |")


if __name__ == "__main__":
    main()
