# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of the prototype extractor: the same values, with far more memory."""

import torch
from torch.nn import functional as F

from medst_trl import PrototypeExtractor


def plain(extractor: PrototypeExtractor, x: torch.Tensor) -> torch.Tensor:
    """Follow the description of the method directly, with a tensor of shape (batch, centers, positions, channels)."""
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
