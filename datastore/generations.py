"""Generations: which checkpoint answers which prompts, and whether its routers can be traced."""

from __future__ import annotations

from dataclasses import dataclass

from gradstore.types import AnyJob, GenerationRequest

from datastore.catalog import Catalog
from datastore.errors import refusal
from datastore.finetunes import Finetunes
from datastore.identity import content_id
from datastore.leases import Jobs, NewShard

DEFAULT_MAX_LENGTH = 2048  # tokens


@dataclass(frozen=True)
class Generations:
    """The generations of a catalog."""

    catalog: Catalog
    jobs: Jobs
    finetunes: Finetunes

    def start(self, request: GenerationRequest) -> tuple[AnyJob, bool]:
        """Start a generation, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput` for a trace of what has no routers, and `Conflict` where the fine-tune has
        not succeeded.
        """
        uses = []
        reference = request.checkpoint
        if request.finetune is not None:
            uses.append(self.jobs.get(request.finetune, kind="finetune").id)
            reference = self.finetunes.last_checkpoint(uses[0])
        checkpoint = self.catalog.checkpoint(reference or "")
        if request.trace and checkpoint.method != "mixture":
            raise refusal(
                f"{checkpoint.id} is no mixture of LoRA experts, so no router is at work in it: leave trace out, or "
                "name a checkpoint whose method is mixture",
                "/trace",
            )
        plan = {
            "model": checkpoint.model,
            "revision": checkpoint.revision,
            "checkpoint": checkpoint.id,
            "template": request.template or checkpoint.template or "tulu",
            "max_length": request.max_length or checkpoint.max_length or DEFAULT_MAX_LENGTH,
            "precision": request.precision or checkpoint.precision,
        }
        meant = request.model_dump(mode="json", exclude={"name", "finetune"}) | plan
        return self.jobs.create(
            id=content_id("gen", meant),
            kind="generation",
            request=request.model_dump(mode="json"),
            plan=plan,
            shards=[NewShard(payload={}, units=len(request.prompts))],
            name=request.name,
            uses=[*uses, checkpoint.id],
        )
