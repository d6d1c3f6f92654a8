"""Searching for what fits with few compilations, on hand-made plans."""

import pytest

from lora_jax.plan.fit import first_fitting, fitting_remat, largest_batch
from lora_jax.plan.step import StepPlan


def made(batch, total, limit=100, remat="block"):
    return StepPlan(
        devices=1,
        batch=batch,
        tokens=8,
        remat=remat,
        base=0,
        trained=0,
        optimizer=0,
        other=0,
        temporaries=total,
        limit=limit,
        fits=total <= limit,
        flops=2.0,
        compile_seconds=1.0,
    )


def test_a_line_needs_three_compilations():
    asked = []

    def price(rows):
        asked.append(rows)
        return made(rows, 10 + 3 * rows // 2)

    assert largest_batch(price, 2).batch == 60
    assert asked == [2, 4, 60]


def test_the_answer_fits_if_memory_grows_superlinearly():
    asked = []

    def price(rows):
        asked.append(rows)
        return made(rows, 10 + rows + rows * rows // 20)

    found = largest_batch(price, 1)
    assert found.fits
    assert 25 <= found.batch <= 33  # 33 is the largest that fits
    assert len(asked) <= 5


@pytest.mark.parametrize(("each", "batch"), [(101, None), (60, 1), (50, 2)])
def test_small_answers_need_no_line(each, batch):
    found = largest_batch(lambda rows: made(rows, each * rows), 1)
    assert (found and found.batch) == batch


def test_the_smallest_slice_is_the_first_that_fits():
    sizes = {"2x2": 200, "2x4": 120, "4x4": 80, "4x8": 60}
    name, tried = first_fitting(lambda name: made(1, sizes[name]), sizes)
    assert name == "4x4"
    assert list(tried) == ["2x2", "2x4", "4x4"]
    name, tried = first_fitting(lambda name: made(1, 101), sizes)
    assert name is None
    assert len(tried) == 4


@pytest.mark.parametrize(
    ("asked", "needs", "tried"),
    [
        ("none", {"none": 101, "lora": 100}, ["none", "lora"]),
        ("lora", {"lora": 120, "block": 110}, ["lora", "block"]),  # neither fits
        ("block", {"block": 50}, ["block"]),
        (None, {None: 50}, [None]),  # an encoder has no policies
    ],
)
def test_policies_are_tried_from_the_requested_one_until_the_step_fits(
    asked, needs, tried
):
    plans = fitting_remat(
        lambda rows, remat: made(rows, needs[remat], remat=remat), 3, asked
    )
    assert [plan.remat for plan in plans] == tried
    assert [plan.batch for plan in plans] == [3] * len(tried)
    assert plans[-1].fits == (list(needs.values())[-1] <= 100)
