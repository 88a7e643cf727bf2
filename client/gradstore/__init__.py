"""Client of gradstore, the gradient datastore service."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradstore import recipes
    from gradstore.client import AsyncGradientStore, GradientStore
    from gradstore.errors import (
        APIError,
        BadRequest,
        Conflict,
        ConnectionFailed,
        GradstoreError,
        Invalid,
        JobFailed,
        MissingExtra,
        NotAllowed,
        NotAuthenticated,
        NotEnoughSpace,
        NotFound,
        RequestTimeout,
        ServerError,
        TooLarge,
        TooManyRequests,
        Unavailable,
        UnexpectedAnswer,
        WaitTimeout,
    )

__version__ = "0.1.0"

__all__ = [
    "APIError",
    "AsyncGradientStore",
    "BadRequest",
    "Conflict",
    "ConnectionFailed",
    "GradientStore",
    "GradstoreError",
    "Invalid",
    "JobFailed",
    "MissingExtra",
    "NotAllowed",
    "NotAuthenticated",
    "NotEnoughSpace",
    "NotFound",
    "RequestTimeout",
    "ServerError",
    "TooLarge",
    "TooManyRequests",
    "Unavailable",
    "UnexpectedAnswer",
    "WaitTimeout",
    "__version__",
    "recipes",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the command line and the service need only parts of the client."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "recipes":
        return import_module("gradstore.recipes")
    module = "gradstore.client" if name.endswith("GradientStore") else "gradstore.errors"
    return getattr(import_module(module), name)
