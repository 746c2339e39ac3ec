"""Repositories of the Hugging Face hub: huggingface_hub says what there is, the files come over our own ``Web``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented all the same
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from adapter_router.catalog.adapter_files import CONFIG, FILES, PICKLE
from adapter_router.catalog.sources.address import Address, parse_redirect, redacted
from adapter_router.catalog.sources.clients import Clients
from adapter_router.catalog.sources.place import Failing, RemoteFile, Stream, refused
from adapter_router.catalog.sources.policy import Policy
from adapter_router.catalog.sources.threads import in_thread
from adapter_router.catalog.sources.web import Web

_MAY_HEAL = (408, 425, 429, 500, 502, 503, 504)


def cached(address: Address) -> Path | None:
    """The folder in the hub's own cache while ``HF_HUB_OFFLINE`` forbids to ask the hub; None when it does not.

    Raises AdapterRejected when it is not in the cache either.
    """

    if not is_offline_mode():
        return None
    repository, folder = _split(address)
    config = try_to_load_from_cache(repository, folder + CONFIG, revision=address.revision)
    if isinstance(config, str):
        return Path(config).parent
    raise refused(
        [
            f"{address}: HF_HUB_OFFLINE=1 forbids to ask the hub, and its cache at {constants.HF_HUB_CACHE} does not "
            f"have it; unset that variable, or run 'hf download {repository}' where the hub can be asked"
        ]
    )


class HubRepository:
    """One commit of one repository, found when it is first looked at: a ``Place``."""

    def __init__(
        self, policy: Policy, address: Address, secret: Mapping[str, str], clients: Clients, idle_timeout_s: float
    ) -> None:

        self._policy = policy
        self._address = address
        self._repository, self._folder = _split(address)
        self._timeout_s = idle_timeout_s
        self._api = HfApi(endpoint=secret.get("endpoint"), token=secret.get("token"))
        self._commit: str | None = None
        self._headers = build_hf_headers(token=secret.get("token"))
        self._web = Web(_HubGuard(self._api.endpoint), self._url, clients, self._headers.get("authorization"))

    async def __aenter__(self) -> HubRepository:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._web.__aexit__()

    async def files(self) -> Mapping[str, RemoteFile]:
        if self._commit is None:
            self._commit = await self._find_commit()
        found = await self._ask(self._paths_info, self._commit)
        files = {info["path"].removeprefix(self._folder): info for info in found if info["type"] == "file"}
        return {
            name: RemoteFile(name, info["size"], info["oid"], True, info["lfs"]["oid"] if info.get("lfs") else None)
            for name, info in files.items()
        }

    def _paths_info(self, commit: str) -> list[dict[str, Any]]:
        """What ``HfApi.get_paths_info`` asks for, which has no time limit."""
        response = get_session().post(
            f"{self._api.endpoint}/api/models/{self._repository}/paths-info/{quote(commit, safe='')}",
            data={"paths": [self._folder + name for name in (*FILES, PICKLE)], "expand": False},
            headers=self._headers,
            timeout=self._timeout_s,
        )
        hf_raise_for_status(response)
        found: list[dict[str, Any]] = response.json()
        return found

    @asynccontextmanager
    async def read(self, file: RemoteFile, start: int) -> AsyncIterator[Stream]:
        async with self._web.stream(file.name, start) as stream:  # of a commit, which never changes
            yield stream

    def _url(self, name: str) -> str:

        commit = self._commit or "main"
        return hf_hub_url(self._repository, self._folder + name, revision=commit, endpoint=self._api.endpoint)

    async def _find_commit(self) -> str:
        asked = {"revision": self._address.revision, "timeout": self._timeout_s}
        info = await self._ask(self._api.model_info, self._repository, **asked)
        if info.id != self._repository:  # it was given another name, which may be another organisation's
            self._policy.check(Address("hf", "", (*info.id.split("/"), *self._address.segments[2:])))
        return str(info.sha)

    async def _ask(self, method: Any, *args: Any, **kwargs: Any) -> Any:

        try:
            return await in_thread(partial(method, *args, **kwargs))
        except OfflineModeIsEnabled:
            raise refused(["HF_HUB_OFFLINE=1 forbids to ask the hub; unset that variable"]) from None
        except HfHubHTTPError as error:
            raise self._failure(error) from None
        except (httpx2.HTTPError, OSError) as error:
            told = f"the hub at {redacted(self._api.endpoint)} cannot be asked: {type(error).__name__}"
            raise Failing(told) from None
        except ValueError:
            raise refused(["the hub takes this for no repository's name, or answers with something else"]) from None

    def _failure(self, error: Any) -> Exception:

        status = error.response.status_code
        if isinstance(error, RevisionNotFoundError):
            return refused([f"the repository has no revision {self._address.revision or 'main'}"])
        if isinstance(error, GatedRepoError):
            return refused(["the repository is gated; accept its terms, and name a token that may read with secretRef"])
        if isinstance(error, RepositoryNotFoundError):
            return refused(["no such repository, or not for these credentials; name a token with secretRef"])
        if status in _MAY_HEAL:
            after = error.response.headers.get("retry-after", "")
            return Failing(f"the hub says {status}", float(after) if after.isdigit() else None)
        return refused([f"the hub says {status}; name a token that may read it with secretRef"])


class _HubGuard:
    """The hub itself wherever the operator has put it, and what it redirects to, if that is public."""

    def __init__(self, endpoint: str) -> None:
        address, _ = parse_redirect(endpoint)
        self._endpoint = (address.scheme, address.authority) if address else ()
        self._public = Policy(["https://"])

    def check(self, address: Address) -> None:
        if (address.scheme, address.authority) != self._endpoint:
            self._public.check(address)

    def check_ip(self, address: Address, ip: str) -> None:
        if (address.scheme, address.authority) != self._endpoint:
            self._public.check_ip(address, ip)


def _split(address: Address) -> tuple[str, str]:
    """The repository, and what goes before the files' names in it."""
    return "/".join(address.segments[:2]), "".join(f"{part}/" for part in address.segments[2:])
