# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a card says of a merged model: what it was merged from, and who can load it."""

import json
from dataclasses import dataclass
from pathlib import Path

from medst_trl.pipeline.record import FILE_NAME

from .contents import Contents
from .provenance import looks_local


@dataclass(frozen=True)
class Merged:
    """
    From the record of `medst merge`, without places on this machine (but for `adapter_path`, which no card tells).

    Attributes:
        base (`str`, *optional*): Hub id of the base, with its revision.
        base_text, adapter_text (`str`): Both in words.
        adapter_path (`str`, *optional*): Folder of the adapter.
        dtype (`str`): Type of the weights.
        float32_difference, stored_difference (`float`): Largest differences of log-probabilities from the adapter's.
        trained_in_4bit (`bool`): Whether the adapter's base was held in 4 bits while it was trained.
    """

    base: str | None
    base_text: str
    adapter_text: str
    adapter_path: str | None
    dtype: str
    float32_difference: float
    stored_difference: float
    trained_in_4bit: bool


def merged_from(folder: Path) -> Merged | None:
    """What a model was merged from; `None` where `medst merge` has not made it, or its record is not there."""
    try:
        record = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        merged, (adapter,) = record["merged"], record["inputs"]["model_name_or_path"]
        proof = merged["proof"]
        base = None if looks_local(merged["base"]) or Path(merged["base"]).exists() else merged["base"]
        return Merged(
            base=f"{base}@{merged['base_revision']}" if base and merged["base_revision"] else base,
            base_text=named(base, merged["base_revision"]) if base else "a local base",
            adapter_text=named(adapter["hub_id"], merged["adapter_revision"])
            if "hub_id" in adapter
            else f"a local adapter (SHA-256 {str(adapter.get('sha256'))[:12]})",
            adapter_path=adapter.get("path"),
            dtype=merged["dtype"],
            float32_difference=proof["float32_difference"],
            stored_difference=proof["stored_difference"],
            trained_in_4bit=merged["trained_in_4bit"],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def is_plain(contents: Contents) -> bool:
    """Whether a model needs nothing of medst_trl to be loaded and to ask: its template opens the model's turn."""
    from medst_trl.policy.chat_template import has_text_role, is_wrapped
    from medst_trl.policy.families import family_of

    template = contents.folder / "chat_template.jinja"
    if contents.kind != "model" or not template.is_file():
        return False
    model_type = json.loads((contents.folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    text = template.read_text(encoding="utf-8")
    return (is_wrapped(text) or has_text_role(text)) and not family_of(model_type).is_own


def named(hub_id: str, revision: str | None) -> str:
    """A Hub id in a sentence, with the revision it carries or is known to have had."""
    name, _, own = hub_id.partition("@")
    revision = revision or own
    return f"`{name}`" + (f" (revision {revision[:12]})" if revision else "")
