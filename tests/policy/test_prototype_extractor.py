# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The prototype extractor against values of the published code, and against the formula written out plainly."""

import pytest
import torch
from live_bytes import LiveBytes
from plain_extractor import plain
from safetensors import safe_open

from medst_trl import PrototypeExtractor


def made(channels=8, out=12, seed=0, **settings) -> PrototypeExtractor:
    torch.manual_seed(seed)
    extractor = PrototypeExtractor(channels, out, **settings).double()
    with torch.no_grad():
        extractor.sim_alpha.fill_(1.7)
        extractor.sim_beta.fill_(-0.4)
    return extractor


def test_values_of_the_published_code(shared_data):
    path = shared_data.parent / "golden" / "prototype_extractor.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden values at {path}")
    with safe_open(path, "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sizes = [int(file.metadata()[name]) for name in ("channels", "channels_out", "num_centers", "iterations")]
    extractor = PrototypeExtractor(*sizes).double()
    prefix = "weights."
    extractor.load_state_dict({n.removeprefix(prefix): v for n, v in golden.items() if n.startswith(prefix)})
    x = golden["input"].requires_grad_()
    output = extractor(x)
    output.backward(golden["grad_output"])
    ours = {
        "output": output, "grad_input": x.grad, "grad_sim_alpha": extractor.sim_alpha.grad,
        "grad_weights_f": extractor.f.weight.grad,
    }  # fmt: skip
    for name, value in ours.items():
        torch.testing.assert_close(value, golden[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("length", "num_centers", "iterations"),
    [(36, 9, 2), (10, 4, 2), (7, 7, 1), (3, 8, 2), (1, 5, 3), (576, 256, 2)],
    ids=["pools equal", "pools overlap", "one each", "fewer than centers", "one position", "as published"],
)
def test_values_and_gradients_of_the_plain_form(length, num_centers, iterations):
    extractor = made(num_centers=num_centers, iterations=iterations)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for form in (extractor, lambda x: plain(extractor, x)):
        output = form(x)
        inputs = [x, *extractor.parameters()]
        weights = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output)
        results.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_ties_go_to_the_first_center():
    extractor = made(num_centers=6)
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 6, 8)  # all centers are the same
    torch.testing.assert_close(extractor(x), plain(extractor, x), rtol=1e-9, atol=1e-10)


def test_every_parameter_trains_and_the_unused_layer_keeps_its_place():
    extractor = made(num_centers=4)
    extractor(torch.randn(2, 9, 8, dtype=torch.float64)).square().sum().backward()
    parameters = dict(extractor.named_parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    assert set(extractor.state_dict()) - set(parameters) == {"ln_1.weight", "ln_1.bias"}


def test_half_precision():
    extractor = made(channels=32, num_centers=16).to(torch.bfloat16)
    x = torch.randn(2, 36, 32, dtype=torch.bfloat16, requires_grad=True)
    output = extractor(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and x.grad.isfinite().all()
    exact = extractor.double()(x.double())
    # a position between two centers may go to the other one
    assert (output - exact).norm() < 0.05 * exact.norm()


def test_memory_is_a_twentieth_of_the_plain_forms():
    """At the published number of centers and positions, one image, a quarter of the channels."""
    torch.manual_seed(0)
    extractor = PrototypeExtractor(256, 256)
    x = torch.randn(1, 576, 256, requires_grad=True)
    peaks = []
    for form in (extractor, lambda x: plain(extractor, x)):
        extractor.zero_grad()
        with LiveBytes() as memory:
            form(x).sum().backward()
        peaks.append(memory.peak)
    assert 20 * peaks[0] < peaks[1]
