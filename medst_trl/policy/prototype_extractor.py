# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The projector of STLLaVA-Med and SQ-LLaVA (`mm_projector_type cluster`): image features gathered into prototypes."""

import torch
from torch import nn
from torch.nn import functional as F


class PrototypeExtractor(nn.Module):
    """
    Maps the features of an image into the language model's space, after each has received what the features most like
    it have in common (https://huggingface.co/papers/2403.11299).

    Prototypes begin as averages of neighbouring positions and are refined by attention. Each position then gives its
    feature to the one prototype it is most similar to, and takes back that prototype's mean.

    The published code multiplies features and similarities into a tensor of shape (batch, prototypes, positions,
    channels), of which all but one prototype a position is zero. Here the sums over it are matrix products: 4 images
    of 576 positions and 1024 channels take 3% of the memory.

    Args:
        channels (`int`):
            Size of an image feature.
        channels_out (`int`):
            Size of the language model's embeddings.
        num_centers (`int`, *optional*, defaults to `256`):
            Prototypes of an image. There may be more of them than positions.
        iterations (`int`, *optional*, defaults to `2`):
            Times the prototypes are refined.

    Example:
    ```python
    >>> extractor = PrototypeExtractor(1024, 4096)
    >>> extractor(torch.randn(2, 576, 1024)).shape
    torch.Size([2, 576, 4096])
    ```
    """

    def __init__(self, channels: int, channels_out: int, num_centers: int = 256, iterations: int = 2):
        super().__init__()
        self.num_centers = num_centers
        self.iterations = iterations
        # The names are those of the published checkpoints.
        self.sim_alpha = nn.Parameter(torch.ones(1, 1, 1))
        self.sim_beta = nn.Parameter(torch.zeros(1, 1, 1))
        self.c = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.f = nn.Linear(channels, channels)
        self.ln_1 = _UnusedLayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels_out), _QuickGELU(), nn.Linear(channels_out, channels_out)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape (batch, positions, channels)): Features of the vision tower.

        Returns:
            `torch.Tensor` of shape (batch, positions, channels_out)
        """
        value, feature = self.v(x), self.f(x)
        center_feature = self._pool(feature)
        centers = self._refine(self._pool(x), value, feature)
        cosine = F.normalize(centers, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)
        similarity = torch.sigmoid(self.sim_beta + self.sim_alpha * cosine)  # (batch, centers, positions)
        chosen = torch.zeros_like(similarity).scatter_(1, similarity.argmax(1, keepdim=True), 1)
        similarity = similarity * chosen
        prototypes = (similarity @ feature + center_feature) / (chosen.sum(-1, keepdim=True) + 1)
        return self.mlp(x + similarity.transpose(1, 2) @ prototypes)

    def _refine(self, centers: torch.Tensor, value: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        # Over the positions of an image, not over its channels: so the checkpoints were trained.
        keys = F.normalize(value.transpose(1, 2), dim=-1)
        for _ in range(self.iterations):
            attention = (F.normalize(self.c(centers), dim=-1) @ keys).softmax(dim=-2)  # over centers, not positions
            centers = attention @ feature
        return centers

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), self.num_centers).transpose(1, 2)


class _QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(1.702 * x) / 1.702  # x * sigmoid(1.702 * x), of which autograd would keep two tensors


class _UnusedLayerNorm(nn.Module):
    """
    Keeps the weights of a layer that the published code has and never applies, so that checkpoints pass through whole.

    As buffers: parameters without a gradient stop DDP, and PEFT would make them trainable.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
