"""The Kubernetes manifests without a cluster: their schemas, what their parts say of each other, and their recipe.

kuberay_rayjob_v1.json holds the schemas. Its `$comment` says where they come from.
"""
from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath

import jsonschema
import pytest
import yaml

from frpo.cluster.placement import Node, assign, bundles_of
from frpo.config.loader import load_training
from frpo.errors import ConfigError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launchers" / "kubernetes"
SCHEMAS = json.loads(Path(__file__).with_name("kuberay_rayjob_v1.json").read_text(encoding="utf-8"))
ROOTS = {"RayJob": "io.ray.v1.RayJob", "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
         "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim"}


class Strict(yaml.SafeLoader):
    """A loader that rejects a key given twice, as the API server does."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice: {keys}"
        return super().construct_mapping(node, deep)


def documents(name):
    return list(yaml.load_all((FOLDER / name).read_text(encoding="utf-8"), Strict))


def closed(schema):
    """Return the schema with no other keys allowed in any mapping that lists its keys."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    only = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) and "type" in schema else {}
    return only | {key: closed(value) for key, value in schema.items()}


VALIDATOR = jsonschema.Draft202012Validator(closed(SCHEMAS))


def check(document):
    """Raise jsonschema's ValidationError for the first error of a manifest's document."""
    root = {"$ref": f"#/$defs/{ROOTS[document['kind']]}", "$defs": VALIDATOR.schema["$defs"]}
    VALIDATOR.evolve(schema=root).validate(document)


@pytest.fixture(scope="module")
def recipe_map():
    return documents("rayjob.yaml")[0]


@pytest.fixture
def job():
    return copy.deepcopy(documents("rayjob.yaml")[1])


def groups(job):
    return [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]


def pods(job):
    """List the specs of the head's pod and of the workers' pods."""
    return [group["template"]["spec"] for group in groups(job)]


def containers(job):
    """List all containers, the submitter's included."""
    return [container for pod in [job["spec"]["submitterPodTemplate"]["spec"], *pods(job)]
            for container in pod["containers"]]


def command(job):
    """Return (subcommand, recipe's path in the pod, overrides) of the entrypoint."""
    program, subcommand, recipe, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert program == "frpo"
    return subcommand, PurePosixPath(recipe), overrides


def mounted(pod, path):
    """Return the volume of a pod's container that holds this path, as the pod names it."""
    [container] = pod["containers"]
    [holder] = [mount for mount in container["volumeMounts"] if path.is_relative_to(mount["mountPath"])]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == holder["name"]]
    return volume


def loaded(job, recipe_map, folder):
    """Load the recipe of the ConfigMap with the overrides of the entrypoint, as the pod would."""
    _, path, overrides = command(job)
    for name, text in recipe_map["data"].items():
        (folder / name).write_text(text, encoding="utf-8")
    return load_training(folder / path.name, overrides)


def test_the_schemas_are_schemas_and_all_their_mappings_are_closed():
    jsonschema.Draft202012Validator.check_schema(SCHEMAS)
    lists_keys = [schema for schema in closed(SCHEMAS)["$defs"].values() if "properties" in schema]
    assert len(lists_keys) > 100
    assert all(schema["additionalProperties"] is False for schema in lists_keys)


@pytest.mark.parametrize("name, kinds", [("rayjob.yaml", ["ConfigMap", "RayJob"]),
                                         ("runs_claim.yaml", ["PersistentVolumeClaim"])])
def test_every_document_is_valid(name, kinds):
    found = documents(name)
    assert [document["kind"] for document in found] == kinds
    for document in found:
        check(document)


def misspelt_mounts(job):
    container = pods(job)[1]["containers"][0]
    container["volumeMount"] = container.pop("volumeMounts")


def misspelt_claim(job):
    pods(job)[0]["volumes"][0]["persistentVolumeClaim"]["claimname"] = "frpo-runs"


def misspelt_token(job):
    job["spec"]["rayClusterSpec"]["authOption"] = job["spec"]["rayClusterSpec"].pop("authOptions")


def words_for_a_number(job):
    job["spec"]["backoffLimit"] = "twice"


def number_for_a_word(job):
    groups(job)[0]["rayStartParams"]["num-gpus"] = 0  # Kubernetes converts no number to a string


def unknown_unit(job):
    pods(job)[1]["containers"][0]["resources"]["limits"]["memory"] = "64GB"


def empty_image(job):
    pods(job)[0]["containers"][0]["image"] = None


def no_template(job):
    del groups(job)[1]["template"]


def no_mount_path(job):
    del pods(job)[0]["containers"][0]["volumeMounts"][0]["mountPath"]


def no_name(job):
    del pods(job)[1]["containers"][0]["name"]


