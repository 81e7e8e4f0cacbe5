"""Copy the recipes of a matrix into its folder. A moved folder can then still be reported.

    <run.dir>/retention.yaml      the matrix; it names the copies below
    <run.dir>/recipes/NAME.yaml   copies of the recipes, with the recipes that they extend
"""
from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from frpo.config.loader import dump_recipe, load_recipe, recipe_text
from frpo.config.retention import RetentionRecipe
from frpo.config.text import as_yaml

RECIPE, COPIES = "retention.yaml", "recipes"


def write_archive(recipe: RetentionRecipe) -> Path:
    """Write the matrix and copies of its recipes into its folder; return the matrix's file."""
    folder = Path(recipe.run.dir)
    values = dump_recipe(recipe)
    copied: dict[str, str] = {}
    texts = {}
    for section in _sections(values):
        source = Template(section["recipe"]).safe_substitute(run=recipe.run.dir)
        if "$" in source:  # a different recipe for each seed
            continue
        if source not in copied:
            stem, used = Path(source).stem, set(copied.values())
            name = next(name for name in (stem, *(f"{stem}_{n}" for n in range(2, 1000))) if name not in used)
            copied[source], texts[name] = name, recipe_text(source)
        section["recipe"] = f"$run/{COPIES}/{copied[source]}.yaml"
    (folder / COPIES).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / COPIES / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / RECIPE).write_text(as_yaml(values), encoding="utf-8")
    return folder / RECIPE


def read_archive(folder: Path) -> RetentionRecipe:
    """Load the matrix from a folder. The folder may have been moved after the run."""
    recipe = load_recipe(folder / RECIPE, (), RetentionRecipe)
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": str(folder)})})


def _sections(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sections that name a recipe."""
    measured = (values["measure"]["kept"], values["measure"]["utility"] or {})
    found = (*values["policies"].values(), *values["downstream"].values(), *measured)
    return [section for section in found if section.get("recipe") is not None]
