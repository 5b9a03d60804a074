# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The prototype extractor against values of the published code, and against the formula written out plainly."""

import weakref

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from medst_trl import PrototypeExtractor


def plain(extractor: PrototypeExtractor, x: torch.Tensor) -> torch.Tensor:
    """Position by position as the method is described, with its tensor of (batch, centers, positions, channels)."""
    weights = dict(extractor.named_parameters())
    linear = lambda name, inputs: inputs @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
    n, length = extractor.num_centers, x.shape[1]
    pools = [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]
    pool = lambda y: torch.stack([y[:, start:end].mean(1) for start, end in pools], 1)  # noqa: E731
    unit = lambda y, dim: y / y.norm(dim=dim, keepdim=True)  # noqa: E731
    value, feature, centers = linear("v", x), linear("f", x), pool(x)
    for _ in range(extractor.iterations):
        product = torch.einsum("bnd,bld->bnl", unit(linear("c", centers), 2), unit(value, 1))
        weight = product.exp() / product.exp().sum(1, keepdim=True)
        centers = (weight[..., None] * feature[:, None]).sum(2)
    cosine = (unit(centers, 2)[:, :, None] * unit(x, 2)[:, None]).sum(-1)
    similarity = 1 / (1 + torch.exp(-weights["sim_beta"] - weights["sim_alpha"] * cosine))
    nearest = F.one_hot(similarity.argmax(1), n).transpose(1, 2).to(x.dtype)
    similarity = (similarity * nearest)[..., None]
    prototypes = (similarity * feature[:, None]).sum(2) + pool(feature)
    prototypes = prototypes / (nearest.sum(2)[..., None] + 1)
    hidden = linear("mlp.0", x + (prototypes[:, :, None] * similarity).sum(1))
    return linear("mlp.2", hidden * torch.sigmoid(1.702 * hidden))


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


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors alive that were made within it, and keeps the most there ever were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, output)
        return output

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def test_memory_is_a_twentieth_of_the_plain_forms():
    """At the published number of centers and positions, one image, a quarter of the channels."""
    torch.manual_seed(0)
    extractor = PrototypeExtractor(256, 256)
    x = torch.randn(1, 576, 256, requires_grad=True)
    peaks = []
    for form in (extractor, lambda x: plain(extractor, x)):
        extractor.zero_grad()
        with PeakMemory() as memory:
            form(x).sum().backward()
        peaks.append(memory.peak)
    assert 20 * peaks[0] < peaks[1]
