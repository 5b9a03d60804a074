# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Build the processor of a converted checkpoint: a fast tokenizer, images as in training, and the chat template."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, normalizers
from transformers import CLIPImageProcessorPil, LlamaTokenizer, LlavaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.models.llava import LlavaImageProcessorPil, LlavaProcessor

from medst_trl.base.errors import UserError
from medst_trl.policy.chat_template import vicuna_template
from medst_trl.policy.vusr import add_special_token

from .weights import read_json


IMAGE, PAD = "<image>", "<pad>"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROWS_MULTIPLE = 64  # of the embedding, for fast kernels and for tokens added later


def build_processor(
    config: LlavaConfig, tokenizer: PreTrainedTokenizerFast, vision_directory: Path, *, pad: bool, text_role: bool
) -> LlavaProcessor:
    """
    Build the processor of a checkpoint, and set the ids of its special tokens in the checkpoint's configuration, in
    place. The embedding gets more rows (with some to spare) if tokens lack them.

    Images have the mean color and deviation of the vision tower's own processor. They are padded with the mean color
    to a square where LLaVA-1.5 was trained so. The original code pads in training only; here every stage uses the
    processor.

    Args:
        config ([`~transformers.LlavaConfig`]):
            Configuration of the checkpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Its tokenizer, see [`read_tokenizer`].
        vision_directory (`Path`):
            Directory of its vision tower.
        pad (`bool`):
            Whether images are padded.
        text_role (`bool`):
            Whether questions open with the text role `VUSER:`.

    Raises:
        UserError: if the tokenizer belongs to another model.
    """
    rows = config.text_config.vocab_size
    if len(tokenizer) - rows > ROWS_MULTIPLE:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens and the embedding {rows} rows: it belongs to another model. "
            "Put that of the language model into the checkpoint's directory."
        )
    if len(tokenizer) > rows:
        config.text_config.vocab_size = -(-(len(tokenizer) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE  # `<vusr>` fits, too
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    for name in SPECIAL_IDS:
        for part in (config, config.text_config):
            setattr(part, name, getattr(tokenizer, name))
    side = config.vision_config.image_size
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    own = image_settings(vision_directory)
    settings |= {key: own[key] for key in ("image_mean", "image_std") if key in own}
    # The processors on PIL: the others need torchvision.
    images = LlavaImageProcessorPil(do_pad=True, **settings) if pad else CLIPImageProcessorPil(**settings)
    adds_bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=vicuna_template(text_role=text_role, write_bos=not adds_bos),
    )


def image_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of the image processor in a directory, if any. Older versions have a file for them alone."""
    settings = read_json(directory / "processor_config.json").get("image_processor")
    return settings or read_json(directory / "preprocessor_config.json")


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """
    Read a tokenizer as a fast one with `<image>` and a pad token.

    It writes the tokens of the original code, which tokenized the text before and after an image separately.

    Args:
        directory (`Path`): Directory with `tokenizer.json` or `tokenizer.model`, and `tokenizer_config.json`.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]

    Raises:
        UserError: if there is none, or it is not Llama's.
    """
    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        else:
            tokenizer = _from_sentencepiece(directory)
    except Exception as error:  # the tokenizers library raises plain ones on a damaged file
        raise UserError(
            f"The tokenizer in {directory} cannot be read ({type(error).__name__}: {error}). Copy that of the "
            "language model there, for Vicuna tokenizer.model and tokenizer_config.json of lmsys/vicuna-7b-v1.5."
        ) from error
    if None in (tokenizer.bos_token, tokenizer.eos_token):
        raise UserError(f"The tokenizer in {directory} names no bos_token or no eos_token (tokenizer_config.json).")
    add_special_token(tokenizer, IMAGE)
    # Vicuna pads with <unk>, which would then count as padding inside a text.
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.unk_token:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
    tokenizer.padding_side = "left"
    tokenizer.chat_template = None  # the processor has it
    _restart_after_images(tokenizer)
    return tokenizer


def _from_sentencepiece(directory: Path) -> PreTrainedTokenizerFast:
    trainer = SentencePieceExtractor(str(directory / "tokenizer.model")).proto.trainer_spec
    if trainer.model_type != trainer.BPE:  # transformers would invent merges
        raise ValueError("tokenizer.model is not a byte-pair model like Llama's: add a tokenizer.json")
    config = read_json(directory / "tokenizer_config.json")
    # What the slow tokenizer did without these keys. "Legacy": a space after every special token.
    settings = {"legacy": config.get("legacy", True), "add_bos_token": config.get("add_bos_token", True)}
    # Without their `__type`, transformers refuses special tokens that are stored as objects.
    settings |= {
        key: value["content"] for key, value in config.items() if isinstance(value, dict) and "content" in value
    }
    llama = LlamaTokenizer.from_pretrained(directory, local_files_only=True, add_eos_token=False, **settings)
    decoder = config.get("added_tokens_decoder") or {}
    added = read_json(directory / "added_tokens.json") | {item["content"]: int(key) for key, item in decoder.items()}
    for token, index in added.items():
        if llama.convert_tokens_to_ids(token) != index:  # transformers takes the next free id
            raise ValueError(f"the id {index} of the added token {token!r} leaves a gap: copy the files again")
    # With the general class the file tokenizer.json alone decides how text is split.
    return PreTrainedTokenizerFast(
        tokenizer_object=llama.backend_tokenizer,
        model_max_length=config.get("model_max_length") or 2048,
        clean_up_tokenization_spaces=False,
        **llama.special_tokens_map,
    )


def _restart_after_images(tokenizer: PreTrainedTokenizerFast) -> None:
    """
    Make a tokenizer treat the line after an image as the original code does, in place.

    That cut the text at images and tokenized each piece separately, so that sentencepiece put a space before the
    newline after an image. A tokenizer that reads the whole text puts a space only before its first word.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if ids(f"{IMAGE}\nWhat")[1:] != ids("\nWhat"):
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Replace(Regex(r"\A\n"), " \n"), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(steps)
