"""The manifests of examples/kubernetes: their processes run with the very arguments, and their parts fit together."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.conftest import CheckpointFactory
from tests.e2e.process import serving
from tests.machine import free_ports
from tests.tiers.redis_process import RedisProcess, needs_server
from tests.waiting import DEADLINE, eventually

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"
KEYS = {"cluster": "c" * 32, "secret": "s" * 32, "redis": "r" * 32, "api": "the-api-key", "admin": "the-admin-key"}
PROMPT = "the lamps along the street are lit at six and go out at dawn. " * 10


def manifests() -> dict[tuple[str, str], Any]:
    """By kind and name."""
    found = yaml.safe_load_all((FOLDER / "cluster.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def container(kind: str, name: str) -> Any:
    (only,) = manifests()[kind, name]["spec"]["template"]["spec"]["containers"]
    return only


def arguments(kind: str, name: str, replaced: Mapping[str, str]) -> list[str]:
    """Of the only container, without its command, with what only a cluster has replaced; a port is given otherwise."""
    _, *given = container(kind, name)["args"]
    for old, new in replaced.items():
        assert any(old in each for each in given), old
        given = [each.replace(old, new) for each in given]
    return [each for each in given if not each.startswith("--port=")]


def test_services_select_pods_and_name_their_ports() -> None:
    found = manifests()
    pods = {
        spec["template"]["metadata"]["labels"]["app"]: {port["name"]: port["containerPort"] for port in each["ports"]}
        for (kind, _), manifest in found.items()
        if kind in ("StatefulSet", "Deployment")
        for spec in [manifest["spec"]]
        for each in spec["template"]["spec"]["containers"]
    }
    for (kind, name), manifest in found.items():
        if kind == "Service":
            (port,) = manifest["spec"]["ports"]
            assert pods[manifest["spec"]["selector"]["app"]][port["targetPort"]] == port["port"], name
        if kind == "StatefulSet":
            assert ("Service", manifest["spec"]["serviceName"]) in found
            pod = manifest["spec"]["template"]["spec"]
            drain = int(str(option(pod["containers"][0]["args"], "--drain-seconds")))
            assert drain < pod["terminationGracePeriodSeconds"]
    gateways = found["StatefulSet", "emberkv-gateway"]
    registered = {each for each in container("StatefulSet", "emberkv-worker")["args"] if each.startswith("--gateway=")}
    assert registered == {
        f"--gateway=http://emberkv-gateway-{number}.{gateways['spec']['serviceName']}:8080"
        for number in range(gateways["spec"]["replicas"])
    }


def test_the_image_has_what_the_arguments_need() -> None:
    """The remote tier's client is an extra of its own."""
    assert option(container("StatefulSet", "emberkv-worker")["args"], "--remote-tier").startswith("redis://")
    (extras,) = re.findall(r"'/src\[(.+?)\]'", (FOLDER / "Dockerfile").read_text())
    assert extras.split(",") == ["torch", "cluster", "remote"]


def option(given: list[str], name: str) -> str:
    (value,) = (each.partition("=")[2] for each in given if each.startswith(f"{name}="))
    return value


@needs_server
def test_a_worker_and_a_gateway_run_with_these_arguments(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    for name, key in KEYS.items():
        (keys / name).write_text(key)
    worker_port = free_ports()
    common = {"0.0.0.0": "127.0.0.1", "/etc/emberkv": str(keys)}
    url = f"http://127.0.0.1:{worker_port}"
    with ExitStack() as stack:
        redis = stack.enter_context(RedisProcess(tmp_path / "redis", "--requirepass", KEYS["redis"]))
        folder = tmp_path / "gateway"
        folder.mkdir()
        options = arguments("StatefulSet", "emberkv-gateway", common)
        gateway = stack.enter_context(serving(folder, *options, command="gateway"))
        replaced = {
            **common,
            "Qwen/Qwen2.5-7B-Instruct": str(checkpoint("llama")),
            "http://$(POD_NAME).emberkv-workers:8080": url,
            "$(POD_NAME)": "emberkv-worker-0",
            "http://emberkv-gateway-0.emberkv-gateways:8080": gateway.url,
            "http://emberkv-gateway-1.emberkv-gateways:8080": gateway.url,
            "8GiB": "24MiB",
            "32GiB": "64MiB",
            "redis://emberkv-redis:6379": redis.address.url,
        }
        options = [*arguments("StatefulSet", "emberkv-worker", replaced), "--no-warmup"]
        worker = stack.enter_context(serving(tmp_path, *options, port=worker_port))
        eventually(lambda: httpx.get(f"{gateway.url}/ready", timeout=DEADLINE).status_code == 200)
        asked = {"model": "any", "prompt": PROMPT, "max_tokens": 4}
        headers = {"authorization": f"Bearer {KEYS['api']}"}
        with httpx.Client(base_url=gateway.url, headers=headers, timeout=DEADLINE) as client:
            name = client.get("/v1/models").json()["data"][0]["id"]
            answers = [client.post("/v1/completions", json={**asked, "model": name}) for _ in range(2)]
        assert [each.status_code for each in answers] == [200, 200]
        assert answers[1].headers["x-emberkv-route"].startswith("worker=emberkv-worker-0;")
        assert answers[1].json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        eventually(lambda: worker.total("emberkv_tier_blocks", tier="remote") > 0)
