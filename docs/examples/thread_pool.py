"""A program with a thread pool of its own: one executor serves all of its threads."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from comfy_executors import ComfyExecutorsError, ComfyServerWorkflowExecutor, WorkflowTemplate

PROMPTS = ["a red fox", "a blue fox", "a green fox", "an owl", "a cat", "a boat"]
TEMPLATE = WorkflowTemplate.from_file(Path(__file__).with_name("workflow.json.jinja"))


def make(executor, number, prompt):
    """Runs on a thread of the pool: make one image, and do with it what the program does."""
    [image] = executor.submit_workflow(TEMPLATE, prompt=prompt, seed=number).result(timeout=600)
    return image.save(f"out/{number:02d}.png")


def main(address):
    failed = 0
    # The executor outside: leaving the pool waits for its threads, and they need the executor.
    with ComfyServerWorkflowExecutor(address) as executor, ThreadPoolExecutor(4) as pool:
        futures = {
            pool.submit(make, executor, number, prompt): prompt
            for number, prompt in enumerate(PROMPTS)
        }
        for future in as_completed(futures):
            try:
                print(f"{futures[future]}: {future.result()}")
            except ComfyExecutorsError as error:  # the others go on
                failed += 1
                print(f"{futures[future]}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(os.environ.get("COMFYUI_URL", "localhost:8188")))
