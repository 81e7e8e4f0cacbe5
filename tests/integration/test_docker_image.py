"""docker/Dockerfile.cpu, built and run for real, without a registry of images: its base is made from Debian's packages.

It takes many minutes and 25 GiB of disk, so it runs only with FRPO_TEST_IMAGES=1, as root, and with the programs below.
What needs no image is in tests/unit/test_docker.py.
"""
from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap")
BASE, IMAGE = "docker.io/library/python:3.11-slim-bookworm", "localhost/frpo:cpu"
DISK_GIB = 25

STAND_IN = """
FROM scratch
ADD base.tar /
COPY authorities.crt /etc/ssl/certs/ca-certificates.crt
RUN ln -s /usr/bin/python3 /usr/local/bin/python
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
"""
"""The official image's Python, and the certificate authorities that this machine trusts."""

LIMITS = ("--network", "host", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000", "--shm-size", "2g")


def obstacle() -> str | None:
    """Return why no image can be built here, or None."""
    if os.environ.get("FRPO_TEST_IMAGES") != "1":
        return "builds an image for many minutes: set FRPO_TEST_IMAGES=1 to run it"
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"needs {', '.join(missing)}: install the system's packages of these names"
    if os.geteuid() != 0:
        return "needs root, for mmdebstrap and the overlay file system"
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    return None if free >= DISK_GIB else f"needs {DISK_GIB} GiB in {tempfile.gettempdir()}, which has {free:.0f}"


REASON = obstacle()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def image() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Build the image. Yields a function that runs `podman run IMAGE ARGUMENTS`."""
    folder = Path(tempfile.mkdtemp(prefix="frpo-image-"))
    store = ("--root", folder / "root", "--runroot", folder / "run", "--storage-driver", "overlay")
    build = ("buildah", *store, "bud", "--isolation", "chroot", "--pull-never", "--format", "docker")
    try:
        started = time.monotonic()
        make_base(folder / "base", build)
        call(*build, *wheels(), "--tag", IMAGE, "--file", CHECKOUT / "docker" / "Dockerfile.cpu", CHECKOUT)
        size = call("buildah", *store, "images", "--format", "{{.Size}}", IMAGE).strip()
        print(f"\n{IMAGE}: {size}, {(time.monotonic() - started) / 60:.1f} minutes with its base")

        def run(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["podman", *store, "--cgroup-manager", "cgroupfs", "--runtime", "runc", "run", "--rm",
                 "--no-healthcheck", *LIMITS, *options, IMAGE, *arguments], capture_output=True, text=True, timeout=900)

        yield run
    finally:
        subprocess.run(["buildah", *store, "rmi", "--all", "--force"], capture_output=True)
        subprocess.run(["umount", folder / "root" / "overlay"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def make_base(folder: Path, build: tuple[str | Path, ...]) -> None:
    """Build a stand-in for the image that the Dockerfile begins with, under the same name."""
    folder.mkdir()
    call("mmdebstrap", "--variant=minbase", "--mode=root", "--include=python3,python3-venv,ca-certificates", "bookworm",
         folder / "base.tar")
    shutil.copy(ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt",
                folder / "authorities.crt")
    (folder / "Dockerfile").write_text(STAND_IN, encoding="utf-8")
    call(*build, "--tag", BASE, folder)


def wheels() -> list[str]:
    """Return options for the build: this machine's own folder of wheels, as in the Makefile, and uv's cache."""
    options, flags = [], []
    links = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.find-links"],
                           capture_output=True, text=True).stdout.strip()
    flags += ["--find-links", links] if links else ["--torch-backend", "cpu"]
    if links:
        options += ["--volume", f"{links}:{links}:ro"]
    cache = Path.home() / ".cache" / "uv"
    if cache.is_dir():
        options += ["--volume", f"{cache}:/uv-cache"]
        flags += ["--cache-dir", "/uv-cache"]
    return [*options, "--build-arg", f"UV_FLAGS={' '.join(flags)}"]


def call(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_doctor_finds_nothing_wrong(image):
    done = image("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vLLM's compiled part" in done.stdout


def test_doctor_misses_a_library_that_the_image_lacks(image):
    done = image("doctor", options=("--volume", "/dev/null:/usr/lib/x86_64-linux-gnu/libnuma.so.1:ro"))
    assert done.returncode == 1 and "install libnuma1" in done.stdout, done.stdout + done.stderr


def test_a_program_runs_in_place_of_frpo_and_without_rights(image):
    done = image("python", "-c", "import os, frpo.recipes; print(os.getuid(), os.getcwd())")
    assert (done.returncode, done.stdout.split()) == (0, ["1000", "/data"]), done.stderr
    assert image("ray", "--version").stdout.startswith("ray, version ")


def test_smoke_trains_and_leaves_its_run_in_a_volume(image):
    kept = ("--volume", "runs:/data")
    done = image("train", "smoke", options=kept)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "4 steps done." in done.stdout
    assert "model.safetensors" in image("sh", "-c", "ls runs/smoke/export", options=kept).stdout.split()


def test_an_error_of_frpo_is_the_containers_exit_code(image):
    assert image("train", "no_such_recipe").returncode == 2
