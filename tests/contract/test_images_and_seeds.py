"""What comes out: counts, sizes, seeds, order, files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, SINGLE, Backend

from comfy_executors import InputImageError, WorkflowTemplate

Submit = Callable[..., Any]


def test_images_are_exactly_counted(submit: Submit) -> None:
    run = submit(20)
    results = [future.result(DEADLINE) for future in run.futures]
    assert [batch.size for batch in run.batches] == [8, 8, 4]
    assert [len(result.images) for result in results] == [8, 8, 4]
    assert [result.index for result in results] == [0, 1, 2]
    assert [result.attempts for result in results] == [1, 1, 1]
    assert all(result.seconds > 0 for result in results)


def test_iterating_gives_each_image_once(submit: Submit) -> None:
    images = list(submit(20))
    assert Counter(image.batch_index for image in images) == {0: 8, 1: 8, 2: 4}
    assert all(image.data.startswith(b"\x89PNG") for image in images)
    assert len({(image.batch_index, image.name) for image in images}) == 20


def test_a_template_without_batch_size_makes_one_image_a_batch(submit: Submit) -> None:
    run = submit(3, SINGLE)
    assert [batch.size for batch in run.batches] == [1, 1, 1]
    assert len(run.result(DEADLINE)) == 3


def test_batch_size_can_be_given_for_one_run(submit: Submit) -> None:
    run = submit(5, batch_size=2)
    assert [batch.size for batch in run.batches] == [2, 2, 1]
    assert len(run.result(DEADLINE)) == 5


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"num_samples": 0}, {"timeout": 0}])
def test_bad_numbers_are_refused(submit: Submit, backend: Backend, bad: dict[str, Any]) -> None:
    before = backend.requests()
    with pytest.raises(ValueError, match=next(iter(bad))):
        submit(**{"num_samples": 1, **bad})
    assert backend.requests() == before


def test_a_seed_counts_up_by_batch(submit: Submit) -> None:
    run = submit(20, seed=100)
    results = [future.result(DEADLINE) for future in run.futures]
    assert [result.seed for result in results] == [100, 101, 102]
    assert [{image.seed for image in result.images} for result in results] == [{100}, {101}, {102}]
    graphs = [batch.render(batch) for batch in run.batches]
    assert [graph["1"]["inputs"]["seed"] for graph in graphs] == [100, 101, 102]


def test_random_seeds_differ(submit: Submit) -> None:
    seeds = {image.seed for image in submit(4, batch_size=1)}
    assert len(seeds) == 4
    assert None not in seeds


def test_seeds_left_alone_are_warned_of_once(
    submit: Submit, caplog: pytest.LogCaptureFixture
) -> None:
    run = submit(3, batch_size=1, randomize_seed=False)
    assert {batch.render(batch)["1"]["inputs"]["seed"] for batch in run.batches} == {7}
    assert {image.seed for image in run} == {None}
    ours = [r for r in caplog.records if r.name.startswith("comfy_executors")]
    warnings = [r for r in ours if r.levelno >= logging.WARNING]
    assert [r.message[:37] for r in warnings] == ["the 3 batches have the same seeds: a "]


@pytest.mark.parametrize("ordered", [True, False])
def test_iteration_in_order_or_as_completed(submit: Submit, ordered: bool) -> None:
    order = [image.batch_index for image in submit(30, batch_size=2, ordered=ordered)]
    assert sorted(order) == [index for index in range(15) for _ in range(2)]
    assert order == sorted(order) or not ordered


def test_result_is_in_order(submit: Submit) -> None:
    images = submit(30, batch_size=2).result(DEADLINE)
    assert [image.batch_index for image in images] == [i for i in range(15) for _ in range(2)]


def test_output_dir_has_every_image(submit: Submit, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    images = submit(20, output_dir=folder).result(DEADLINE)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert sorted(image.path for image in images) == files
    assert len(files) == 20
    assert all(image.data == image.path.read_bytes() for image in images)
    assert all(image.data.startswith(b"\x89PNG") for image in images)


def test_variables_are_keywords_or_a_mapping(submit: Submit, backend: Backend) -> None:
    run = submit(1, variables={"color": 65280})
    assert run.batches[0].render(run.batches[0])["1"]["inputs"]["color"] == 65280
    assert len(run.result(DEADLINE)) == 1
    before = backend.requests()
    with pytest.raises(ValueError, match=r"given twice.*: color"):
        submit(1, variables={"color": 1}, color=2)
    assert backend.requests() == before


@pytest.mark.parametrize("name", ["seed", "batch_size"])
def test_a_variable_cannot_stand_in_for_an_argument(submit: Submit, name: str) -> None:
    graph = '{"1": {"class_type": "A", "inputs": {"b": {{ NAME }}}}}'
    template = WorkflowTemplate(graph.replace("NAME", name))
    with pytest.raises(ValueError, match=f"{name} is an argument of its own"):
        submit(1, template, variables={name: 5})


def test_input_images_need_a_place_in_the_template(submit: Submit, backend: Backend) -> None:
    before = backend.requests()
    with pytest.raises(InputImageError, match="1 input images were given, but the template uses"):
        submit(1, input_images=[b"\x89PNG\r\n\x1a\n"])
    assert backend.requests() == before
