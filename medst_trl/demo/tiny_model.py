# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A LLaVA small enough to be built and trained anywhere, with every part of a real one.

CLIP vision tower, two-layer projector, Llama, byte-level BPE tokenizer, Vicuna's chat template. The weights are
random: `medst base` trains them on plain text and on pictures of plain shapes; tests use them as they are.
"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from medst_trl.policy.chat_template import vicuna_template

from .base_data import all_texts


CHAT_TEMPLATE = vicuna_template(write_bos=True, system="")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def tiny_llava(
    *,
    image_size: int = 64,
    patch_size: int = 16,
    vision_size: int = 128,
    vision_layers: int = 3,
    text_size: int = 128,
    text_layers: int = 2,
    head_size: int = 32,
    vocab_size: int = 1024,
    spare_rows: int = 0,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    Build a LLaVA with random weights, and its processor.

    Args:
        image_size (`int`, *optional*, defaults to `64`):
            Side of the square that images are resized and cropped to, in pixels.
        patch_size (`int`, *optional*, defaults to `16`):
            Side of a patch, in pixels. An image takes `(image_size / patch_size) ** 2` tokens.
        vision_size (`int`, *optional*, defaults to `128`):
            Hidden size of the vision tower, a multiple of `head_size`.
        vision_layers (`int`, *optional*, defaults to `3`):
            Number of layers of the vision tower. As in LLaVA-1.5 the features are those before the last layer, which
            is not used.
        text_size (`int`, *optional*, defaults to `128`):
            Hidden size of the language model, a multiple of `head_size`.
        text_layers (`int`, *optional*, defaults to `2`):
            Number of layers of the language model.
        head_size (`int`, *optional*, defaults to `32`):
            Size of one attention head.
        vocab_size (`int`, *optional*, defaults to `1024`):
            Largest number of tokens of the tokenizer, at least 261 (the bytes and the special tokens).
        spare_rows (`int`, *optional*, defaults to `0`):
            Rows of the embedding after the last token, as in models with a padded vocabulary.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output layer shares the embedding's weights.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state does not change.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`

    Example:
    ```python
    >>> model, processor = tiny_llava()  # 1.0M parameters
    >>> small = {"vision_size": 32, "vision_layers": 2, "text_size": 32, "text_layers": 1, "vocab_size": 300}
    >>> model, processor = tiny_llava(**small)  # 50k
    ```
    """
    tokenizer = train_tokenizer(all_texts(), vocab_size)
    processor = _processor(tokenizer, image_size, patch_size)
    vision, text = _tower(vision_size, vision_layers, head_size), _tower(text_size, text_layers, head_size)
    vision |= {"image_size": image_size, "patch_size": patch_size}
    text |= {"vocab_size": len(tokenizer) + spare_rows, "tie_word_embeddings": tie_word_embeddings}
    config = _config(tokenizer, vision, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # CLIP draws position embeddings 25 times smaller than patch embeddings turn out. A large tower learns to read
        # them over millions of images; a tiny one never learns where anything is.
        model.model.vision_tower.embeddings.position_embedding.weight.mul_(25)
        if not tie_word_embeddings:
            # Adapters do not train the output layer. Drawn as small as the others, it would give no token a
            # probability near one, and sampled texts would be random.
            model.lm_head.weight.mul_(4)
    return model.eval(), processor


def _processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaProcessor:
    square = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        # The other image processor needs torchvision.
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the select strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def _tower(size: int, layers: int, head_size: int) -> dict[str, int]:
    return {
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_hidden_layers": layers,
        "num_attention_heads": size // head_size,
    }


def _config(tokenizer: PreTrainedTokenizerFast, vision: dict, text: dict) -> LlavaConfig:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(
            max_position_embeddings=2048,
            initializer_range=0.06,  # the usual 0.02 suits sizes in the thousands; at 128 little would pass through
            **text,
            **special,
        ),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=text["tie_word_embeddings"],
        **special,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer. It can write any text, and the words of `texts` take few tokens.

    Args:
        texts (`Iterable[str]`):
            Texts that give the words.
        vocab_size (`int`):
            Largest number of tokens, at least 261 (the bytes and the special tokens).

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
