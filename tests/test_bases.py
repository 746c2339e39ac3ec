"""Two bases in one application, started the way of `serve deploy` and KubeRay: the controller imports the builder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from adapter_router.catalog.location import resolve
from adapter_router.types import Row
from deployments.demo.tenants import BASE, IMAGE_TENANTS, SAMPLES, TEXT_TENANTS, VISION_BASE
from deployments.local import local_ray
from tests.serving import Application, free_port, wait_for

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """The shipped CPU configuration, with one replica a base."""
    config = yaml.safe_load(Path(resolve("package:deployments/configs/cpu.yaml")).read_text())
    (application,) = config["applications"]
    store = str(tmp_path_factory.mktemp("store"))
    application["args"].update(replicas=1, num_cpus=0.1, store_dir=store)
    port = free_port()
    with local_ray(port):
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))
        wait_for(lambda: serve.status().applications["adapter-router"].status == "RUNNING", timeout_s=180)
        yield Application(serve.get_app_handle("adapter-router"), port)


def test_every_adapter_finds_its_base(both: Application) -> None:
    assert both.http.get("/readyz").json()["ready"]
    listed = both.http.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed[:2]] == [BASE, VISION_BASE]
    parents = {entry["id"]: entry["parent"] for entry in listed[2:]}
    assert parents == {
        **{tenant.name: BASE for tenant in TEXT_TENANTS},
        **{tenant.name: VISION_BASE for tenant in IMAGE_TENANTS},
    }


def test_images_over_http(both: Application) -> None:
    for tenant in IMAGE_TENANTS:
        for image, label in tenant.images:
            url = f"/v1/image-classify?model={tenant.name}"
            response = both.http.post(url, content=image, headers={"content-type": "image/png"})
            assert response.json()["data"][0]["label"] == label


def test_one_call_mixes_rows_of_both_bases(both: Application) -> None:
    text = [Row(texts[0], name) for name, texts in SAMPLES.items()]
    images = [Row(tenant.images[0][0], tenant.name) for tenant in IMAGE_TENANTS]
    rows = [row for pair in zip(text, images, strict=False) for row in pair]
    mixed = both.infer_many([*rows, Row("x", BASE, "embedding"), Row("x", "nobody")])
    for row, outcome in zip(rows, mixed, strict=False):
        alone: Any = both.handle.infer.remote(row).result(timeout_s=60)
        assert outcome.version == alone.version and outcome.logits == pytest.approx(alone.logits, abs=1e-4)  # type: ignore[union-attr]
    assert mixed[-2].output["embedding"] and mixed[-1].code == "model_not_found"  # type: ignore[union-attr,typeddict-item]


def test_an_adapter_is_refused_by_a_base_it_does_not_fit(both: Application) -> None:
    images = IMAGE_TENANTS[0]
    body = {"name": "misplaced", "uri": images.path, "base": BASE, "wait": True}
    response = both.http.post("/v1/adapters", json=body)
    assert response.status_code == 422 and response.json()["error"]["problems"], response.text
    nowhere = both.http.post("/v1/adapters", json={**body, "base": "no-such-base"})
    assert nowhere.status_code in (400, 422) and VISION_BASE in nowhere.text
    mixed = both.infer_many([Row("x", {images.name: 0.5, TEXT_TENANTS[0].name: 0.5})])
    assert "different bases" in str(mixed[0])
