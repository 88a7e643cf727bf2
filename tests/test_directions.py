"""What is made of a gradient before it is projected, number by number against the formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.bruteforce import adam_step
from worker.directions import AdamForm, Kind, Moments, make_direction

SIZES = {"a": 600, "b": 400}
CPU = torch.device("cpu")


@pytest.mark.parametrize("step", [0, 7, 5000])
@pytest.mark.parametrize("form", ["less", "exact"])
def test_adams_step_has_its_epsilon_and_its_corrections_where_the_form_says(form: AdamForm, step: int) -> None:
    """From 10⁻¹² to 1 each: where √v is far above ε, nobody can tell where it is added."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> torch.Tensor:
        return 10.0 ** (-12 * torch.rand(*shape, generator=generator))

    m = {name: drawn(size) * torch.randn(size, generator=generator).sign() for name, size in SIZES.items()}
    v = {name: drawn(size).square() for name, size in SIZES.items()}
    gradients = drawn(3, sum(SIZES.values())) * torch.randn(3, 1000, generator=generator).sign()
    parameters = {name: torch.zeros(size) for name, size in SIZES.items()}
    direction = make_direction(Kind("adam", form), moments=Moments(m, v, step), parameters=parameters, device=CPU)
    first, second = (torch.cat(list(of.values())).double().numpy() for of in (m, v))
    wanted = adam_step(gradients.double().numpy(), first, second, step=step, form=form)
    scale = np.abs(wanted) + np.abs(adam_step(0 * wanted, first, second, step=step, form=form))  # m and g may cancel
    found = direction(list(SIZES), gradients.clone())
    assert (np.abs(found.numpy() - wanted) <= 1e-5 * scale).all()
    for name, part in zip(SIZES, gradients.split(list(SIZES.values()), 1), strict=True):
        start = list(SIZES).index(name) * SIZES["a"]
        assert torch.equal(direction([name], part.clone()), found[:, start : start + SIZES[name]])


def test_signs_are_minus_one_zero_and_one() -> None:
    sign = make_direction(Kind("sign"), moments=None, parameters={}, device=CPU)
    assert sign(["a"], torch.tensor([[-1e-30, -0.0, 0.0, 1e-30]])).tolist() == [[-1, 0, 0, 1]]


PARAMETERS = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
FITTING = {name: torch.full_like(parameter, 0.5) for name, parameter in PARAMETERS.items()}
LACKING = {"b": FITTING["b"]}
REFUSED: dict[str, tuple[Moments | None, str]] = {
    "none": (None, "needs Adam's moments"),
    "missing": (Moments(LACKING, FITTING, 1), r"exp_avg\) lack the trainable parameter 'a'"),
    "extra": (Moments(FITTING, FITTING | {"c": torch.zeros(1)}, 1), r"exp_avg_sq\) name what is no trainable .*: 'c'"),
    "shape": (Moments(FITTING | {"a": torch.zeros(3, 2)}, FITTING, 1), "the moments belong to another adapter"),
    "nan": (Moments(FITTING | {"a": FITTING["a"] * float("nan")}, FITTING, 1), "not finite"),
    "negative": (Moments(FITTING, FITTING | {"a": FITTING["a"] - 1}, 1), "negative"),
    "step": (Moments(FITTING, FITTING, -1), "step is -1"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_moments_that_do_not_fit_are_refused(fault: str) -> None:
    moments, message = REFUSED[fault]
    with pytest.raises(ValueError, match=message):
        make_direction(Kind("adam"), moments=moments, parameters=PARAMETERS, device=CPU)
