"""Fine-tunes: trainings on a selection, a dataset or a part of one."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from gradstore.types import FinetuneJob, FinetuneRequest

from service.dependencies import BackendDep, Reference
from service.estimates import of_finetune
from service.openapi import starting
from service.routes.checkpoints import ZIP, weights
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("finetunes")


@router.post("", status_code=202, response_model=FinetuneJob, responses=starting(FinetuneJob, dry_run=True))
def create_finetune(backend: BackendDep, body: FinetuneRequest, response: Response) -> FinetuneJob | Response:
    """Fine-tune a model. The same request gives the same fine-tune; `dry_run=true` answers what it would cost."""
    if body.dry_run:
        return JSONResponse(of_finetune(backend, body).model_dump(mode="json"))
    job, _ = backend.finetunes.start(body)
    return started(backend, job, response, model=FinetuneJob)


look_and_name(router, kind="finetune", model=FinetuneJob, one="A fine-tune, its loss curve and its checkpoints.")


@router.get("/{reference}/content", response_class=StreamingResponse, responses=ZIP)
def get_finetune_content(backend: BackendDep, reference: Reference) -> StreamingResponse:
    """The last checkpoint as a zip of a PEFT folder; of a full fine-tune, the model. 409 before it has succeeded."""
    return weights(backend, backend.finetunes.last_checkpoint(reference))


@router.delete("/{reference}", status_code=204)
def delete_finetune(backend: BackendDep, reference: Reference) -> None:
    """Delete a fine-tune with its run and checkpoints; 409 while one of them is needed, or it is at work."""
    backend.finetunes.remove(reference)
