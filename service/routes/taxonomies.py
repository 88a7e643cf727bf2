"""Taxonomies: the capabilities that annotations label rows with."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from gradstore.types import Page, Rename, Taxonomy, TaxonomyRequest

from datastore import taxonomies
from datastore.schema import TaxonomyRow
from service.dependencies import BackendDep, Paging, Reference
from service.routing import noun
from service.uploads import is_recorded

router = noun("taxonomies")


@router.post(
    "",
    status_code=201,
    responses={200: {"model": Taxonomy, "description": "The same capabilities were recorded already."}},
)
def create_taxonomy(backend: BackendDep, body: TaxonomyRequest, response: Response) -> Taxonomy:
    """Record capabilities, by default the thirteen of CODS; the same ones in the same order are the same taxonomy."""
    capabilities = body.capabilities or taxonomies.CODS
    known = is_recorded(backend.catalog, TaxonomyRow, taxonomies.taxonomy_id(capabilities))
    taxonomy = taxonomies.record(backend.catalog, capabilities, name=body.name)
    response.status_code = 200 if known else 201
    response.headers["Location"] = f"/taxonomies/{taxonomy.id}"
    return taxonomy


@router.get("")
def list_taxonomies(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[Taxonomy]:
    """A page of taxonomies, newest first."""
    return backend.catalog.taxonomies(limit=paging.limit, after=paging.after)


@router.get("/{reference}")
def get_taxonomy(backend: BackendDep, reference: Reference) -> Taxonomy:
    """A taxonomy with its capabilities."""
    return backend.catalog.taxonomy(reference)


@router.patch("/{reference}")
def rename_taxonomy(backend: BackendDep, reference: Reference, body: Rename) -> Taxonomy:
    """Give a taxonomy another name, or none."""
    return backend.catalog.taxonomy(backend.catalog.rename(TaxonomyRow, reference, body.name))


@router.delete("/{reference}", status_code=204)
def delete_taxonomy(backend: BackendDep, reference: Reference) -> None:
    """Delete a taxonomy; 409 while an annotation has it."""
    backend.catalog.remove(TaxonomyRow, reference)
