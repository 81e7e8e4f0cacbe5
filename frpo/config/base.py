"""Define the base of every section of a recipe: strict, frozen, without unknown keys."""
from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from frpo.config.text import as_yaml, plain
from frpo.errors import FrpoError
from frpo.inputs import name_of, path_of

FROM_FILE = "a file holds names only"
"""Context of the validation of a file's values: what is no name there is refused, not written to a file of its own."""


def _named_by(convert: Callable[[Any], str]) -> BeforeValidator:
    def text(value: Any, info: ValidationInfo) -> Any:
        if value is None or isinstance(value, str | int | float) or info.context == FROM_FILE:
            return value
        try:
            return convert(value)
        except FrpoError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(text)


MAX_NAME, MAX_PATH = 255, 4000
"""Most bytes of a file's name and of a path on Linux. A run adds names of its own to run.dir."""


def _possible_path(value: str) -> str:
    """Refuse a text that no file or folder can have as its path, before a run looks for it."""
    if "\0" in value:
        raise ValueError(f"no path can hold the character NUL, given {value!r:.80}; remove it")
    longest = max(len(name) for name in value.encode("utf-8", "surrogatepass").split(b"/"))
    if longest > MAX_NAME or len(value) > MAX_PATH:
        raise ValueError(f"no path is that long, given {value!r:.60}...; allowed are {MAX_NAME} bytes for each name "
                         f"and {MAX_PATH} for all; shorten it")
    return value


PathText = Annotated[str, AfterValidator(_possible_path)]
"""Path of a file or folder, or a name in its place."""

FunctionName = Annotated[str, _named_by(name_of), AfterValidator(_possible_path)]
"""'package.module:function' or 'path/file.py:function'; in Python also the function itself."""

RowsPath = Annotated[str, _named_by(path_of)]
"""A path of rows; in Python also the rows themselves."""


class Section(BaseModel):
    """Base of all sections: unknown keys fail, values keep their type, and sections cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _of_64_bits(cls, value: Any) -> Any:
        for each in value if isinstance(value, list) else (value,):
            if type(each) is int and abs(each) >= 2**63:
                raise ValueError(f"an integer must be below 2^63 in size, given one of {each.bit_length()} "
                                 "bits; give a smaller one")
        return value


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
