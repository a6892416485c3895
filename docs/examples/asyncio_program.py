"""A program with an event loop: it never blocks, and cancelling a task cancels its run."""

import asyncio
import os
import sys
from pathlib import Path

from comfy_executors import ComfyServerWorkflowExecutor, WorkflowTemplate

TEMPLATE = WorkflowTemplate.from_file(Path(__file__).with_name("workflow.json.jinja"))


async def save_all(executor, prompt, number):
    """Save images as they finish."""
    count = 0
    async for image in executor.submit_workflow_async(TEMPLATE, num_samples=number, prompt=prompt):
        await asyncio.to_thread(image.save, f"out/{prompt}/")
        count += 1
    return count


async def first_of(executor, prompt, number):
    """Wait for one batch of a run, and cancel the others."""
    with executor.submit_workflow(TEMPLATE, num_samples=number, prompt=prompt) as run:
        return await asyncio.wrap_future(run.futures[0])


async def main(address):
    async with ComfyServerWorkflowExecutor(address) as executor:
        fox, owl = await asyncio.gather(
            save_all(executor, "a fox", 4),
            asyncio.wait_for(save_all(executor, "an owl", 2), timeout=600),
        )
        print(fox, "foxes,", owl, "owls")
        result = await first_of(executor, "a cat", 50)
        print("a cat with seed", result.seed)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(os.environ.get("COMFYUI_URL", "localhost:8188"))))
