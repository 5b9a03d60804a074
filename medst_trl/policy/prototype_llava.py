# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The LLaVA of STLLaVA-Med and SQ-LLaVA, whose projector (`mm_projector_type cluster`) gathers features into prototypes.

Importing this module registers the model with the Auto classes of transformers (see `auto_classes.py`).
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaProcessor
from transformers import initialization as init
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel


class PrototypeExtractor(nn.Module):
    """
    Project image features into the language model's space, after adding to each the mean of the features most similar
    to it (https://huggingface.co/papers/2403.11299).

    Prototypes start as averages of neighboring positions and are refined by attention. Each position then adds its
    feature to the prototype it is most similar to, and receives that prototype's mean.

    The published code multiplies features and similarities into a tensor of shape (batch, prototypes, positions,
    channels), in which all but one prototype per position is zero. Here the sums over it are matrix products: 4 images
    of 576 positions and 1024 channels take 3% of the memory.

    Args:
        channels (`int`):
            Size of an image feature.
        channels_out (`int`):
            Size of the language model's embeddings.
        num_centers (`int`, *optional*, defaults to `256`):
            Number of prototypes of an image. It may exceed the number of positions.
        iterations (`int`, *optional*, defaults to `2`):
            Number of times the prototypes are refined.

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
        # Over the positions of an image, not over its channels, as the checkpoints were trained.
        keys = F.normalize(value.transpose(1, 2), dim=-1)
        for _ in range(self.iterations):
            attention = (F.normalize(self.c(centers), dim=-1) @ keys).softmax(dim=-2)  # over centers, not positions
            centers = attention @ feature
        return centers

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), self.num_centers).transpose(1, 2)


class _QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(1.702 * x) / 1.702  # x * sigmoid(1.702 * x), for which autograd would keep two tensors


class _UnusedLayerNorm(nn.Module):
    """
    Holder of the weights of a layer that the published code has and never applies, so that checkpoints stay complete.

    They are buffers: parameters without a gradient stop DDP, and PEFT would make them trainable.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))


@strict
class PrototypeLlavaConfig(LlavaConfig):
    """
    Configuration of [`PrototypeLlavaForConditionalGeneration`]: that of LLaVA with two settings of
    [`PrototypeExtractor`].

    Checkpoints converted from the original layout need `vision_feature_layer=-2` (`mm_vision_select_layer`) and
    `vision_feature_select_strategy="default"` (`patch`: without the class token). Both are the default.

    Args:
        num_centers (`int`, *optional*, defaults to `256`):
            Number of prototypes of an image.
        iterations (`int`, *optional*, defaults to `2`):
            Number of times the prototypes are refined.
    """

    model_type = "prototype_llava"

    num_centers: int = 256
    iterations: int = 2


class PrototypeLlavaPreTrainedModel(LlavaPreTrainedModel):
    """Base class: the configuration, and how missing weights are initialized."""

    config: PrototypeLlavaConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PrototypeExtractor):
            init.ones_(module.sim_alpha)
            init.zeros_(module.sim_beta)


class PrototypeLlavaModel(PrototypeLlavaPreTrainedModel, LlavaModel):
    """[`PrototypeLlavaForConditionalGeneration`] without the output layer."""

    def __init__(self, config: PrototypeLlavaConfig):
        super().__init__(config)
        layers = config.vision_feature_layer
        self.multi_modal_projector = PrototypeExtractor(
            config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers)),
            config.text_config.hidden_size,
            num_centers=config.num_centers,
            iterations=config.iterations,
        )
        self.post_init()


class PrototypeLlavaForConditionalGeneration(PrototypeLlavaPreTrainedModel, LlavaForConditionalGeneration):
    """
    LLaVA with the prototype extractor of SQ-LLaVA and STLLaVA-Med (https://huggingface.co/papers/2406.19973) as its
    projector.

    After `import medst_trl`, the Auto classes of transformers load it. Nothing else does: vLLM, SGLang and a
    transformers without medst_trl do not know the model type, and merging an adapter does not change that. LLaVA-1.5
    with its two-layer projector (`mlp2x_gelu`) remains a [`~transformers.LlavaForConditionalGeneration`].

    Args:
        config ([`PrototypeLlavaConfig`]): Configuration of the model.

    Example:
    ```python
    >>> import medst_trl
    >>> from transformers import AutoModelForImageTextToText

    >>> model = AutoModelForImageTextToText.from_pretrained("converted/stllava-med-7b")
    ```
    """

    def __init__(self, config: PrototypeLlavaConfig):
        # Not through LLaVA's own, which would initialize a language model that is thrown away.
        PrototypeLlavaPreTrainedModel.__init__(self, config)
        self.model = PrototypeLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(PrototypeLlavaConfig.model_type, PrototypeLlavaConfig, exist_ok=True)  # replaces its stand-in
AutoModel.register(PrototypeLlavaConfig, PrototypeLlavaModel)
AutoModelForImageTextToText.register(PrototypeLlavaConfig, PrototypeLlavaForConditionalGeneration)
AutoProcessor.register(PrototypeLlavaConfig, LlavaProcessor)
