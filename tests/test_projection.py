"""The projections: the numbers are those of the documented generator, and inner products survive."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import pytest
import torch

from worker import projection
from worker.projection import Projection, ProjectionName, make_projection, random_words, stream_key

SHAPES = [("a.lora_A.weight", torch.Size([4, 150])), ("b.bias", torch.Size([7])), ("a.lora_B.weight", torch.Size([64]))]
SIZE = sum(shape.numel() for _, shape in SHAPES)
MASK = (1 << 64) - 1


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def word(key: int, counter: int) -> int:
    """SplitMix64 in Python's unbounded integers."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def key(seed: int, purpose: str, name: str) -> int:
    digest = hashlib.sha256(f"gradstore-projection|1|{seed}|{purpose}|{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def dense(name: ProjectionName, dim: int, seed: int) -> torch.Tensor:
    """The whole matrix (p, dim) of the map, number by number from the documentation."""
    rows = []
    for parameter, shape in SHAPES:
        for c in range(shape.numel()):
            row = [0.0] * dim
            if name == "blocks":
                bit = word(key(seed, "signs", parameter), c // 64) >> (c % 64) & 1
                offset = word(key(seed, f"offsets/{dim}", parameter), c // dim) * dim >> 64
                row[(c % dim + offset) % dim] = 2.0 * bit - 1
            else:
                for j in range(dim):
                    bit = word(key(seed, "matrix", parameter), c * 2**14 + j // 64) >> (j % 64) & 1
                    row[j] = (2.0 * bit - 1) / math.sqrt(dim)
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def vectors(count: int, *, seed: int = 0) -> torch.Tensor:
    """Flat gradients (count, p) with few large coordinates and many small ones, related to one another."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(SIZE, generator=generator).pow(4)
    common = torch.randn(SIZE, generator=generator)
    return (torch.randn(count, SIZE, generator=generator) + 0.5 * common) * scales


def project(made: Projection, flat: torch.Tensor) -> dict[int, torch.Tensor]:
    parts = flat.split([shape.numel() for _, shape in SHAPES], dim=1)
    named = ((name, part) for (name, _), part in zip(SHAPES, parts, strict=True))
    return made.project(named, examples=len(flat))


def test_the_generator_is_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    drawn = [w & MASK for w in random_words(1234567, torch.arange(4)).tolist()]
    assert drawn == published == [word(1234567, c) for c in range(4)]


def test_the_generator_wraps_like_unsigned_integers_at_any_counter() -> None:
    counters = [0, 1, 2**31, 2**40 + 5, 2**62]
    for seed in (0, 1, 2**63, MASK):
        drawn = [w & MASK for w in random_words(seed, torch.tensor(counters)).tolist()]
        assert drawn == [word(seed, c) for c in counters]


def test_streams_are_keyed_by_seed_purpose_and_name() -> None:
    assert stream_key(3, "signs", "ä.weight") == key(3, "signs", "ä.weight")
    assert len({stream_key(s, p, n) for s in (0, 1) for p in ("signs", "matrix") for n in ("a", "b")}) == 8


@pytest.mark.parametrize("name", ["blocks", "rademacher"])
@pytest.mark.parametrize("dim", [1, 50, 64, 130, 599])
def test_a_map_is_the_documented_matrix(name: ProjectionName, dim: int) -> None:
    flat = vectors(5)
    got = project(make_projection(name, dims=[dim], parameters=SHAPES, seed=7), flat)[dim]
    wanted = flat.double() @ dense(name, dim, 7)
    assert torch.allclose(got.double(), wanted, rtol=0, atol=1e-5 * float(flat.norm(dim=1).max()))


def test_runs_one_by_one_and_all_at_once_are_one_map() -> None:
    """CPU and GPU, large and small dimensions, take different ways to the same sums."""
    flat = vectors(4)
    signs = torch.sign(vectors(1, seed=1)[0])
    offsets = [17, 0, 49, 1, *range(30, 40)]
    one_by_one, at_once = torch.zeros(4, 50), torch.zeros(4, 50)
    projection._add_runs(flat, signs, offsets, one_by_one)
    projection._add_folded(flat, signs, offsets, at_once)
    assert torch.allclose(at_once, one_by_one, rtol=0, atol=1e-5 * float(flat.norm()))
    assert at_once.abs().max() > 0


@pytest.mark.parametrize("name", ["blocks", "rademacher"])
def test_several_dims_in_one_pass_are_each_alone(name: ProjectionName) -> None:
    flat = vectors(3)
    together = project(make_projection(name, dims=[600, 32, 100], parameters=SHAPES, seed=5), flat)
    for dim, image in together.items():
        alone = project(make_projection(name, dims=[dim], parameters=SHAPES, seed=5), flat)[dim]
        assert torch.allclose(image, alone, rtol=0, atol=1e-5 * float(flat.norm()))


def test_a_rademacher_matrix_made_in_small_blocks_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = vectors(3)
    made = make_projection("rademacher", dims=[96], parameters=SHAPES, seed=5)
    whole = project(made, flat)[96]
    drawn: list[int] = []
    matrix = made.matrix  # type: ignore[attr-defined]  # Rademacher's own

    def counted(name: str, start: int, stop: int, dim: int) -> torch.Tensor:
        drawn.append((stop - start) * dim)
        return matrix(name, start, stop, dim)  # type: ignore[no-any-return]

    monkeypatch.setattr(made, "matrix", counted)
    monkeypatch.setattr(projection, "BLOCK_ELEMENTS", 96 * 11)
    assert torch.allclose(project(made, flat)[96], whole, rtol=0, atol=1e-5 * float(flat.norm()))
    assert max(drawn) <= 96 * 11


@pytest.mark.parametrize("name", ["blocks", "rademacher"])
def test_the_order_of_parameters_does_not_change_a_map(name: ProjectionName) -> None:
    flat = vectors(3)
    parts = dict(zip([n for n, _ in SHAPES], flat.split([s.numel() for _, s in SHAPES], dim=1), strict=True))
    forwards = make_projection(name, dims=[64], parameters=SHAPES, seed=2).project(parts.items(), examples=3)[64]
    backwards = make_projection(name, dims=[64], parameters=SHAPES[::-1], seed=2)
    assert torch.allclose(backwards.project(reversed(parts.items()), examples=3)[64], forwards, atol=1e-5)


@pytest.mark.parametrize("name", ["blocks", "rademacher"])
def test_another_seed_is_another_map(name: ProjectionName) -> None:
    flat = vectors(2)
    one, again, other = (
        project(make_projection(name, dims=[64], parameters=SHAPES, seed=s), flat)[64] for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert torch.nn.functional.cosine_similarity(one, other).abs().max() < 0.7


@pytest.mark.parametrize("name", ["blocks", "rademacher"])
def test_inner_products_are_right_on_average_over_seeds_and_spread_as_the_variance_says(name: ProjectionName) -> None:
    """Var⟨φx, φy⟩ ≤ (‖x‖²‖y‖² + ⟨x, y⟩²)/k, so the mean over S seeds has at most 1/√S of that standard deviation.

    Five of these are exceeded with a probability of 6e-7 (normal approximation). The mean square of the errors must
    stay under the variance; 1.25 allows for the spread of a mean of 300 squares (three standard deviations of it).
    """
    dim, seeds = 64, 300
    x, y = vectors(2)
    errors = torch.empty(seeds)
    for seed in range(seeds):
        image = project(make_projection(name, dims=[dim], parameters=SHAPES, seed=seed), torch.stack([x, y]))[dim]
        errors[seed] = image[0] @ image[1] - x @ y
    bound = ((x @ x) * (y @ y) + (x @ y) ** 2) / dim
    assert errors.mean().abs() <= 5 * (bound / seeds).sqrt()
    assert errors.square().mean() <= 1.25 * bound


def test_rademacher_keeps_all_inner_products_within_the_johnson_lindenstrauss_bound() -> None:
    """Achlioptas (2003), theorem 1.1: |‖φu‖² − ‖u‖²| > ε‖u‖² with a probability of at most 2·exp(−k(ε²/4 − ε³/6)).

    For unit x, y and u = x ± y, polarisation gives |⟨φx, φy⟩ − ⟨x, y⟩| ≤ ε. With 20 vectors (380 sums and differences),
    k = 4096 and ε = 0.15 the probability that any pair misses is below 1e-6.
    """
    dim, epsilon = 4096, 0.15
    flat = torch.nn.functional.normalize(vectors(20), dim=1)
    assert 380 * 2 * math.exp(-dim * (epsilon**2 / 4 - epsilon**3 / 6)) < 1e-6
    image = project(make_projection("rademacher", dims=[dim], parameters=SHAPES, seed=0), flat)[dim]
    assert (image @ image.T - flat @ flat.T).abs().max() <= epsilon


def test_blocks_keep_every_vector_whole_where_one_run_holds_each_parameter() -> None:
    """Coordinates of one run never meet: a gradient within one parameter keeps its length exactly."""
    flat = vectors(3)
    flat[:, 600:] = 0
    image = project(make_projection("blocks", dims=[600], parameters=SHAPES, seed=0), flat)[600]
    assert torch.allclose(image.norm(dim=1), flat.norm(dim=1), rtol=1e-6)


def test_golden_vectors() -> None:
    """A change of these numbers is another map, and must come with another PROJECTION_VERSION."""
    flat = torch.arange(1, SIZE + 1, dtype=torch.float32).unsqueeze(0)
    got = {
        name: project(make_projection(name, dims=[8], parameters=SHAPES, seed=42), flat)[8][0]
        for name in ("blocks", "rademacher")
    }
    assert projection.PROJECTION_VERSION == 1
    assert got["blocks"].tolist() == GOLDEN_BLOCKS
    assert torch.allclose(got["rademacher"] * math.sqrt(8), torch.tensor(GOLDEN_RADEMACHER), rtol=1e-6)


GOLDEN_BLOCKS = [3683.0, 2255.0, 3327.0, -589.0, 2575.0, -1457.0, -261.0, -4177.0]
GOLDEN_RADEMACHER = [-112.0, -3358.0, -12586.0, 24554.0, -816.0, 7028.0, 16840.0, 7224.0]


def test_none_is_the_gradient_itself_and_has_one_dimension_only() -> None:
    flat = vectors(2)
    assert torch.equal(project(make_projection("none", dims=[SIZE], parameters=SHAPES, seed=0), flat)[SIZE], flat)
    for dims in ([SIZE - 1], [SIZE, 8], []):
        with pytest.raises(ValueError, match=rf"dims must be \[{SIZE}\]"):
            make_projection("none", dims=dims, parameters=SHAPES, seed=0)


@pytest.mark.parametrize("dims", [[], [0], [8, 8], [(1 << 20) + 1]])
def test_impossible_dims_are_refused(dims: list[int]) -> None:
    with pytest.raises(ValueError, match="dims are different numbers"):
        make_projection("blocks", dims=dims, parameters=SHAPES, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["blocks", "rademacher"])
def test_a_gpu_draws_the_same_map(name: ProjectionName) -> None:
    flat = vectors(3)
    on_cpu = project(make_projection(name, dims=[64, 1024], parameters=SHAPES, seed=9), flat)
    on_gpu = project(make_projection(name, dims=[64, 1024], parameters=SHAPES, seed=9, device="cuda"), flat.cuda())
    for dim, image in on_cpu.items():
        assert torch.allclose(on_gpu[dim].cpu(), image, rtol=0, atol=1e-5 * float(flat.norm()))
