"""What is wrong with a call is said before anything is sent, and how to put it right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from comfy_executors import (
    DummyWorkflowExecutor,
    OutputFileError,
    TemplateVariablesError,
    WorkflowTemplate,
)

LOADING = """{
"1": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}", "p": "{{ prompt }}"}},
"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "n": {{ seed }}}}
}"""
PLAIN = '{"1": {"class_type": "SaveImage", "inputs": {"seed": 1, "size": {{ batch_size }}}}}'


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_sample": 4}, TypeError, "did you mean num_samples?"),
        ({"on_progress": 5}, TypeError, "on_progress must be callable, not int"),
        ({"timeout": "5"}, ValueError, "timeout must be a number of seconds above 0, not '5'"),
        ({"batch_timeout": 0}, ValueError, "batch_timeout must be"),
        ({"seed": -1}, ValueError, "seed must be a whole number"),
        ({"seed": 2**64 - 1, "num_samples": 2}, ValueError, "is above"),
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"variables": {"batch_size": 2}}, ValueError, "pass batch_size="),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with DummyWorkflowExecutor(image_size=8) as executor, pytest.raises(error) as caught:
        executor.submit_workflow(WorkflowTemplate(PLAIN), **arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, "x", 2.5, True, None])
def test_numbers_that_are_none_are_refused(value: Any) -> None:
    graph = WorkflowTemplate.from_graph({"1": {"class_type": "SaveImage", "inputs": {}}})
    for name in ("batch_size", "max_workers"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 1"):
            DummyWorkflowExecutor(**{name: value})
    with DummyWorkflowExecutor(image_size=8) as executor:
        # Also where the template does not use it.
        for template in (WorkflowTemplate(PLAIN), graph):
            for name in ("num_samples", *(["batch_size"] if value is not None else [])):
                with pytest.raises(ValueError, match=f"{name} must be a whole number from 1"):
                    executor.submit_workflow(template, **{name: value})


class Seven:
    """An integer of another kind, as NumPy has them."""

    def __index__(self) -> int:
        return 7


def test_integers_of_another_kind_are_integers() -> None:
    seven: Any = Seven()
    with DummyWorkflowExecutor(batch_size=seven, max_workers=seven, image_size=8) as executor:
        run = executor.submit_workflow(WorkflowTemplate(PLAIN), num_samples=seven, seed=seven)
        assert run.batches[0].render(run.batches[0])["1"]["inputs"] == {"seed": 7, "size": 7}
        assert [type(image.seed) for image in run.result(30)] == [int] * 7


def test_missing_variables_name_the_arguments_that_they_stand_for() -> None:
    with DummyWorkflowExecutor() as executor, pytest.raises(TemplateVariablesError) as caught:
        executor.submit_workflow(WorkflowTemplate(LOADING), randomize_seed=False)
    assert caught.value.missing == ("input_images", "prompt", "seed")
    assert "pass input_images=[…]" in str(caught.value)
    assert "pass seed=" in str(caught.value)


def test_a_file_in_the_place_of_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with DummyWorkflowExecutor() as executor, pytest.raises(OutputFileError, match="is a file"):
        executor.submit_workflow(WorkflowTemplate(PLAIN), output_dir=tmp_path / "out")


def test_a_graph_without_seeds_has_none_on_its_images() -> None:
    graph = {"1": {"class_type": "SaveImage", "inputs": {}}}
    with DummyWorkflowExecutor(image_size=8) as executor:
        (image,) = executor.submit_workflow(WorkflowTemplate.from_graph(graph)).result(30)
    assert image.seed is None


def test_more_images_than_asked_for_are_told_before(caplog: pytest.LogCaptureFixture) -> None:
    latent = {"class_type": "EmptyLatentImage", "inputs": {"batch_size": 4, "seed": 1}}
    with DummyWorkflowExecutor(image_size=8) as executor:
        executor.submit_workflow(WorkflowTemplate.from_graph({"1": latent}), num_samples=3)
    assert [r.getMessage() for r in caplog.records if r.name.endswith(".plan")] == [
        "node 1 makes 4 images at once and the template has no {{ batch_size }}: "
        "expect 12 images, not 3"
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"seed": 7}, 1),
        ({"seed": 7, "num_samples": 3}, 2),
        ({"num_samples": 3}, 2),
        ({}, 0),
        ({"randomize_seed": False}, 0),
        ({"randomize_seed": False, "num_samples": 3}, 1),
    ],
)
def test_a_seed_that_cannot_be_set_is_told_with_its_node(
    arguments: dict[str, Any], told: int, caplog: pytest.LogCaptureFixture
) -> None:
    graph = {
        "9": {"class_type": "SaveImage", "inputs": {"noise_seed": ["2", 0]}},
        "2": {"class_type": "RandomInt", "inputs": {"low": 0}},
    }
    with DummyWorkflowExecutor(image_size=8) as executor:
        template = WorkflowTemplate.from_graph(graph)
        images = executor.submit_workflow(template, **arguments).result(30)
    assert {image.seed for image in images} == {None}
    words = [record.getMessage() for record in caplog.records]
    node = "no seed was set: node 9 takes its own from node 2 (RandomInt); write {{ seed }} there"
    same = [text for text in words if text.startswith("the 3 batches have the same seeds")]
    assert len(words) == told
    assert words == [node] * (told - len(same)) + same
