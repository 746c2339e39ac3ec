"""What the libraries of object stores are told: a secret under the names of their arguments, and how long to wait."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapter_router.catalog.sources.place import refused


def options_of(scheme: str, secret: Mapping[str, str], idle_timeout_s: float) -> dict[str, Any]:
    """Of the file system for ``scheme``. Raises AdapterRejected when ``secret`` has what it does not take."""
    return _OPTIONS[scheme](secret, idle_timeout_s)


def _s3_options(secret: Mapping[str, str], idle_timeout_s: float) -> dict[str, Any]:
    values = _values(
        secret,
        {
            "aws_access_key_id": "key",
            "aws_secret_access_key": "secret",
            "aws_session_token": "token",
            "key": "key",
            "secret": "secret",
            "token": "token",
            "endpoint_url": "endpoint_url",
            "region": "region",
            "anon": "anon",
        },
        "s3://",
    )
    region = values.pop("region", None)
    timeouts = {"connect_timeout": idle_timeout_s, "read_timeout": idle_timeout_s}
    return {
        **values,
        "client_kwargs": {"region_name": region} if region else {},
        "config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}},
    }


def _gs_options(secret: Mapping[str, str], _: float) -> dict[str, Any]:
    values = _values(secret, {"service_account": "token", "endpoint_url": "endpoint_url", "anon": "anon"}, "gs://")
    if values.pop("anon", False):
        values["token"] = "anon"
    elif "token" in values:
        try:
            values["token"] = json.loads(values["token"])
        except ValueError:
            raise refused(["the secret's service_account is not the JSON of a service account's key"]) from None
    return {**values, "access": "read_only"}


def _az_options(secret: Mapping[str, str], _: float) -> dict[str, Any]:
    names = ("account_name", "account_key", "sas_token", "connection_string", "tenant_id", "client_id", "client_secret")
    return _values(secret, {**{name: name for name in names}, "anon": "anon"}, "az://")


def _values(secret: Mapping[str, str], known: Mapping[str, str], scheme: str) -> dict[str, Any]:
    """``secret`` under the names of the library's arguments."""
    values: dict[str, Any] = {key.lower(): value for key, value in secret.items()}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise refused([f"the secret has {', '.join(map(repr, unknown))}; {scheme} takes {', '.join(known)}"])
    if "anon" in values:
        values["anon"] = values["anon"].lower() in ("1", "true", "yes")
    return {known[key]: value for key, value in values.items()}


_OPTIONS = {"s3": _s3_options, "gs": _gs_options, "az": _az_options}
