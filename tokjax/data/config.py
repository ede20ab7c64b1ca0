"""Data configs: what a user gives, completed from the defaults."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from tokjax.errors import UserError


def complete(config: ml_collections.ConfigDict, default: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The default with the fields that `config` has, sections included.

    Raises:
        UserError: a field that the default does not have, or a value of another type.
    """
    given = config.to_dict()
    _check_fields("", given, default)
    for section in [name for name in default if isinstance(default[name], ml_collections.ConfigDict)]:
        _check_fields(section, given.get(section, {}), default[section])
    complete = default.copy_and_resolve_references()
    try:
        complete.update(given)
    except TypeError as error:
        raise UserError(f"data config: {str(error).splitlines()[0]}") from error
    return complete


def _check_fields(section: str, given: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(given, dict):
        raise UserError(f"data config: {section} must hold fields, got {given!r}")
    if unknown := sorted(set(given) - set(known)):
        where = f"of {section} " if section else ""
        raise UserError(f"data config: unknown field {where}{unknown[0]!r}; choose from {', '.join(known)}")
