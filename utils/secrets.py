"""Tokens, keys and passwords: never in a configuration, and covered wherever one would be written.

What is secret is told by names of environment variables (`HF_TOKEN`, `WANDB_API_KEY`), by the shapes that well-known
services give to tokens, and by addresses that hold a password.
"""

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

COVER = "***"
SHORTEST = 6  # a shorter value would cover ordinary words
NAMES = re.compile(
    r"(?:^|_)(?:TOKENS?|(?:API_?|ACCESS_?|PRIVATE_?|SECRET_?)?KEYS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)"
    r"|(?:TOKEN|APIKEY|PASSWORD)$",
    re.IGNORECASE,
)
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}|\bAKIA[A-Z0-9]{16}\b"
)
# the length of a scheme is bounded, as every letter of a long text would be tried as the beginning of one
ADDRESS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]{0,30}://)(?P<who>[^\s/@:'\"]*:[^\s/@'\"]+|[^\s/@:'\"]+)@")
QUERY = re.compile(r"(?P<name>[?&](?:\w*token|api_?key|key|password|secret|signature)=)[^&\s'\"]+", re.IGNORECASE)
SECRET_KEYS = re.compile(r"(?:^|[._])(?:api_?key|(?:hf|hub|access|auth)_?token|password|passwd|secret)$", re.IGNORECASE)
ENV_SET = "hydra.job.env_set."
FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*(?P<quote>['\"]?)(?P<name>[^,}'\"\s]+)")


def secret_values(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of the environment's secret variables, the longest first."""
    found = os.environ if environment is None else environment
    values = {value.strip() for name, value in found.items() if NAMES.search(name) and _tells(value.strip())}
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def _tells(value: str) -> bool:
    """Whether a value is one that only its owner knows: neither short nor a switch, a number or a path."""
    plain = value.isdigit() or value.lower() in ("default", "disabled", "enabled")
    return len(value) >= SHORTEST and not plain and not value.startswith("/")


def redacted(text: str, values: Sequence[str] | None = None) -> str:
    """The text with every secret covered; `values` are the environment's, looked up if not given."""
    for value in secret_values() if values is None else values:
        text = text.replace(value, COVER)
    text = SHAPES.sub(COVER, text)
    text = ADDRESS.sub(rf"\g<scheme>{COVER}@", text)
    return QUERY.sub(rf"\g<name>{COVER}", text)


def covered(value: Any, values: Sequence[str] | None = None) -> Any:
    """Plain values with the secrets in their texts and keys covered."""
    values = secret_values() if values is None else values
    if isinstance(value, Mapping):
        return {covered(key, values): covered(inner, values) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [covered(inner, values) for inner in value]
    return redacted(value, values) if isinstance(value, str) else value


def why_secret(value: str) -> str | None:
    """Say why a text may not stand in a configuration, or None if it may; what is secret in it is not repeated."""
    for found in FROM_ENVIRONMENT.finditer(value):
        if NAMES.search(found["name"]):
            return f"takes the secret {found['name']} into the configuration, which every record holds; leave it out"
    if ADDRESS.search(value) or QUERY.search(value):
        return "holds credentials in an address; must be an address without them (give them in the environment)"
    if redacted(value) != value:
        return "holds a token or key, which every record would show; must be left to the environment, such as HF_TOKEN"
    return None


def why_secret_key(key: str, value: object) -> str | None:
    """The same of a value whose key says that it is one."""
    name = key.removeprefix(ENV_SET)
    secret = NAMES.search(name) if name != key else SECRET_KEYS.search(key)
    if not secret or value in (None, "", "null", "???"):
        return None
    return "is a secret, which every record would show; must be left to the environment, such as HF_TOKEN"


class Covering:
    """A stream that covers secrets in what is written to it; in all else it is the stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the covered text; the number of characters given."""
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def cover_output() -> None:
    """From now on cover the environment's secrets in what this process prints and logs, if there are any."""
    if isinstance(sys.stdout, Covering) or not secret_values():
        return
    sys.stdout, sys.stderr = Covering(sys.stdout), Covering(sys.stderr)  # type: ignore[assignment]
    make = logging.getLogRecordFactory()

    def made(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = make(*arguments, **more)
        try:
            record.msg, record.args = redacted(record.getMessage()), ()
        except (TypeError, ValueError):  # arguments that do not fit: logging says so when it prints the record
            pass
        return record

    logging.setLogRecordFactory(made)
