# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the Hub can be asked at all: one short request, before libraries try each file for minutes."""

from pathlib import Path

from medst_trl.base.errors import UserError


SECONDS = 10  # for one answer of any kind


def check_reachable(name_or_path: str) -> None:
    """
    Says at once that a model cannot be had: it is no folder, the Hub does not answer, and the cache has nothing of it.

    transformers and huggingface_hub try every file six times, with pauses: almost three minutes.

    Args:
        name_or_path (`str`):
            Folder or Hub id, without revision.

    Raises:
        UserError: if so. Where the cache has the model, a line says how to use it without waiting.
    """
    import httpx2
    from huggingface_hub import constants, get_session

    if Path(name_or_path).is_dir() or constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except httpx2.TransportError as error:
        reason = f"{constants.ENDPOINT} does not answer ({str(error) or type(error).__name__})"
        if not Path(constants.HF_HUB_CACHE, f"models--{name_or_path.replace('/', '--')}", "snapshots").is_dir():
            raise UserError(
                f"{name_or_path!r} is no folder here, {reason}, and nothing of it was downloaded earlier. Correct the "
                "path, or check the network."
            ) from None
        print(f"{reason}; {name_or_path} is looked for in the cache. HF_HUB_OFFLINE=1 does so without trying first.")