@pytest.mark.parametrize("damage, message", [
    (misspelt_mounts, r"'volumeMount' was unexpected"), (misspelt_claim, r"'claimname' was unexpected"),
    (misspelt_token, r"'authOption' was unexpected"), (words_for_a_number, r"'twice' is not of type 'integer'"),
    (number_for_a_word, r"0 is not of type 'string'"), (unknown_unit, r"'64GB' is not valid"),
    (empty_image, r"None is not of type 'string'"), (no_template, r"'template' is a required property"),
    (no_mount_path, r"'mountPath' is a required property"), (no_name, r"'name' is a required property")])
def test_an_error_in_the_job_is_found(job, damage, message):
    job = json.loads(json.dumps(job))  # an alias of YAML is one object in two places
    damage(job)
    with pytest.raises(jsonschema.ValidationError, match=message):
        check(job)


def test_an_error_in_the_other_documents_is_found(recipe_map):
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'string'"):
        check(recipe_map | {"data": {"recipe.yaml": {"run": {}}}})
    [claim] = documents("runs_claim.yaml")
    with pytest.raises(jsonschema.ValidationError, match="'accessMode' was unexpected"):
        check(claim | {"spec": claim["spec"] | {"accessMode": ["ReadWriteMany"]}})


def test_frpo_loads_the_recipe_and_the_overrides_of_the_entrypoint(job, recipe_map, tmp_path):
    recipe = loaded(job, recipe_map, tmp_path)
    assert command(job)[0] == recipe.COMMAND
    assert recipe.run.resume == "auto", "a retry has to go on from the newest checkpoint"
    assert recipe.run.device == "cuda"


def test_a_key_that_frpo_does_not_know_is_found(job, recipe_map, tmp_path):
    renamed = recipe_map["data"]["recipe.yaml"].replace("num_ranks", "number_of_ranks")
    with pytest.raises(ConfigError, match="number_of_ranks"):
        loaded(job, {"data": {"recipe.yaml": renamed}}, tmp_path)
    job["spec"]["entrypoint"] += " run.folder=/runs/first"
    with pytest.raises(ConfigError, match="folder"):
        loaded(job, recipe_map, tmp_path)


def test_all_pods_read_the_recipe_and_share_the_folder_of_runs(job, recipe_map, tmp_path):
    [claim] = documents("runs_claim.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    folder, recipe = PurePosixPath(loaded(job, recipe_map, tmp_path).run.dir), command(job)[1]
    for pod in pods(job):
        assert mounted(pod, folder)["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        assert mounted(pod, recipe)["configMap"] == {"name": recipe_map["metadata"]["name"]}
        assert mounted(pod, PurePosixPath("/dev/shm"))["emptyDir"]["medium"] == "Memory"
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names


def test_the_workers_have_the_gpus_of_the_recipe_and_the_head_has_none(job, recipe_map, tmp_path):
    [head, worker], [first, second] = groups(job), pods(job)
    assert head["rayStartParams"]["num-gpus"] == "0" and "nvidia.com/gpu" not in str(first)
    resources = second["containers"][0]["resources"]
    gpus = resources["limits"]["nvidia.com/gpu"]
    assert resources["requests"]["nvidia.com/gpu"] == gpus  # Kubernetes rejects other pairs
    assert worker["minReplicas"] == worker["replicas"] == worker["maxReplicas"]
    nodes = [Node(address=f"worker {number}", gpus=gpus) for number in range(worker["replicas"])]
    placed = assign(bundles_of(loaded(job, recipe_map, tmp_path)), nodes)
    assert sum(bundle.gpus for bundle, _ in placed) == gpus * len(nodes), "no GPU may be idle"


def test_a_failed_job_is_tried_again_and_nothing_stays(job):
    spec = job["spec"]
    assert spec["backoffLimit"] == 2 and spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert all(pod["terminationGracePeriodSeconds"] >= 60 for pod in pods(job))


def test_no_container_has_more_rights_than_it_needs(job):
    for pod in [job["spec"]["submitterPodTemplate"]["spec"], *pods(job)]:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    for container in containers(job):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_versions_and_signals_are_those_of_frpo(job):
    ray = re.search(r"^ray==(\S+)", (ROOT / "frpo" / "locks" / "gpu.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.group(1)
    spec = importlib.util.spec_from_file_location("launcher_ray_job_of_kubernetes", ROOT / "launchers" / "ray_job.py")
    launcher = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    assert yaml.load(job["spec"]["runtimeEnvYAML"], Strict) == {"env_vars": launcher.STOP}


def test_no_secret_is_in_the_files(job):
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}, "KubeRay makes the token"
    for path in FOLDER.glob("*.yaml"):
        assert all(document["kind"] != "Secret" for document in documents(path.name)), path
    names = {variable["name"] for container in containers(job) for variable in container.get("env", [])}
    assert names == {"HOME", "USER", "HF_HOME"}


def test_a_wheel_holds_the_files(tmp_path):
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    held = {path.name for path in (tmp_path / "frpo" / "launchers" / "kubernetes").iterdir()}
    assert held == {path.name for path in FOLDER.iterdir()}
