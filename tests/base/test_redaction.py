# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import pytest

from medst_trl.base.redaction import HIDDEN, hide_secrets


@pytest.mark.parametrize(
    "name",
    ["api_key", "api-key", "apikey", "API_KEY", "key", "subscription-key", "token", "access_token", "accessToken",
     "sig", "X-Amz-Signature", "X-Amz-Security-Token", "password", "client_secret", "auth"],
)  # fmt: skip
def test_secret_parameters_of_a_url_are_hidden(name):
    for url in (f"http://h/v1?{name}=abcdef", f"http://h/v1?version=2&{name}=abcdef&size=3", f"h?{name}=abcdef/chat"):
        hidden = hide_secrets(f"{url} cannot be reached")
        assert "abcdef" not in hidden and f"{name}={HIDDEN}" in hidden and "cannot be reached" in hidden
        assert ("size=3" in hidden) == ("size=3" in url)
        assert hide_secrets({"judge": {"base_url": url}})["judge"]["base_url"] in hidden


@pytest.mark.parametrize(
    "text", ["http://h/v1?max_tokens=5&monkey=brown", "key=value", "is the key = value?", "http://h/token?page=2"]
)
def test_other_parameters_are_kept(text):
    assert hide_secrets(text) == text


@pytest.mark.parametrize("login", ["user:hunter2", ":hunter2", "user:hun@hunter2", "me%40org:hunter2"])
def test_the_password_of_a_url_is_hidden(login):
    hidden = hide_secrets(f"http://{login}@host:8000/v1 (mail to a@b.org) and http://{login}@host")
    assert hidden == f"http://{HIDDEN}@host:8000/v1 (mail to a@b.org) and http://{HIDDEN}@host"
