"""The projections: the numbers are those of the documented generator, and inner products survive."""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import pytest
import torch

from datastore.features import LARGEST_REFERENCE
from worker.projection import PROJECTION_VERSION, Projection, ProjectionName, blocks, make_projection, rademacher, sjlt
from worker.projection.reference import LARGEST, Reference
from worker.projection.words import below, random_signs, random_words, stream_key

SHAPES = [("a.lora_A.weight", torch.Size([4, 150])), ("b.bias", torch.Size([7])), ("a.lora_B.weight", torch.Size([64]))]
SIZE = sum(shape.numel() for _, shape in SHAPES)
MAPS: list[ProjectionName] = ["blocks", "sjlt", "fft", "rademacher"]
MASK = (1 << 64) - 1


def word(key: int, counter: int) -> int:
    """SplitMix64 in Python's unbounded integers."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def key(seed: int, purpose: str, name: str) -> int:
    digest = hashlib.sha256(f"gradstore-projection|1|{seed}|{purpose}|{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def sign(seed: int, parameter: str, c: int) -> float:
    return 2.0 * (word(key(seed, "signs", parameter), c // 64) >> (c % 64) & 1) - 1


def dense(name: ProjectionName, dim: int, seed: int) -> torch.Tensor:
    """The whole matrix (p, dim) of the map, number by number from the documentation."""
    return torch.tensor(
        [
            row(name, parameter, c, shape.numel(), dim, seed)
            for parameter, shape in SHAPES
            for c in range(shape.numel())
        ],
        dtype=torch.float64,
    )


def row(name: ProjectionName, parameter: str, c: int, size: int, dim: int, seed: int) -> list[float]:
    """What coordinate c of a parameter adds to each sum."""
    made = [0.0] * dim
    if name == "blocks":
        offset = word(key(seed, f"offsets/{dim}", parameter), c // dim) * dim >> 64
        made[(c % dim + offset) % dim] = sign(seed, parameter, c)
    elif name == "sjlt":
        made[word(key(seed, "places", parameter), c) * dim >> 64] = sign(seed, parameter, c)
    elif name == "fft":
        length, chosen = fourier_rows(parameter, size, dim, seed)
        for j, r in enumerate(chosen):
            made[j] = sign(seed, parameter, c) * math.sqrt(length / dim) * fourier(r, c, length)
    else:
        for j in range(dim):
            bit = word(key(seed, "matrix", parameter), c * 2**14 + j // 64) >> (j % 64) & 1
            made[j] = (2.0 * bit - 1) / math.sqrt(dim)
    return made


@cache
def fourier_rows(parameter: str, size: int, dim: int, seed: int) -> tuple[int, list[int]]:
    """The transform's length, and the rows with the smallest words."""
    length = 2
    while length < max(size, dim):
        length *= 2
    words = {r: word(key(seed, f"rows/{length}", parameter), r) for r in range(length)}
    return length, sorted(words, key=words.__getitem__)[:dim]


