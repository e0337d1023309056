"""The manifests: rendered by Kustomize, checked against Kubernetes' own schemas, each other and the servers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, Stack

from tools.access import secret_file
from tools.command import (
    CHAT_PORT,
    TIMEOUT_SECONDS,
    TRITON_DRAIN_SECONDS,
    Ports,
    add_gateway_options,
    add_residency_options,
    add_triton_options,
    make_parser,
)
from tools.shim.server import LAST_SECONDS

FOLDER = ROOT / "tools" / "deploy" / "k8s"
COMPOSE = yaml.safe_load((ROOT / "tools" / "deploy" / "compose.yaml").read_text())
ADAPTER = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())
CUSTOM = {"ServiceMonitor", "ServingRuntime", "InferenceService"}
"""Kinds whose schemas come with their operators."""
VERSIONS = ("1.29", "1.37")
STACK_PORTS = {8101: "embed", 8102: "rerank", 8200: "http", 8201: "grpc", 8202: "metrics"}
OVERLAYS = ("cpu", "gpu", "object-store", "open", "chat")
ALL = (*OVERLAYS, "kserve")

STOP_SECONDS = TIMEOUT_SECONDS + LAST_SECONDS
"""That a gateway may take to answer what is under way."""

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """Every overlay as `kubectl apply -k` would send it; skipped without kubectl, which no package here brings."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    folders = {name: FOLDER / "overlays" / name for name in ("cpu", "gpu")} | {"kserve": FOLDER / "kserve"}
    for name in ("object-store", "open", "chat", "many-models"):
        own = folders[name] = tmp_path_factory.mktemp(name)
        overlay = {
            "resources": [os.path.relpath(FOLDER / "overlays" / "cpu", own)],
            "components": [os.path.relpath(FOLDER / "components" / name, own)],
        }
        (own / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return {name: render(folder) for name, folder in folders.items()}


def render(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {one["metadata"]["name"]: one for one in manifests if one["kind"] == kind}


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The pod specification of everything that runs."""
    for deployment in of_kind(manifests, "Deployment").values():
        yield deployment["spec"]["template"]["spec"]
    for runtime in of_kind(manifests, "ServingRuntime").values():
        (service,) = of_kind(manifests, "InferenceService").values()
        predictor = {name: value for name, value in service["spec"]["predictor"].items() if name in POD_FIELDS}
        yield {**predictor, "containers": runtime["spec"]["containers"], "volumes": runtime["spec"]["volumes"]}


POD_FIELDS = ("automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext")


def all_containers(manifests: list[Manifest]) -> list[Manifest]:
    return [container for pod in pods(manifests) for container in pod["containers"]]


def test_every_manifest_is_rendered(rendered: dict[str, list[Manifest]]) -> None:
    """None lies beside the overlays unused."""
    names = {(one["kind"], one["metadata"]["name"]) for manifests in rendered.values() for one in manifests}
    for path in FOLDER.rglob("*.yaml"):
        for one in yaml.safe_load_all(path.read_text()):
            if "kind" in one and one["kind"] not in ("Kustomization", "Component"):
                assert (one["kind"], one["metadata"]["name"]) in names, path


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", [*ALL, "many-models"])
def test_schemas(rendered: dict[str, list[Manifest]], overlay: str, version: str) -> None:
    for manifest in rendered[overlay]:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
    for spec in pods(rendered[overlay]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, version, strict=True)


def test_schemas_do_refuse() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": {"container": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, VERSIONS[0], strict=True)


@pytest.mark.parametrize("overlay", ALL)
def test_images_are_those_of_compose(rendered: dict[str, list[Manifest]], overlay: str) -> None:
    composed = {
        service["image"].replace("${IMAGES:-triton-embeddings}", "triton-embeddings")
        for service in COMPOSE["services"].values()
        if "build" in service
    }
    images = {container["image"].rpartition(":")[0] for container in all_containers(rendered[overlay])}
    assert images <= composed
    assert ("triton-embeddings/triton-gpu" in images) == (overlay == "gpu")


@pytest.mark.parametrize("overlay", ALL)
def test_pods_are_confined(rendered: dict[str, list[Manifest]], overlay: str) -> None:
    """As in Compose, and as much as the namespace asks for."""
    for pod in pods(rendered[overlay]):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
            assert "models" not in mounts or mounts["models"]["readOnly"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_gateway_without_keys_is_asked_for(rendered: dict[str, list[Manifest]], overlay: str) -> None:
    """The secret is not optional: where there is none, the pod waits for it and says so."""
    pod = of_kind(rendered[overlay], "Deployment")["shim"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one.get("value") for one in container.get("env", [])}
    secrets = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    if overlay == "open":
        assert (secrets, environment.get("GATEWAY_API_KEYS_FILE")) == ([], None)
        return
    assert secrets == [{"secretName": "gateway-api-keys"}]
    (place,) = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "gateway-api-keys"]
    assert environment["GATEWAY_API_KEYS_FILE"] == f"{place}/keys"


@pytest.mark.parametrize("overlay", ALL)
def test_triton_has_shared_memory(rendered: dict[str, list[Manifest]], overlay: str) -> None:
    found = [pod for pod in pods(rendered[overlay]) if "shared-memory" in str(pod)]
    assert len(found) == 1
    volumes = {volume["name"]: volume for volume in found[0]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in found[0]["containers"][0]["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_and_labels_meet(rendered: dict[str, list[Manifest]], overlay: str) -> None:
    manifests = rendered[overlay]
    assert {one["metadata"].get("namespace") for one in manifests} <= {"triton-embeddings", None}
    deployments = of_kind(manifests, "Deployment")
    labels = {name: one["spec"]["template"]["metadata"]["labels"] for name, one in deployments.items()}

    def selected(selector: dict[str, str]) -> list[str]:
        return [name for name in labels if selector.items() <= labels[name].items()]

    for name in ("triton", "shim"):
        assert selected(deployments[name]["spec"]["selector"]["matchLabels"]) == [name]
        service = of_kind(manifests, "Service")[name]
        assert selected(service["spec"]["selector"]) == [name]
        (container,) = deployments[name]["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == ports
        assert all(port["targetPort"] == port["name"] for port in service["spec"]["ports"])
        budget = of_kind(manifests, "PodDisruptionBudget")[name]
        assert selected(budget["spec"]["selector"]["matchLabels"]) == [name]
        policy = of_kind(manifests, "NetworkPolicy")[name]
        assert selected(policy["spec"]["podSelector"]["matchLabels"]) == [name]
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert opened <= ports.keys()
    target = of_kind(manifests, "HorizontalPodAutoscaler")["triton"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "triton"}
    assert "replicas" not in deployments["triton"]["spec"]
    monitors, services = of_kind(manifests, "ServiceMonitor"), of_kind(manifests, "Service")
    assert monitors.keys() == services.keys()
    for name, service in services.items():
        monitor = monitors[name]["spec"]
        assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert {end["port"] for end in monitor["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}
    # Every claim exists, and every claim that exists is used.
    volumes = [volume for pod in pods(manifests) for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes}
    assert claims == of_kind(manifests, "PersistentVolumeClaim").keys()
    assert (overlay == "object-store") == (not claims)


def test_the_gateway_may_reach_triton(rendered: dict[str, list[Manifest]]) -> None:
    policies = of_kind(rendered["cpu"], "NetworkPolicy")
    to_triton = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "triton"}}}
    from_shim = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "shim"}}}
    assert {"to": [to_triton], "ports": [{"port": "grpc"}]} in policies["shim"]["spec"]["egress"]
    assert {"from": [from_shim], "ports": [{"port": "grpc"}]} in policies["triton"]["spec"]["ingress"]
    assert policies["triton"]["spec"]["egress"] == []


@pytest.mark.parametrize("overlay", ALL)
def test_the_programs_understand_their_arguments(rendered: dict[str, list[Manifest]], overlay: str) -> None:
    for container in all_containers(rendered[overlay]):
        image = container["image"].rpartition(":")[0].rpartition("/")[2]
        dockerfile = (ROOT / "build" / "images" / f"{image}.Dockerfile").read_text()
        exposed = set(map(int, re.findall(r"^EXPOSE (.*)$", dockerfile, re.MULTILINE)[0].split()))
        entry = yaml.safe_load(re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)[0])
        parser = make_parser("tools", None)
        if image == "shim":
            add_gateway_options(parser)
            parser.add_argument("--triton")
        else:
            add_triton_options(parser)
        options = parser.parse_args([*entry[3:], *container["args"]])
        asked = vars(options).get("chat_port")
        assert {port["containerPort"] for port in container["ports"]} == exposed | {asked} - {None}
        assert (asked == CHAT_PORT) == (overlay == "chat" and image == "shim")
        writes = ["smollm2-135m"] if overlay == "chat" else []
        assert options.models == [*parser.get_default("models"), *writes]
        assert options.host == "0.0.0.0"
        if image == "shim":
            assert options.timeout == parser.get_default("timeout")
            service = of_kind(rendered[overlay], "Service")["triton"]
            assert service["spec"]["clusterIP"] == "None"
            assert options.triton in {f"triton:{port['port']}" for port in service["spec"]["ports"]}
        else:
            assert Ports.of(options) == Ports()
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            where = str(options.repository)
            assert where in mounts or (overlay, where[:5]) in {("object-store", "s3://"), ("kserve", "/mnt/")}


@pytest.mark.parametrize("overlay", ALL)
def test_pods_get_the_time_to_end(rendered: dict[str, list[Manifest]], overlay: str) -> None:
    for pod in pods(rendered[overlay]):
        (container,) = pod["containers"]
        program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        drain = STOP_SECONDS if "shim" in container["image"] else TRITON_DRAIN_SECONDS
        assert pod["terminationGracePeriodSeconds"] >= int(seconds) + drain + 10
        if "--connection-seconds" in container["args"]:
            age = int(container["args"][container["args"].index("--connection-seconds") + 1])
            assert int(seconds) >= 1.1 * age + 30, "gRPC's jitter, and as long as DNS may be cached"


@pytest.mark.parametrize("overlay", ALL)
def test_probes_are_answered(rendered: dict[str, list[Manifest]], overlay: str, stack: Stack) -> None:
    for container in all_containers(rendered[overlay]):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]
            if get := probe.get("httpGet"):
                port = STACK_PORTS[ports.get(get["port"], get["port"])]
                assert stack.get(port, get["path"]).status == 200
            else:
                place = ["--http-port", str(stack.ports["http"]), "--work-folder", str(stack.work_folder)]
                command = [*probe["exec"]["command"], *place]
                environment = {
                    **os.environ,
                    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                }
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr


def test_the_autoscaler_reads_what_the_adapter_makes_of_what_triton_has(
    rendered: dict[str, list[Manifest]], stack: Stack
) -> None:
    (rule,) = ADAPTER["rules"]["custom"]
    for overlay in OVERLAYS:
        (metric,) = of_kind(rendered[overlay], "HorizontalPodAutoscaler")["triton"]["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    monitors = of_kind(rendered["cpu"], "ServiceMonitor")
    (gateway,) = monitors["shim"]["spec"]["endpoints"]
    assert "gateway_model_ready" in stack.get(gateway["port"], gateway["path"]).body.decode()
    (monitor,) = monitors["triton"]["spec"]["endpoints"]
    metrics = stack.get("metrics", monitor["path"]).body.decode()
    names = set(re.findall(r"nv_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    assert names == {"nv_inference_queue_duration_us", "nv_inference_compute_infer_duration_us"}
    of_steps = set(re.findall(r"(encoder_\w+){", rule["metricsQuery"]))
    assert of_steps == set(re.findall(r"^(encoder_request_us_total){", metrics, re.MULTILINE))
    (pattern,) = set(re.findall(r'model=~"([^"]+)"', rule["seriesQuery"] + rule["metricsQuery"]))
    for name in names:
        models = re.findall(rf'^{name}{{model="([^"]+)",version="1"}}', metrics, re.MULTILINE)
        assert [model for model in models if re.fullmatch(pattern, model)] == ["minilm-encoder"]


def test_a_gateway_beside_each_triton(rendered: dict[str, list[Manifest]]) -> None:
    """It is the gateway of the other overlays but for what it loads models with, and reaches what that takes."""
    manifests = rendered["many-models"]
    for kind in ("Deployment", "PodDisruptionBudget", "NetworkPolicy"):
        assert of_kind(manifests, kind).keys() == {"triton"}
    deployment = of_kind(manifests, "Deployment")["triton"]["spec"]["template"]
    pod, labels = deployment["spec"], deployment["metadata"]["labels"]
    triton, shim = pod["containers"]
    (other,) = (one for one in all_containers(rendered["cpu"]) if one["name"] == "shim")
    unlike = ("args", "image", "volumeMounts")
    assert {key: shim[key] for key in shim if key not in unlike} == {
        key: other[key] for key in other if key not in unlike
    }
    parser = make_parser("tools", None, models=None)
    add_gateway_options(parser)
    add_residency_options(parser)
    for name in ("--triton", "--repository", "--secret-file"):
        parser.add_argument(name)
    options = parser.parse_args(shim["args"])
    served = make_parser("tools", None)
    add_triton_options(served)
    assert (options.models, options.preload) == (None, served.get_default("models"))
    own = served.parse_args(triton["args"])
    assert options.secret_file == str(secret_file(own.work_folder, own.http_port))
    assert options.triton == f"127.0.0.1:{own.grpc_port}"
    mounts = {mount["mountPath"]: mount for mount in shim["volumeMounts"]}
    written = {mount["mountPath"]: mount["name"] for mount in triton["volumeMounts"]}
    assert mounts[options.repository]["readOnly"]
    assert mounts[str(own.work_folder)]["readOnly"]
    assert mounts[str(own.work_folder)]["name"] == written[str(own.work_folder)]
    assert triton["livenessProbe"]["exec"]["command"][-2:] == ["--work-folder", str(own.work_folder)]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[written[str(own.work_folder)]]["emptyDir"]["medium"] == "Memory"
    names = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert names == volumes.keys()
    # Triton outlives the calls of the gateway.
    ends = [int(one["lifecycle"]["preStop"]["exec"]["command"][1]) for one in (triton, shim)]
    assert ends[0] >= ends[1] + STOP_SECONDS
    assert pod["terminationGracePeriodSeconds"] >= ends[0] + TRITON_DRAIN_SECONDS + 10
    service = of_kind(manifests, "Service")["shim"]["spec"]
    assert service["selector"].items() <= labels.items()
    assert {port["targetPort"] for port in service["ports"]} == {port["name"] for port in shim["ports"]}
    ingress = of_kind(manifests, "NetworkPolicy")["triton"]["spec"]["ingress"]
    assert [rule["ports"] for rule in ingress if "from" not in rule] == [[{"port": "embed"}, {"port": "rerank"}]]
    assert "grpc" not in str(ingress)


def test_kserve_names_meet(rendered: dict[str, list[Manifest]]) -> None:
    (runtime,) = of_kind(rendered["kserve"], "ServingRuntime").values()
    (service,) = of_kind(rendered["kserve"], "InferenceService").values()
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    claims = of_kind(rendered["cpu"], "PersistentVolumeClaim")
    assert model["storageUri"] in {f"pvc://{name}" for name in claims}
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    metrics = runtime["spec"]["annotations"]["prometheus.kserve.io/port"]
    assert {"name": "metrics", "containerPort": int(metrics), "protocol": "TCP"} in container["ports"]
    (triton,) = (one for one in all_containers(rendered["cpu"]) if one["name"] == "triton")
    assert container["livenessProbe"] == triton["livenessProbe"]
    assert container["resources"] == triton["resources"]


def test_settings_are_those_of_compose(rendered: dict[str, list[Manifest]]) -> None:
    """The gateway's command is what Compose runs before several Tritons where nothing is set."""
    (shim,) = (one for one in all_containers(rendered["cpu"]) if one["name"] == "shim")
    command = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE["services"]["shim-replicas"]["command"])
    assert shim["args"] == shlex.split(command)
