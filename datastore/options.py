"""What a command of the server was told: its options, and in the environment what was left out."""

from __future__ import annotations

from typing import Any

import typer
from pydantic import ValidationError

from datastore.settings import Settings


def configured(**given: Any) -> Settings:
    """The settings of the environment, those in their place that are given and not None.

    Raises typer.BadParameter that names the variable which cannot be used.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        prefix = Settings.model_config["env_prefix"]
        reasons = (f"{prefix}{str(item['loc'][0]).upper()}: {item['msg']}" for item in error.errors())
        raise typer.BadParameter("; ".join(reasons)) from error
