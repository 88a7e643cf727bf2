"""How alike adapters are: the mean cosine of what they hold for each matrix of their base model (ROCKET, algorithm 1).

`cosine_ab` is the paper's: the cosines of the tensors A and of the tensors B, flattened, over all of them. It depends
on the basis that a training happened to find: (MA, BM⁻¹) is the same adapter as (A, B), and two adapters that began
with the same A stay alike in A whatever they learnt. `cosine_delta` compares what is added to the weights, ΔW = BA,
by r × r products alone: ⟨ΔWᵢ, ΔWⱼ⟩ = tr((BⱼᵀBᵢ)(AᵢAⱼᵀ)). Of a 4096 × 4096 matrix and r = 16 that takes 4 million
multiplications a pair where ΔW itself takes 270, and 16 KiB where it takes 128 MiB.

Both leave alpha/r out: a cosine does not change with the size of what it compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from gradstore.types import AdapterSimilarity
from numpy.typing import NDArray

from datastore.tensors import Header, read, read_header

A, B = ".lora_A.weight", ".lora_B.weight"
"""What follows a module's name in those of its tensors."""
Doubles = NDArray[np.float64]
Factors = tuple[Doubles, Doubles]
"""A (r, in) and B (out, r) of one matrix of one adapter."""


def similarities(modules: Iterable[Sequence[Factors]], *, by: AdapterSimilarity) -> Doubles:
    """Mean cosines of m adapters with each other (m, m), from each matrix's factors in all of them, one at a time.

    A factor or ΔW of zeros has no direction: its cosine is 0 with all others. `cosine_ab` needs one rank in all.
    """
    cosines: Callable[[Sequence[Factors]], list[Doubles]] = _of_factors if by == "cosine_ab" else _of_updates
    found = [each for module in modules for each in cosines(module)]
    mean: Doubles = np.mean(found, axis=0)
    return mean


def factors(files: Sequence[Path]) -> Iterator[list[Factors]]:
    """A and B of each matrix in all of these adapters' files, one matrix at a time, in float64.

    Zeros stand where an adapter is not on a matrix that another one is on. Raises `InvalidCheckpoint`.
    """
    headers = [read_header(path) for path in files]
    modules = {name.removesuffix(A) for header in headers for name in header.tensors if name.endswith(A)}
    for module in sorted(modules):
        found = [_read(path, header, module) for path, header in zip(files, headers, strict=True)]
        a, b = next(each for each in found if each is not None)
        nothing = (np.zeros((1, a.shape[1])), np.zeros((b.shape[0], 1)))
        yield [nothing if each is None else each for each in found]


def _read(path: Path, header: Header, module: str) -> Factors | None:
    if module + A not in header.tensors:
        return None
    return read(path, header, module + A), read(path, header, module + B)


def _of_factors(module: Sequence[Factors]) -> list[Doubles]:
    """The cosines of A, and those of B."""
    flat = (np.stack([factor.ravel() for factor in kind]) for kind in zip(*module, strict=True))
    return [_cosines(rows @ rows.T) for rows in flat]


def _of_updates(module: Sequence[Factors]) -> list[Doubles]:
    """The cosines of ΔW."""
    products = np.empty((len(module), len(module)))
    for one, (a, b) in enumerate(module):
        for other, (other_a, other_b) in enumerate(module[: one + 1]):
            products[one, other] = products[other, one] = np.sum((b.T @ other_b) * (a @ other_a.T))
    return [_cosines(products)]


def _cosines(products: Doubles) -> Doubles:
    lengths = np.sqrt(np.maximum(np.diag(products), 0))
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    found: Doubles = np.clip(products * np.outer(inverse, inverse), -1, 1)
    return found
