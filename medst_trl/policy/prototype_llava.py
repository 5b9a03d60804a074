# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A LLaVA whose projector is the prototype extractor, known to the Auto classes of transformers."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
    LlavaProcessor,
)
from transformers import initialization as init

from .prototype_extractor import PrototypeExtractor


@strict
class PrototypeLlavaConfig(LlavaConfig):
    """
    Configuration of [`PrototypeLlavaForConditionalGeneration`]: that of LLaVA, and two settings of
    [`PrototypeExtractor`].

    Checkpoints converted from the original layout need `vision_feature_layer=-2` (`mm_vision_select_layer`) and
    `vision_feature_select_strategy="default"` (`patch`: the class token is left out). Both are the default.

    Args:
        num_centers (`int`, *optional*, defaults to `256`):
            Prototypes of an image.
        iterations (`int`, *optional*, defaults to `2`):
            Times the prototypes are refined.
    """

    model_type = "prototype_llava"

    num_centers: int = 256
    iterations: int = 2


class PrototypeLlavaPreTrainedModel(LlavaPreTrainedModel):
    """What both classes share: their configuration, and how missing weights are drawn."""

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

    After `import medst_trl`, the Auto classes of transformers load it. No other engine can: vLLM, SGLang and a
    transformers without medst_trl do not know the model type, and merging an adapter does not change that. LLaVA-1.5
    with its two-layer projector (`mlp2x_gelu`) stays [`~transformers.LlavaForConditionalGeneration`].

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
        # Not through LLaVA's own, which would draw a language model that is thrown away.
        PrototypeLlavaPreTrainedModel.__init__(self, config)
        self.model = PrototypeLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(PrototypeLlavaConfig.model_type, PrototypeLlavaConfig, exist_ok=True)  # in place of its stand-in
AutoModel.register(PrototypeLlavaConfig, PrototypeLlavaModel)
AutoModelForImageTextToText.register(PrototypeLlavaConfig, PrototypeLlavaForConditionalGeneration)
AutoProcessor.register(PrototypeLlavaConfig, LlavaProcessor)
