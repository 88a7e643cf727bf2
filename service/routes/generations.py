"""Generations: what a model answers, and where its tokens went."""

from __future__ import annotations

from fastapi import Response
from gradstore.types import GenerationJob, GenerationRequest

from service.dependencies import BackendDep, Reference
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("generations")


@router.post("", status_code=202, responses=starting(GenerationJob))
def create_generation(backend: BackendDep, body: GenerationRequest, response: Response) -> GenerationJob:
    """Answer prompts greedily with a checkpoint's model; of a mixture, say which experts the tokens went to."""
    job, _ = backend.generations.start(body)
    return started(backend, job, response, model=GenerationJob)


look_and_name(router, kind="generation", model=GenerationJob, one="A generation and what was written.")


@router.delete("/{reference}", status_code=204)
def delete_generation(backend: BackendDep, reference: Reference) -> None:
    """Delete a generation; 409 while it is at work."""
    backend.jobs.remove(reference, kind="generation")
