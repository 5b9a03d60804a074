# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the Hub's refusals mean for the user, and what to do next."""

from collections.abc import Iterator
from contextlib import contextmanager

from medst_trl.base.errors import UserError
from medst_trl.base.redaction import hide_secrets


@contextmanager
def explain_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the errors of a push to `repo_id` into a [`UserError`]. Nothing that was uploaded is lost by them."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} cannot be the name of a Hub repository: {error}") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and push again.") from None
    except HfHubHTTPError as error:
        raise UserError(_meaning(repo_id, error)) from None
    except (httpx2.TransportError, ConnectionError, TimeoutError) as error:
        raise UserError(_no_connection(error)) from None
    except (OSError, RuntimeError, ValueError) as error:
        # Uploads wrap the cause of a failure in errors of their own.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, HfHubHTTPError):
            raise UserError(_meaning(repo_id, cause)) from None
        if isinstance(cause, httpx2.TransportError):
            raise UserError(_no_connection(cause)) from None
        raise


def _meaning(repo_id: str, error) -> str:
    status = error.response.status_code
    said = hide_secrets(str(error.server_message or "").strip())
    said = f" The Hub says: {said}" if said else ""
    if status == 401:
        return (
            "The Hub does not accept the token: it is wrong or has expired. Make one at "
            f"https://huggingface.co/settings/tokens and log in with `hf auth login`, or set HF_TOKEN.{said}"
        )
    if status == 403:
        return (
            f"The token may not write to {repo_id}. Use one with write access to {repo_id.split('/')[0]} "
            "(https://huggingface.co/settings/tokens; then `hf auth login` or HF_TOKEN), or push to a namespace of "
            f"your own with --repo_id.{said}"
        )
    if status == 404:
        return f"The Hub has no {repo_id} that the token may see, or not that revision. Check both names.{said}"
    if status == 429:
        return f"The Hub takes no more calls for now. Push again later: what is uploaded is kept.{said}"
    if status >= 500:
        return f"The Hub has a problem ({status}). Push again later: what is uploaded is kept.{said}"
    return f"The Hub refuses the push to {repo_id} ({status}).{said} Put that right and push again."


def _no_connection(error: Exception) -> str:
    from huggingface_hub.constants import ENDPOINT

    return (
        f"No connection to the Hub at {ENDPOINT} ({type(error).__name__}). Check the network and push again: what is "
        "uploaded is kept."
    )
