"""Mixtures of LoRA experts: what one is made of, and what it takes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from gradstore.types.base import Body, ModelName, Precision, Request, Revision

RouterKind = Literal["single", "mor"]
GateScope = Literal["token", "batch", "fixed"]

MOST_EXPERTS = 256
"""Of a layer: more are a scheme written as a number."""

Scheme = Annotated[str, StringConstraints(pattern=r"^[1-9]+$", max_length=256)]
"""A digit for each block of layers, blocks of equal size: `2468` gives 32 layers 2, 4, 6 and 8, eight layers each."""


def _few(value: int) -> int:
    if value > MOST_EXPERTS:
        raise ValueError(f"at most {MOST_EXPERTS} in a layer; a scheme of blocks is text: {str(value)!r}")
    return value


Count = Annotated[int, Field(ge=1), AfterValidator(_few)]
Counts = Count | Annotated[list[Count], Field(min_length=1, max_length=4096)] | Scheme
"""One for all layers, one for each layer, or a scheme."""
Rank = Annotated[int, Field(ge=1, le=4096)]
ModuleName = Annotated[str, Field(min_length=1, max_length=255)]


class RouterSettings(Request):
    """What chooses the experts of a token in each adapted linear layer; no bias, and a softmax in float32."""

    kind: RouterKind = "single"
    """`single`: one linear map to the experts' logits; `mor`: several, weighted by a main router (MoR)."""
    sub_routers: int = Field(2, ge=2, le=16)
    """Of `mor`: how many linear maps there are."""
    gate_scope: GateScope = "token"
    """Of `mor`, what a weight of a sub-router is of: each `token`; the `batch`, as the published code has it, with one
    weight for all its tokens, padding included, so that a token's output depends on later ones and on other rows and
    cached generation differs from training; or `fixed`, all weights alike and no main router.
    """
    top_sub: int | None = Field(None, ge=1)
    """Of `mor` with `token`: only so many of the sub-routers, those with the largest weights, have a say."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "single":
            plain = (self.sub_routers, self.gate_scope, self.top_sub) == (2, "token", None)
            if not plain:
                raise ValueError("sub_routers, gate_scope and top_sub are of routers of routers: ask for kind=mor")
            return self
        if self.top_sub is not None and self.gate_scope != "token":
            raise ValueError("top_sub chooses sub-routers for each token: leave it out, or ask for gate_scope=token")
        if self.top_sub is not None and self.top_sub > self.sub_routers:
            raise ValueError(f"top_sub is at most sub_routers, which is {self.sub_routers}")
        return self


class MixtureSettings(Request):
    """A mixture of LoRA experts: in every adapted linear layer a router gives each token to `top_k` of `experts` LoRAs.

    With `top_k` 1 the chosen expert has the weight 1 whatever its logit: the router learns from `balance` alone.
    """

    experts: Counts = 4
    top_k: Counts = 2
    rank: Rank | Annotated[list[Rank], Field(min_length=1, max_length=4096)] = 16
    """Of each expert; one for all layers, or one for each layer."""
    alpha: float = Field(16, gt=0)
    """An expert's output is multiplied by alpha / rank; experts made from adapters keep these adapters' own."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Of the experts' input, in training; routers see all of it."""
    modules: list[ModuleName] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1, max_length=100)
    """Names of the linear layers that are adapted, in every layer of the model."""
    router: RouterSettings = RouterSettings()
    balance: float = Field(0.0, ge=0)
    """Coefficient of the load-balance loss, which is 1 for each layer where all experts get as many tokens; MoLA's code
    has 0.001.
    """
    ignore_padding: bool = True
    """Whether padding is left out of the load-balance loss; the published code counts it."""
    router_only: bool = False
    """Train the routers, and leave the experts as they are."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.modules)) < len(self.modules):
            raise ValueError("modules names a linear layer twice")
        chosen = {self.top_k} if isinstance(self.top_k, int) else set(self.top_k)
        if self.router_only and chosen <= {1, "1"} and not self.balance:
            raise ValueError(
                "a router with top_k=1 learns from the load-balance loss alone: set balance, or top_k to 2"
            )
        return self


class AllocationRequest(Request):
    """Ask what a mixture takes in a model, before anything is trained."""

    model: ModelName
    """Hub id, or a folder of the server inside an allowed root; of it the configuration is read."""
    revision: Revision | None = None
    mixture: MixtureSettings = MixtureSettings()
    precision: Precision = "bfloat16"
    """Number type of the base model while it is trained on."""


class MixtureLayer(Body):
    """A layer of the model, in all its adapted modules."""

    experts: int
    top_k: int
    rank: int


class MixtureParameters(Body):
    """How many numbers there are."""

    base: int
    """Of the base model, which stays as it is."""
    experts: int
    routers: int
    trainable: int
    active: int
    """Of experts and routers: what a token is multiplied with where only its own experts are counted."""


class MixtureMemory(Body):
    """Bytes of what is kept for as long as a training runs; activations come on top, and grow with the batch."""

    base: int
    """The base model's weights in the precision asked for."""
    mixture: int
    """Experts and routers, in float32."""
    training: int
    """Gradients and both moments of Adam, in float32, of what is trained."""
    total: int


class Allocation(Body):
    """What a mixture takes in a model: nothing of it is loaded."""

    layers: list[MixtureLayer]
    parameters: MixtureParameters
    memory: MixtureMemory
