"""Define the base of every section of a recipe: strict, frozen, without unknown keys."""
from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from frpo.config.text import as_yaml, plain
from frpo.errors import FrpoError
from frpo.inputs import name_of, path_of


def _named_by(convert: Callable[[Any], str]) -> BeforeValidator:
    def text(value: Any) -> Any:
        if value is None or isinstance(value, str | int | float):  # what a file may hold in the place of a name
            return value
        try:
            return convert(value)
        except FrpoError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(text)


FunctionName = Annotated[str, _named_by(name_of)]
"""'package.module:function' or 'path/file.py:function'; in Python also the function itself."""

RowsPath = Annotated[str, _named_by(path_of)]
"""A path of rows; in Python also the rows themselves."""


class Section(BaseModel):
    """Base of all sections: unknown keys fail, values keep their type, and sections cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class WholeRecipe(Section):
    """Base of whole recipes.

    COMMAND: the `frpo` command that takes the recipe. ITEMS: what its data are. NAMED: paths of mappings that hold a
    name and the keys of that name.
    """

    COMMAND: ClassVar[str]
    ITEMS: ClassVar[str] = "prompts"
    NAMED: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def to_yaml(self) -> str:
        """Return the recipe as the text of a recipe file, with every key, defaults included."""
        return as_yaml(plain(self))
