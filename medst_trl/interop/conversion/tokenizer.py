# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of an original checkpoint as a fast one that knows `<image>` and a pad token."""

from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError

from .sentencepiece_file import read_pieces
from .sources import read_json


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE, PAD = "<image>", "<pad>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """
    Reads a tokenizer and gives it what LLaVA needs.

    It writes the tokens that the original code does: that tokenised what stands before and behind an image on its own.

    Args:
        folder (`Path`): Folder with `tokenizer.json` or `tokenizer.model`, and `tokenizer_config.json`.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]

    Raises:
        UserError: if there is none, or it is not Llama's.
    """
    from tokenizers import AddedToken

    if (folder / "tokenizer.json").is_file():
        tokenizer = _from_json(folder)
    elif (folder / "tokenizer.model").is_file():
        try:
            tokenizer = _from_sentencepiece(folder)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(
                f"The tokenizer in {folder} cannot be read: {error} (tokenizer_config.json or added_tokens.json)"
            ) from error
    else:
        raise UserError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}). Copy the one of the language model there, "
            "for Vicuna tokenizer.model and tokenizer_config.json of lmsys/vicuna-7b-v1.5."
        )
    if None in (tokenizer.bos_token, tokenizer.eos_token):
        raise UserError(f"The tokenizer in {folder} names no bos_token or no eos_token (tokenizer_config.json).")
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(IMAGE, special=True, normalized=False)]},
        replace_extra_special_tokens=False,
    )
    # Vicuna pads with <unk>, which then would be padding where a text has it.
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.unk_token:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
    tokenizer.padding_side = "left"
    tokenizer.chat_template = None  # the processor has it
    _start_anew_behind_images(tokenizer)
    return tokenizer


def _from_json(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain ones on a damaged file
        raise UserError(f"The tokenizer in {folder} cannot be read: {error}") from error


def _from_sentencepiece(folder: Path) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    path = folder / "tokenizer_config.json"
    config = read_json(path, "its special tokens") if path.is_file() else {}

    def named(key: str, default: str | None) -> str | None:
        value = config.get(key) or default
        return value["content"] if isinstance(value, dict) else value

    vocab = {piece: index for index, piece in enumerate(read_pieces(folder / "tokenizer.model"))}
    special = {
        "unk_token": named("unk_token", "<unk>"), "bos_token": named("bos_token", "<s>"),
        "eos_token": named("eos_token", "</s>"), "pad_token": named("pad_token", None),
    }  # fmt: skip
    llama = LlamaTokenizer(
        vocab=vocab,
        merges=generate_merges(vocab),
        # What the slow tokenizer did without these keys. "Legacy": a blank behind every special token.
        legacy=config.get("legacy", True),
        add_bos_token=config.get("add_bos_token", True),
        add_eos_token=False,
        **special,
    )
    added = config.get("added_tokens_decoder") or {}
    extra = {token: index for index, token in _added_tokens(folder, added) if token not in vocab}
    for token, index in sorted(extra.items(), key=lambda item: item[1]):
        llama.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        if llama.convert_tokens_to_ids(token) != index:
            raise UserError(f"{folder}: the added token {token!r} has the id {index}, which leaves a gap before it.")
    # Under the general class the file tokenizer.json alone says how text is split.
    return PreTrainedTokenizerFast(
        tokenizer_object=llama.backend_tokenizer,
        model_max_length=config.get("model_max_length") or 2048,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _added_tokens(folder: Path, decoder: dict) -> list[tuple[int, str]]:
    """Tokens behind the pieces, which are listed in one of two places."""
    if decoder:
        return [(int(index), token["content"]) for index, token in decoder.items()]
    path = folder / "added_tokens.json"
    listed = read_json(path, "added tokens") if path.is_file() else {}
    return [(index, token) for token, index in listed.items()]


def _start_anew_behind_images(tokenizer: "PreTrainedTokenizerFast") -> None:
    """
    Tokenises the line behind an image as the original code does, in place.

    That cut the text at images and tokenised each piece on its own, so that sentencepiece put a blank before the
    newline behind an image. A tokenizer that reads the whole at once puts a blank only before its first word.
    """
    from tokenizers import Regex, normalizers

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if ids(f"{IMAGE}\nWhat")[1:] != ids("\nWhat"):
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Replace(Regex(r"\A\n"), " \n"), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(steps)
