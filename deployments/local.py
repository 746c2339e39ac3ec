"""A Ray Serve application on this machine alone: what the command line, the demo and the tests start."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.app import APP_NAME, AppArgs, build
from deployments.autoscaling import POLICY

_POLL_S = 0.1
_ENVIRONMENT = {
    # Nothing here needs a hub, telemetry, or a token between processes of one machine.
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a proxy that dies is missed for 5 s instead of 25
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
        if (client := _get_global_client(raise_if_no_controller_running=False)) is not None:
            # Handles of autoscaled deployments go on to report, and would join whatever other Ray runs here.
            client.shutdown_cached_handles()
        ray.shutdown()


@dataclass(frozen=True)
class ConfiguredApp:
    """One application of a Serve config file."""

    name: str
    route_prefix: str
    args: AppArgs


def deploy(args: AppArgs, name: str = APP_NAME, route_prefix: str = "/") -> serve.handle.DeploymentHandle:
    """Start an application and wait until it answers."""
    (handle,) = deploy_all([ConfiguredApp(name, route_prefix, args)])
    return handle


def deploy_all(apps: Sequence[ConfiguredApp]) -> list[serve.handle.DeploymentHandle]:
    """Start applications and wait until they answer. Autoscaled ones take the place of those started before.

    ``serve.run`` knows no policy for a whole application, so that those that need one are deployed as from a file.
    """
    autoscaled = [app for app in apps if app.args.autoscaled]
    if autoscaled:
        _deploy_declared(autoscaled)
    for app in apps:
        if app not in autoscaled:
            serve.run(build(app.args), name=app.name, route_prefix=app.route_prefix)
    return [serve.get_app_handle(app.name) for app in apps]


def _deploy_declared(apps: Sequence[ConfiguredApp]) -> None:
    """What ``serve deploy`` does, without the dashboard. Raises RuntimeError with what Serve says of a failure."""
    declared = [
        {
            "name": app.name,
            "route_prefix": app.route_prefix,
            "import_path": "deployments.app:build",
            "args": app.args.model_dump(mode="json", exclude_unset=True),
            "autoscaling_policy": {"policy_function": POLICY},
        }
        for app in apps
    ]
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema(applications=declared))
    waiting = {app.name for app in apps}
    while waiting:
        time.sleep(_POLL_S)
        status = serve.status().applications
        failed = {name: status[name].message for name in waiting if status[name].status == "DEPLOY_FAILED"}
        if failed:
            raise RuntimeError("; ".join(f"{name}: {message}" for name, message in failed.items()))
        waiting = {name for name in waiting if status[name].status != "RUNNING"}
    client.wait_for_proxies_serving(wait_for_applications_running=True)


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
