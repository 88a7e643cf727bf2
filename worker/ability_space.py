"""The ability space of CODS: a network that puts rows on a sphere by the capabilities they call for, and its losses.

A row is its gradient (with its hidden state behind it, where there is one) and its routing weights. An encoder joins
them, a head puts them on the unit sphere (u), a map takes them to v, and base vectors b̂, one a capability, say by
⟨v, b̂⟩ how much of each there is. CODS (github.com/zhangzicong518/CODS) has no paper: its network and losses are kept.

What is dead by construction is kept, too. Attention over one token has one weight, which is 1: it is the linear map
W_o W_v u + b, and the query and key weights have no gradient (weight decay alone moves them). In training, dropout of
that weight leaves out whole heads. Without routing weights there is no routing branch: the gradient's goes on alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gradstore.types import ProjectorConfig
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

GRADIENT_WIDTH, GATE_WIDTH, EXPANDED, ENCODED = 512, 64, 512, 1024
SPHERE_WIDTHS = (768, 512)
CLASSIFIER_WIDTHS = (32, 16)
BRANCH_DROPOUT = 0.1  # of the two branches
SIMILARITY_WEIGHT = 0.3  # of the base vectors in the logits, beside the classifier
TEMPERATURES = (0.1, 5.0)
LARGEST_LOGIT = 20.0
EPSILON = 1e-8


@dataclass(frozen=True)
class Dims:
    """Columns of what goes in, and capabilities that come out."""

    gradients: int
    """Of gradients, and of hidden states where these go with them."""
    routing: int
    """0 where there is no routing branch."""
    capabilities: int


@dataclass(frozen=True)
class Placed:
    """Where rows are, in an ability space."""

    embedding: Tensor
    """u, unit rows (n, dim)."""
    similarity: Tensor
    """⟨v, b̂⟩ times the temperature (n, capabilities)."""
    logits: Tensor
    """(n, capabilities)"""


class Block(nn.Module):
    """A residual block whose second half is gated."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.linears = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.gate = nn.Sequential(nn.Linear(width, GATE_WIDTH), nn.ReLU(), nn.Linear(GATE_WIDTH, width), nn.Sigmoid())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x + D(b ⊙ gate(b)), (n, width)."""
        a = self.dropout(self.linears[0](F.gelu(self.norms[0](x))))
        b = self.linears[1](F.gelu(self.norms[1](a)))
        found: Tensor = x + self.dropout(b * self.gate(b))
        return found


class Encoder(nn.Module):
    """What joins the streams of a row: Xavier-uniform weights, biases of zero."""

    def __init__(self, dims: Dims, config: ProjectorConfig) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.routing = _branch(dims.routing, width, width) if dims.routing else None
        self.gradients = _branch(dims.gradients, GRADIENT_WIDTH, width)
        joined = width * (2 if dims.routing else 1)
        self.fusion = nn.Sequential(nn.Linear(joined, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout))
        self.blocks = nn.Sequential(*(Block(width, dropout) for _ in range(config.blocks)))
        self.output = nn.Sequential(
            *_hidden(width, EXPANDED, dropout), nn.Linear(EXPANDED, ENCODED), nn.LayerNorm(ENCODED)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, gradients: Tensor, routing: Tensor | None) -> Tensor:
        """(n, 1024) from (n, gradients) and (n, routing)."""
        parts = [] if self.routing is None else [self.routing(routing)]
        found: Tensor = self.output(self.blocks(self.fusion(torch.cat([*parts, self.gradients(gradients)], dim=-1))))
        return found


