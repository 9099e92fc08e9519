"""Command-line options made of the fields of a config: names, types and help stand there alone."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Container, Iterator
from typing import Annotated, Any, get_type_hints

from cyclopts import Parameter

from lorapre_recipes.config import ONLY_FOR, Checked
from lorapre_recipes.presets import FINETUNE, PRETRAIN

Command = Callable[..., Any]


def options(
    config: type[Checked], *, without: Container[str] = (), preset: str | bool = False
) -> Callable[[Command], Command]:
    """Give a command an option for every field of a config that has help, but those in `without`.

    The command gets the options that were given as a dict, its argument `changes`. With `preset`,
    what is not given comes from one, and what it switches on can be switched off. Help then shows
    this preset's values; `--dry-run` shows those of another.
    """
    added = {each.name: each for each in parameters(config, preset) if each.name not in without}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*arguments: Any, **given: Any) -> Any:
            values = {name: given.pop(name, None) for name in added}
            changes = {name: value for name, value in values.items() if value is not None}
            return command(*arguments, **given, changes=changes)

        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.name != "changes"]
        run.__signature__ = signature.replace(parameters=[*own, *added.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*own, *added.values())}
        return run

    return decorate


def parameters(config: type[Checked], preset: str | bool) -> Iterator[inspect.Parameter]:
    """The fields with help as parameters of a function; those of derived classes come first."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    types, annotated = get_type_hints(config), get_type_hints(config, include_extras=True)
    methods, presets = getattr(config, "METHODS", ()), dict[str, Any](PRETRAIN | FINETUNE)
    usual = presets[preset]("lorapre-adamw") if isinstance(preset, str) else None
    for owner in config.__mro__:
        for name in inspect.get_annotations(owner):
            if name not in fields:
                continue
            default = fields.pop(name).default
            for help in getattr(annotated[name], "__metadata__", ()):
                if name in ONLY_FOR:
                    known = [method for method in methods if method in ONLY_FOR[name]]
                    help += f" Only for {', '.join(known)}."
                hidden = preset or default in (dataclasses.MISSING, False, ())
                option = Parameter(
                    help=help,
                    group=getattr(owner, "GROUP", "Parameters"),
                    negative=None if preset and types[name] is bool else (),
                    show_default=usual and functools.partial(shown, getattr(usual, name)),
                )
                yield inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None if hidden else default,
                    annotation=Annotated[types[name] | None, option],
                )


def shown(value: Any, _: Any) -> str:
    """What help shows for a value: as it is typed."""
    values = value if isinstance(value, tuple) else (value,)
    return "none" if value in (None, ()) else " ".join(map(str, values))
