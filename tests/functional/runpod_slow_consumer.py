"""A program that takes the images of a RunPod run slowly, and says how much memory that took.

Arguments: the stub's URL, its endpoint's id and its key, the number of images. It takes one, waits
for a line on its input, takes the rest, and writes the number of images and of bytes at the most.
"""

from __future__ import annotations

import sys
import tracemalloc

from server_kit import bench

from comfy_executors import RunPodWorkflowExecutor


def main(url: str, endpoint_id: str, key: str, count: str) -> None:
    with RunPodWorkflowExecutor(endpoint_id, key, url, max_workers=1) as executor:
        template = bench(width=1024, height=1024)
        tracemalloc.start()
        run = executor.submit_workflow(template, num_samples=int(count))
        taken = int(len(next(run).data) > 3_000_000)
        print("taken", flush=True)
        sys.stdin.readline()
        for image in run:
            taken += len(image.data) > 3_000_000
            del image
        print(taken, tracemalloc.get_traced_memory()[1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