class AbilitySpace(nn.Module):
    """Encoder, sphere head, attention, base vectors and classifier. Drawn from torch's generator as it stands."""

    def __init__(self, dims: Dims, config: ProjectorConfig) -> None:
        super().__init__()
        self.dims, self.config = dims, config
        dim, dropout, capabilities = config.dim, config.dropout, dims.capabilities
        self.encoder = Encoder(dims, config)
        wide, narrow = SPHERE_WIDTHS
        self.sphere = nn.Sequential(
            *_hidden(ENCODED, wide, dropout), *_hidden(wide, narrow, dropout), nn.Linear(narrow, dim), nn.LayerNorm(dim)
        )
        self.attention = nn.MultiheadAttention(dim, config.heads, dropout=dropout, batch_first=True)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention_dropout = nn.Dropout(dropout)
        self.base = nn.Parameter(_base_vectors(capabilities, dim))
        self.temperature = nn.Parameter(torch.ones(()))
        first, second = CLASSIFIER_WIDTHS
        self.classifier = nn.Sequential(
            *_hidden(dim, first, dropout), *_hidden(first, second, dropout), nn.Linear(second, capabilities)
        )

    def forward(self, gradients: Tensor, routing: Tensor | None = None) -> Placed:
        """Where rows are: standardised gradients (n, dim of gradients) and routing weights (n, experts)."""
        u = F.normalize(self.sphere(self.encoder(gradients, routing)), dim=-1)
        one = u.unsqueeze(1)
        attended, _ = self.attention(one, one, one, need_weights=False)
        v = self.attention_norm(u + self.attention_dropout(attended.squeeze(1)))
        similarity = v @ self.directions().T * self.temperature.clamp(*TEMPERATURES)
        return Placed(u, similarity, self.classifier(v) + SIMILARITY_WEIGHT * similarity)

    def directions(self) -> Tensor:
        """The base vectors at unit length (capabilities, dim)."""
        return F.normalize(self.base, dim=-1)

    def gram(self) -> Tensor:
        """Cosines of the base vectors with each other (capabilities, capabilities)."""
        directions = self.directions()
        return directions @ directions.T

    @torch.no_grad()
    def straighten(self) -> None:
        """Give the base vectors unit length again, as after every step."""
        self.base.copy_(self.directions())

    def learning(self, stage: int) -> list[nn.Parameter]:
        """Have a stage's parameters learn and no others, and name them.

        Stage 1 learns all but base vectors and temperature, stage 2 all but the encoder, whose dropout goes on. What
        does not learn has no gradient, and so no part in the norm that is clipped.
        """
        for name, parameter in self.named_parameters():
            still = name in {"base", "temperature"} if stage == 1 else name.startswith("encoder.")
            parameter.requires_grad_(not still)
            parameter.grad = None
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def parameter_count(space: nn.Module) -> int:
    """How many numbers a network has."""
    return sum(parameter.numel() for parameter in space.parameters())


def gram_error(gram: Tensor) -> float:
    """How far base vectors are from orthogonal: the Frobenius norm of their cosines less the identity."""
    return float((gram.detach() - torch.eye(len(gram), device=gram.device)).norm())


# Losses -----------------------------------------------------------------------------------------------------------


def classification_loss(logits: Tensor, labels: Tensor, *, alpha: float, gamma: float = 2.0) -> Tensor:
    """Focal binary cross-entropy, the mean over rows and capabilities.

    α_t (1 − p_t)^γ ℓ with ℓ the cross-entropy and p_t = e^−ℓ; α_t is `alpha` where a capability is called for and
    1 − `alpha` where it is not (Lin et al., arXiv 1708.02002). Logits beyond ±20 count as that.
    """
    loss = F.binary_cross_entropy_with_logits(logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT), labels, reduction="none")
    weight = alpha * labels + (1 - alpha) * (1 - labels)
    return (weight * (1 - torch.exp(-loss)) ** gamma * loss).mean()


def contrastive_loss(u: Tensor, labels: Tensor, *, temperature: float = 0.1, alike: float = 0.1) -> Tensor:
    """Rows with capabilities in common are drawn together: the mean over the rows that have such a companion, or 0.

    With ỹ = y / Σy, the companions of i are the j ≠ i with ỹ_i·ỹ_j > `alike`, and its loss is the −log of their part
    of Σ e^(u_i·u_j/τ) over all j ≠ i. (The original calls ỹ_i·ỹ_j a Jaccard index, which it is not.)
    """
    others = ~torch.eye(len(u), dtype=torch.bool, device=u.device)
    shares = labels / (labels.sum(dim=1, keepdim=True) + EPSILON)
    companions = (shares @ shares.T > alike) & others
    closeness = (u @ u.T / temperature).clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp() * others
    part = (closeness * companions).sum(dim=1) / (closeness.sum(dim=1) + EPSILON)
    anchors = companions.any(dim=1)
    losses = -torch.log(part + EPSILON)
    return torch.where(anchors, losses, 0.0).sum() / anchors.sum().clamp(min=1)


def repulsion_loss(gram: Tensor, *, margin: float = 0.1) -> Tensor:
    """Base vectors are kept apart: the mean over pairs of what the size of their cosine exceeds `margin` by."""
    count = len(gram)
    apart = ~torch.eye(count, dtype=torch.bool, device=gram.device)
    excess = (gram.abs() - margin).clamp(min=0) * apart
    return excess.sum() / max(count * (count - 1), 1)


# Parts ------------------------------------------------------------------------------------------------------------


def _branch(columns: int, inner: int, width: int) -> nn.Sequential:
    """What makes a stream as wide as the others."""
    return nn.Sequential(
        nn.Linear(columns, inner),
        nn.LayerNorm(inner),
        nn.ReLU(),
        nn.Dropout(BRANCH_DROPOUT),
        nn.Linear(inner, width),
        nn.LayerNorm(width),
    )


def _hidden(columns: int, width: int, dropout: float) -> tuple[nn.Module, ...]:
    return nn.Linear(columns, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout)


def _base_vectors(count: int, dim: int) -> Tensor:
    """Orthonormal rows (count, dim); random unit rows where there are more than dimensions."""
    if count > dim:
        return F.normalize(torch.randn(count, dim), dim=-1)
    return nn.init.orthogonal_(torch.empty(count, dim))
