"""The graph that the benchmarks of serverless backends run."""

from __future__ import annotations

from comfy_executors import WorkflowTemplate


def sampling(seconds: float, steps: int = 4) -> WorkflowTemplate:
    """Make a template whose sampler takes so long, and one image."""
    inputs = {"seed": 1, "width": 16, "height": 16, "batch_size": 1, "steps": steps, "fail": ""}
    return WorkflowTemplate.from_graph(
        {
            "1": {
                "class_type": "BenchSampler",
                "inputs": {**inputs, "seconds": seconds, "text": "x"},
            },
            "2": {
                "class_type": "SaveImage",
                "inputs": {"images": ["1", 0], "filename_prefix": "t"},
            },
        }
    )
