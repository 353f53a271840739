"""The launch files: what `ray up` and Kubernetes would refuse, and versions that do not belong together.

`ray up` files go through Ray's own validator. For KubeRay there is none in Python, so :data:`SCHEMA` holds the part of
its CRDs (ray.io/v1, KubeRay 1.5; ray-operator/config/crd/bases in its repository) that the manifests use,
written down by hand: which fields there are, which are required, and of what type.
"""

from __future__ import annotations

import copy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster_fl.compose import compose
from tests.conftest import REPOSITORY

LAUNCH = REPOSITORY / "ops" / "launch"
UP = ["ray-onprem.yaml", "ray-aws.yaml"]
MANIFESTS = ["kuberay-rayjob.yaml", "kuberay-raycluster.yaml"]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
IMAGE = f"cluster-fl:{PROJECT['version']}"


def record(required: str, **fields: Any) -> dict[str, Any]:
    """A mapping with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT, WHOLE, YES_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = record(
    "name image resources",
    name=TEXT,
    image=TEXT,
    ports=several(record("containerPort", containerPort=WHOLE, name=TEXT)),
    env=several(
        record(
            "name",
            name=TEXT,
            value=TEXT,
            valueFrom=record("", secretKeyRef=record("key", name=TEXT, key=TEXT, optional=YES_NO)),
        )
    ),
    resources=record("limits requests", limits=TEXTS, requests=TEXTS),
    volumeMounts=several(record("name mountPath", name=TEXT, mountPath=TEXT)),
)
VOLUME = record(
    "name",
    name=TEXT,
    emptyDir=record("", medium=TEXT, sizeLimit=TEXT),
    persistentVolumeClaim=record("claimName", claimName=TEXT),
)
TEMPLATE = record(
    "spec",
    spec=record(
        "containers",
        containers=several(CONTAINER),
        volumes=several(VOLUME),
        tolerations=several(record("", key=TEXT, operator=TEXT, effect=TEXT)),
        securityContext=record("", fsGroup=WHOLE),
        terminationGracePeriodSeconds=WHOLE,
    ),
)
CLUSTER = record(
    "headGroupSpec rayVersion",
    rayVersion=TEXT,
    authOptions=record("mode", mode={"enum": ["token", "disabled"]}),
    headGroupSpec=record("template rayStartParams", rayStartParams=TEXTS, template=TEMPLATE),
    workerGroupSpecs=several(
        record(
            "groupName minReplicas maxReplicas template rayStartParams",
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            rayStartParams=TEXTS,
            template=TEMPLATE,
        )
    ),
)
JOB = record(
    "rayClusterSpec entrypoint",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=WHOLE,
    activeDeadlineSeconds=WHOLE,
    shutdownAfterJobFinishes=YES_NO,
    ttlSecondsAfterFinished=WHOLE,
    rayClusterSpec=CLUSTER,
)
CLAIM = record(
    "accessModes resources",
    accessModes=several({"enum": ["ReadWriteOnce", "ReadWriteMany"]}),
    resources=record("requests", requests=record("storage", storage=TEXT)),
)
KINDS = {
    "RayJob": ("ray.io/v1", JOB),
    "RayCluster": ("ray.io/v1", CLUSTER),
    "PersistentVolumeClaim": ("v1", CLAIM),
}


def check_manifest(manifest: dict[str, Any]) -> None:
    version, spec = KINDS[manifest["kind"]]
    metadata = record("name", name=TEXT, annotations=TEXTS)
    whole = record(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind=TEXT,
        metadata=metadata,
        spec=spec,
    )
    jsonschema.validate(manifest, whole)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def cluster_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = documents(name)[0]["spec"]
    return found.get("rayClusterSpec", found)


def arguments() -> dict[str, str]:
    """The Dockerfile's ARGs."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    pairs = (line.removeprefix("ARG ").partition("=") for line in lines if line.startswith("ARG "))
    return {name: value for name, _, value in pairs}


# Versions.


def test_one_ray_everywhere() -> None:
    wanted = next(word for word in PROJECT["dependencies"] if word.startswith("ray["))
    image = arguments()["RAY_VERSION"]
    assert Version(image) in SpecifierSet(wanted.partition("]")[2])
    assert image == ray.__version__, "the image's Ray is the one that the tests run"
    assert {cluster_of(name)["rayVersion"] for name in MANIFESTS} == {image}


def test_a_python_that_the_project_takes() -> None:
    tag = arguments()["PYTHON"]
    version = f"{tag[2]}.{tag[3:]}"
    assert Version(f"{version}.9") in SpecifierSet(PROJECT["requires-python"])


def test_one_image_everywhere() -> None:
    for name in UP:
        assert documents(name)[0]["docker"]["image"] == IMAGE
    for name in MANIFESTS:
        cluster = cluster_of(name)
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        images = {c["image"] for group in groups for c in group["template"]["spec"]["containers"]}
        assert images == {IMAGE}


def test_what_the_image_copies_is_there() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"pyproject.toml", "cluster_fl", "actors", "ops", "configs"} <= set(copied)
    assert all((REPOSITORY / path).exists() for path in copied)


# ray up.


@pytest.mark.parametrize("name", UP)
def test_ray_up_takes_it(name: str) -> None:
    (content,) = documents(name)
    prepared = prepare_config(copy.deepcopy(content))
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "head_nodes": {}})


@pytest.mark.parametrize("name", UP)
def test_a_cluster_of_ray_up_is_closed_to_others(name: str) -> None:
    (content,) = documents(name)
    (start,) = [c for c in content["head_start_ray_commands"] if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in start
    assert "-e RAY_AUTH_MODE=token" in content["docker"]["run_options"]
    assert list(content["file_mounts"]) == ["/home/ray/.ray/auth_token"]


# KubeRay.


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_takes_it(name: str) -> None:
    first, claim = documents(name)
    check_manifest(first)
    check_manifest(claim)
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        # Ray reads the limits; Kubernetes lets nobody ask for another number of GPUs than its limit.
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == [claim["metadata"]["name"]]


def test_both_manifests_are_of_one_cluster() -> None:
    job, cluster = (cluster_of(name) for name in MANIFESTS)
    assert job == cluster


def test_what_kuberay_would_refuse() -> None:
    """The check itself: a field too few, one too many, one of another type."""
    good = documents(MANIFESTS[0])[0]
    for change in (
        lambda spec: spec["rayClusterSpec"].pop("headGroupSpec"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas="2"),
        lambda spec: spec["rayClusterSpec"].update(headGroup={}),
        lambda spec: spec.update(submissionMode="K8sJob"),
    ):
        bad = copy.deepcopy(good)
        change(bad["spec"])
        with pytest.raises(jsonschema.ValidationError):
            check_manifest(bad)


def test_the_job_runs_what_is_there_and_can_go_on() -> None:
    spec = documents("kuberay-rayjob.yaml")[0]["spec"]
    command, verb, file, *overrides = shlex.split(spec["entrypoint"])
    assert (command, verb) == ("cluster-fl", "run")
    inside = Path(file).relative_to("/home/ray/cluster-fl")
    config = compose([REPOSITORY / inside], overrides)
    assert config.run.name is not None
    mounts = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert config.run.root in [mount["mountPath"] for mount in mounts]
    assert spec["shutdownAfterJobFinishes"]  # KubeRay takes no ttlSecondsAfterFinished without