def fourier(r: int, c: int, length: int) -> float:
    """Entry c of row r of the real orthonormal Fourier basis."""
    angle = 2 * math.pi * ((r + 1) // 2) * c / length
    scale = math.sqrt(1 / length) if r in {0, length - 1} else math.sqrt(2 / length)
    return scale * (math.cos(angle) if r % 2 or r == 0 else -math.sin(angle))


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


def test_a_word_scaled_below_a_bound_is_its_product_in_unbounded_integers() -> None:
    counters = torch.arange(200)
    for bound in (1, 3, 8192, 2**20, 2**31):
        wanted = [word(5, c) * bound >> 64 for c in range(200)]
        assert below(random_words(5, counters), bound).tolist() == wanted


def test_signs_of_a_parameter_are_balanced_bits_of_its_stream() -> None:
    drawn = random_signs(3, "a", 1000, torch.device("cpu"))
    assert drawn.tolist() == [sign(3, "a", c) for c in range(1000)]
    assert abs(int(drawn.sum())) < 5 * math.sqrt(1000)


def test_streams_are_keyed_by_seed_purpose_and_name() -> None:
    assert stream_key(3, "signs", "ä.weight") == key(3, "signs", "ä.weight")
    assert len({stream_key(s, p, n) for s in (0, 1) for p in ("signs", "matrix") for n in ("a", "b")}) == 8


@pytest.mark.parametrize("name", MAPS)
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
    blocks._add_runs(flat, signs, offsets, one_by_one)
    blocks._add_folded(flat, signs, offsets, at_once)
    assert torch.allclose(at_once, one_by_one, rtol=0, atol=1e-5 * float(flat.norm()))
    assert at_once.abs().max() > 0


def test_lists_gathered_on_a_gpu_and_places_scattered_on_a_cpu_are_one_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sum adds its coordinates in their order, however many are gathered at a time."""
    flat = vectors(4)
    places = below(random_words(1, torch.arange(SIZE)), 50)
    scattered = torch.zeros(4, 50)
    sjlt._scatter(flat, places, scattered)
    lists = sjlt._lists(places, 50)
    for elements in (1 << 20, 4 * 50 * 5, 4 * 50 * 3, 4 * 50 * 2, 1):  # and a last slice that is not full
        monkeypatch.setattr(sjlt, "GATHERED_ELEMENTS", elements)
        gathered = torch.zeros(4, 50)
        sjlt._gather(flat, lists, gathered)
        assert torch.allclose(gathered, scattered, rtol=0, atol=1e-5 * float(flat.norm()))
    assert scattered.abs().min() > 0


@pytest.mark.parametrize("name", MAPS)
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
    monkeypatch.setattr(rademacher, "BLOCK_ELEMENTS", 96 * 11)
    assert torch.allclose(project(made, flat)[96], whole, rtol=0, atol=1e-5 * float(flat.norm()))
    assert max(drawn) <= 96 * 11


@pytest.mark.parametrize("name", MAPS)
def test_the_order_of_parameters_does_not_change_a_map(name: ProjectionName) -> None:
    flat = vectors(3)
    parts = dict(zip([n for n, _ in SHAPES], flat.split([s.numel() for _, s in SHAPES], dim=1), strict=True))
    forwards = make_projection(name, dims=[64], parameters=SHAPES, seed=2).project(parts.items(), examples=3)[64]
    backwards = make_projection(name, dims=[64], parameters=SHAPES[::-1], seed=2)
    assert torch.allclose(backwards.project(reversed(parts.items()), examples=3)[64], forwards, atol=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_another_seed_is_another_map(name: ProjectionName) -> None:
    flat = vectors(2)
    one, again, other = (
        project(make_projection(name, dims=[64], parameters=SHAPES, seed=s), flat)[64] for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert torch.nn.functional.cosine_similarity(one, other).abs().max() < 0.7


@pytest.mark.parametrize("name", MAPS)
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


def adversarial() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (p,) that a map with too little randomness gets wrong on average or too widely."""
    first = SHAPES[0][1].numel()
    constant, heavy, shifted = torch.ones(SIZE), torch.zeros(SIZE), torch.zeros(SIZE)
    heavy[123] = 1
    block = torch.sin(torch.arange(64.0))
    shifted[64:128] = block  # two blocks alike: one a run of 64 behind the other
    unshifted = torch.zeros(SIZE)
    unshifted[:64] = block
    rank_one = torch.zeros(SIZE)
    rank_one[:first] = torch.outer(torch.tensor([1.0, 1, 1, 1]), torch.cos(torch.arange(150.0) / 9)).flatten()
    alternating = torch.ones(SIZE)
    alternating[::2] = -1
    return {
        "one heavy coordinate": (heavy, heavy),
        "heavy against constant": (heavy, constant),
        "constant": (constant, constant),
        "constant against alternating": (constant, alternating),
        "rank one": (rank_one, rank_one),
        "rank one against constant": (rank_one, constant),
        "equal blocks, shifted": (unshifted, shifted),
        "equal blocks, both": (unshifted + shifted, unshifted - shifted),
    }


@pytest.mark.parametrize("name", MAPS)
def test_vectors_made_to_break_a_map_keep_their_inner_products_on_average_and_spread_no_more_than_others(
    name: ProjectionName,
) -> None:
    """The bounds of the test above, for every pair; the seeds are the same for all, so one failure may show in several.

    Squares of errors have heavier tails here (two blocks meet at once or not at all): 1.5 in place of 1.25.
    """
    dim, seeds = 64, 400
    pairs = adversarial()
    stacked = torch.stack([vector for pair in pairs.values() for vector in pair])
    images = torch.stack(
        [
            project(make_projection(name, dims=[dim], parameters=SHAPES, seed=seed), stacked)[dim]
            for seed in range(seeds)
        ]
    )
    for number, (what, (x, y)) in enumerate(pairs.items()):
        errors = (images[:, 2 * number] * images[:, 2 * number + 1]).sum(1) - x @ y
        bound = ((x @ x) * (y @ y) + (x @ y) ** 2) / dim
        assert errors.mean().abs() <= 5 * (bound / seeds).sqrt(), what
        assert errors.square().mean() <= 1.5 * bound, what


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


@pytest.mark.parametrize("name", MAPS)
def test_golden_vectors(name: ProjectionName) -> None:
    """A change of these numbers is another map, and must come with another PROJECTION_VERSION."""
    flat = torch.arange(1, SIZE + 1, dtype=torch.float32).unsqueeze(0)
    got = project(make_projection(name, dims=[8], parameters=SHAPES, seed=42), flat)[8][0]
    assert PROJECTION_VERSION == 1
    assert got.tolist() == pytest.approx(GOLDEN[name], rel=2e-6)


GOLDEN: dict[ProjectionName, list[float]] = {
    "blocks": [3683, 2255, 3327, -589, 2575, -1457, -261, -4177],
    "sjlt": [-6664, 5434, 5171, 3487, -2122, -2576, 6262, -3636],
    "fft": [632.497, 2780.929, 5969.217, 449.566, 3405.465, 944.702, -1898.366, 7755.076],
    "rademacher": [x / math.sqrt(8) for x in (-112, -3358, -12586, 24554, -816, 7028, 16840, 7224)],
}


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
@pytest.mark.parametrize("name", MAPS)
def test_a_gpu_draws_the_same_map(name: ProjectionName) -> None:
    flat = vectors(3)
    on_cpu = project(make_projection(name, dims=[64, 1024], parameters=SHAPES, seed=9), flat)
    on_gpu = project(make_projection(name, dims=[64, 1024], parameters=SHAPES, seed=9, device="cuda"), flat.cuda())
    for dim, image in on_cpu.items():
        assert torch.allclose(on_gpu[dim].cpu(), image, rtol=0, atol=1e-5 * float(flat.norm()))


# GradEx's own matrix --------------------------------------------------------------------------------------------------


def test_the_reference_begins_with_the_published_signs() -> None:
    """Seed 0, row by row: −++−+++++++−−+−−."""
    made = make_projection("reference", dims=[4], parameters=[("a", torch.Size([4]))], seed=0)
    assert isinstance(made, Reference)
    drawn = made.matrix("a", 0, 4, 4).flatten().tolist()
    assert "".join("+" if each > 0 else "−" for each in drawn) == "−++−+++++++−−+−−"


@pytest.mark.parametrize("dim", [1, 7, 8, 100, 599])
@pytest.mark.parametrize("drawn_at_once", [1, 1000, 1 << 22])
def test_the_reference_is_one_call_of_numpys_legacy_generator_however_it_is_drawn(
    dim: int, drawn_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.projection.reference.DRAWN", drawn_at_once)
    monkeypatch.setattr("worker.projection.reference.BLOCK_ELEMENTS", 10 * drawn_at_once)
    flat = vectors(5)
    got = project(make_projection("reference", dims=[dim, 3], parameters=SHAPES, seed=7), flat)
    for each in (dim, 3):
        signs = 2 * np.random.RandomState(7).randint(2, size=(SIZE, each)) - 1
        wanted = flat.double() @ torch.from_numpy(signs).double() / math.sqrt(each)
        assert torch.allclose(got[each].double(), wanted, rtol=0, atol=1e-6 * float(flat.norm(dim=1).max()))


def test_a_reference_of_more_signs_than_can_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="projection=rademacher"):
        make_projection("reference", dims=[1 << 20], parameters=[("a", torch.Size([4097]))], seed=0)
    assert LARGEST == LARGEST_REFERENCE


@pytest.mark.parametrize("name", [*MAPS, "reference", "none"])
def test_weights_are_lifted_by_the_transpose_of_the_map(name: ProjectionName) -> None:
    dims = [SIZE] if name == "none" else [8, 40]
    projection = make_projection(name, dims=dims, parameters=SHAPES, seed=3)
    for dim in dims:
        weights = torch.randn(dim, generator=torch.Generator().manual_seed(dim))
        lifted = torch.cat(list(projection.lift(weights).values()))
        each = torch.eye(SIZE)
        sizes = [shape.numel() for _, shape in SHAPES]
        named = zip((parameter for parameter, _ in SHAPES), each.split(sizes, dim=1), strict=True)
        matrix = projection.project(named, examples=SIZE)[dim]
        torch.testing.assert_close(lifted, matrix @ weights, rtol=1e-5, atol=1e-5)
