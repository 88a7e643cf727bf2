"""Taxonomies: which capabilities rows are labelled with; the thirteen of CODS where nobody says others.

The names and their order are those of the published system, whose labels then mean the same here; the definitions are
this project's own. Nothing of it is about images alone: on text, `OCR` is about text that is quoted in a row, and
`Spatial Reasoning` about places that it describes.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradstore.types import Capability, Taxonomy

from datastore.catalog import Catalog
from datastore.identity import content_id

CODS: tuple[Capability, ...] = tuple(
    Capability(name=name, definition=definition)
    for name, definition in (
        ("Action Recognition", "Telling what somebody or something does."),
        ("Attribute Recognition", "Telling a property that can be observed: colour, shape, size, material, state."),
        ("Captioning", "Describing a scene or a text as a whole, or summing it up."),
        ("Function Reasoning", "Working out what a thing is for, or how it is used."),
        ("Future Prediction", "Working out what is going to happen next."),
        ("Identity Reasoning", "Working out who or what something is: a person, a role, a kind, a work, a place."),
        ("Logical Reasoning", "Drawing conclusions in steps: deduction, arithmetic, puzzles, proofs."),
        ("Object Localization", "Finding where something is, which way it points, or how many there are."),
        ("OCR", "Reading written text exactly, and answering from it."),
        ("Physical Property", "Knowing the laws and properties of nature: heat, light, forces, matter, living things."),
        ("Relation Reasoning", "Working out how things or people relate: family, society, cause, comparison."),
        ("Spatial Reasoning", "Working out positions of things to each other, distances, routes and views."),
        ("Structural Understanding", "Understanding structured content: tables, charts, diagrams, formulas, code."),
    )
)


def taxonomy_id(capabilities: Sequence[Capability]) -> str:
    """The id of these capabilities in this order."""
    return content_id("tax", [capability.model_dump() for capability in capabilities])


def record(catalog: Catalog, capabilities: Sequence[Capability], *, name: str | None = None) -> Taxonomy:
    """Record these capabilities in this order; the same ones are the same taxonomy. Raises `NameTaken`."""
    stored = [capability.model_dump() for capability in capabilities]
    return catalog.add_taxonomy(id=taxonomy_id(capabilities), capabilities=stored, name=name)
