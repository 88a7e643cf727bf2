"""Taxonomies: the capabilities that rows are labelled with."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field, model_validator

from gradstore.types.base import Body, Name, Request


class Capability(Request):
    """Something that a row may ask of a model."""

    name: str = Field(min_length=1, max_length=4096)
    definition: str = Field("", max_length=10_000)
    """What it is, as a labeller is told."""


class TaxonomyRequest(Request):
    """Record capabilities in an order; the same ones in the same order are the same taxonomy."""

    capabilities: list[Capability] | None = Field(None, min_length=1, max_length=1000)
    """By default the thirteen of CODS."""
    name: Name | None = None

    @model_validator(mode="after")
    def _once_each(self) -> TaxonomyRequest:
        names = [capability.name for capability in self.capabilities or []]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the capability {twice!r} stands twice")
        return self


class Taxonomy(Body):
    """The capabilities that rows are labelled with; it never changes."""

    id: str
    name: str | None
    capabilities: list[Capability]
    """In the order of the columns of labels."""
    created_at: datetime
