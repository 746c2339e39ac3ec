"""A Ray Serve application on this machine alone: what the command line, the demo and the tests start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray import serve

from deployments.app import APP_NAME, AppArgs, build

_ENVIRONMENT = {
    # Nothing here needs a hub, telemetry, or a token between processes of one machine.
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def local_ray(port: int, host: str = "127.0.0.1", *, log_to_stderr: bool = False) -> Iterator[None]:
    """A Ray of our own with an HTTP proxy on ``host:port``; stopped on leaving."""
    for name, value in {**_ENVIRONMENT, "RAY_SERVE_LOG_TO_STDERR": str(int(log_to_stderr))}.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        # Ray's CPUs only count reservations; replicas share the machine as the operating system sees fit.
        num_cpus=max(16, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=log_to_stderr,
        logging_level="ERROR",
    )
    try:
        serve.start(http_options={"host": host, "port": port})
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class ConfiguredApp:
    """One application of a Serve config file."""

    name: str
    route_prefix: str
    args: AppArgs


def deploy(args: AppArgs, name: str = APP_NAME, route_prefix: str = "/") -> serve.handle.DeploymentHandle:
    """Start an application and wait until it answers."""
    return serve.run(build(args), name=name, route_prefix=route_prefix)


def read_config(path: Path) -> list[ConfiguredApp]:
    """Our applications in a Serve config file. Raises OSError; ValueError for what is no such file."""
    try:
        document = yaml.safe_load(path.read_text())
        return [
            ConfiguredApp(entry.get("name", APP_NAME), entry.get("route_prefix", "/"), AppArgs(**entry["args"]))
            for entry in document["applications"]
        ]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is no Serve config ({type(error).__name__}: {error})") from error
