"""What every section of a recipe is: strict, frozen, without unknown keys."""
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
    """Base of all sections: unknown keys fail, values keep their type, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class WholeRecipe(Section):
    """Base of what a recipe file holds. COMMAND: of the command line. NAMED: where a mapping has a name, and keys of
    that name.
    """

    COMMAND: ClassVar[str]
    NAMED: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def to_yaml(self) -> str:
        """The recipe as the text of a recipe file, with every key, defaults included."""
        return as_yaml(plain(self))
