"""Command-line options made of the fields of a config: names, types and help stand there alone."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Container, Iterator
from typing import Annotated, Any, get_args, get_type_hints

from cyclopts import Parameter

from lorapre_recipes.config import ONLY_FOR, Checked, OptimizerConfig

Command = Callable[..., Any]


def options(
    config: type[Checked], *, without: Container[str] = (), preset: bool = False
) -> Callable[[Command], Command]:
    """Give a command an option for every field of a config that has help.

    The command gets the options that were given as a dict, its argument `changes`.

    Args:
        config: the class.
        without: fields that get no option.
        preset: whether what is not given comes from a preset. Then the class's own defaults are not
            shown, and what a preset switches on can be switched off.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        added = {
            field.name: inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if preset else shown_default(field),
                annotation=Annotated[hint | None, Parameter(help=help, group=group, negative=negative)],
            )
            for field, hint, help, group in fields_of(config)
            if field.name not in without
            for negative in [None if preset and hint is bool else ()]
        }

        @functools.wraps(command)
        def run(*arguments: Any, **given: Any) -> Any:
            values = {name: given.pop(name, None) for name in added}
            changes = {name: value for name, value in values.items() if value is not None}
            return command(*arguments, **given, changes=changes)

        own = [each for each in signature.parameters.values() if each.name != "changes"]
        run.__signature__ = signature.replace(parameters=[*own, *added.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*own, *added.values())}
        return run

    return decorate


def fields_of(config: type[Checked]) -> Iterator[tuple[dataclasses.Field[Any], Any, str, str]]:
    """Field, type, help and group of the fields with help: those of the derived classes first."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    types, annotated = get_type_hints(config), get_type_hints(config, include_extras=True)
    for owner in config.__mro__:
        for name in inspect.get_annotations(owner):
            if name in fields:
                field = fields.pop(name)
                texts = [text for text in get_args(annotated[name])[1:] if isinstance(text, str)]
                if texts:
                    group = getattr(owner, "GROUP", "Parameters")
                    yield field, types[name], texts[0] + limits(config, name), group


def limits(config: type[Checked], name: str) -> str:
    """For which of a config's methods an option is, in words; nothing where it is for all."""
    if name not in ONLY_FOR or not issubclass(config, OptimizerConfig):
        return ""
    methods = [method for method in config.METHODS if method in ONLY_FOR[name]]
    return f" Only for {', '.join(methods)}."


def shown_default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, or None where there is nothing to show."""
    return field.default if field.default not in (dataclasses.MISSING, False, ()) else None
