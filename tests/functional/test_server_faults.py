"""The ComfyUI server executor while the server and the way to it misbehave.

Each test counts the prompts that the server executed and the images that arrived.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial

import pytest
import requests
from server_kit import (
    ENDLESS,
    PATIENCE,
    VERSIONS,
    bench,
    bench_graph,
    ended,
    loading,
    served,
    status_of,
    statuses,
    stranger_posts,
)

from comfy_executors import ComfyServerWorkflowExecutor, ProgressEvent, WorkflowTemplate
from comfy_executors.clients.comfyui import ComfyUIClient
from comfy_executors.clients.http import DeadlineWaiter, HttpClient
from comfy_executors.devserver import DevServer
from comfy_executors.errors import (
    PromptLostError,
    ServerResponseError,
    ServerUnreachableError,
    WorkflowCancelledError,
    WorkflowInterruptedError,
    WorkflowTimeoutError,
)
from comfy_executors.executors import comfy_prompt

MESSAGES = (
    "status",
    "feature_flags",
    "execution_start",
    "execution_cached",
    "executing",
    "progress",
    "progress_state",
    "preview",
    "executed",
    "execution_success",
)


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture
def executor(server: DevServer) -> Iterator[ComfyServerWorkflowExecutor]:
    with ComfyServerWorkflowExecutor(server.address) as made:
        yield made


def old_and_new(version: str) -> DevServer:
    return DevServer(version=version)


def exactly(server: DevServer, images: int) -> None:
    """Check that the server executed so many prompts, and none twice."""
    ended(server, success=images)
    seeds = [prompt.graph["1"]["inputs"]["seed"] for prompt in server.prompts]
    assert len(set(seeds)) == images


def succeeded(count: int, server: DevServer) -> bool:
    return statuses(server)["success"] >= count


def posted_and_running(count: int, server: DevServer) -> bool:
    return len(server.prompts) == count and statuses(server)["running"] == 1


# The websocket.


@pytest.mark.parametrize("moment", ["", "before:"])
@pytest.mark.parametrize("message", MESSAGES)
def test_a_socket_dropped_at_any_message_costs_nothing(
    server: DevServer, executor: ComfyServerWorkflowExecutor, message: str, moment: str
) -> None:
    server.faults.drop_websocket_after = moment + message
    images = executor.submit_workflow(bench(0.05, previews=True), num_samples=3).result(PATIENCE)
    exactly(server, 3)
    assert len({image.name for image in images}) == 3
    assert server.faults.drop_websocket_after is None


@pytest.mark.parametrize("version", VERSIONS)
def test_sockets_dropped_again_and_again_cost_nothing(version: str) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(bench(0.1), num_samples=8)
        futures = run.futures
        for count in range(1, 5):
            server.wait_for(partial(succeeded, count), PATIENCE)
            server.drop_websockets()
        assert len({future.result(PATIENCE).images[0].name for future in futures}) == 8
        exactly(server, 8)


def deaf_warnings(caplog: pytest.LogCaptureFixture) -> int:
    told = [record for record in caplog.records if "brings no word" in record.getMessage()]
    assert {record.levelname for record in told} <= {"WARNING"}
    return len(told)


def test_a_socket_that_never_brings_anything_is_not_relied_on(
    server: DevServer, executor: ComfyServerWorkflowExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults.silence_websockets = True
    begun = time.monotonic()
    for _ in range(2):
        assert len(executor.submit_workflow(bench(0.05), num_samples=6).result(PATIENCE)) == 6
    # Once a fresh connection is known to be deaf, nothing waits for one any more.
    assert time.monotonic() - begun < comfy_prompt.SILENCE_SECONDS
    assert deaf_warnings(caplog) == 1
    assert served(server)["GET /ws"] == 2  # a fresh one might have heard; it is not made each time
    exactly(server, 12)


def test_a_socket_that_goes_silent_is_noticed_and_replaced(
    server: DevServer,
    executor: ComfyServerWorkflowExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(comfy_prompt, "SILENCE_SECONDS", 0.3)
    for outage in range(1, 3):
        server.faults.silence_websockets = False
        # Once they bring something, connections are relied on again.
        assert len(executor.submit_workflow(bench(), num_samples=3).result(PATIENCE)) == 3
        server.faults.silence_websockets = True
        assert len(executor.submit_workflow(bench(), num_samples=3).result(PATIENCE)) == 3
        assert deaf_warnings(caplog) == outage
    # The last one is replaced only if a prompt still waits.
    assert served(server)["GET /ws"] in (2, 3)
    exactly(server, 12)


def test_an_ordinary_run_does_not_poll(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    # The last of the four at the server waits longer than the first look-up would.
    assert len(executor.submit_workflow(bench(0.5), num_samples=6).result(PATIENCE)) == 6
    assert served(server)["GET /queue"] == 0
    assert served(server)["GET /history/*"] == 0
    exactly(server, 6)


def test_behind_a_stranger_a_socket_that_brought_nothing_yet_is_polled_and_not_often(
    server: DevServer, executor: ComfyServerWorkflowExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    stranger_posts(server, 2.0)
    assert len(executor.submit_workflow(bench()).result(PATIENCE)) == 1
    # After 1 and 2.6 s.
    assert 1 <= served(server)["GET /queue"] <= 3
    assert deaf_warnings(caplog) == 0
    ended(server, success=2)


def test_without_websockets_it_polls_and_not_often(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    server.faults.refuse_websockets = True
    images = executor.submit_workflow(bench(0.8), num_samples=3).result(PATIENCE)
    exactly(server, 3)
    assert len({image.name for image in images}) == 3
    # Three prompts wait 0.8, 1.6 and 2.4 s; each is looked up after 0.25, 0.65, 1.3, 2.3 and 4 s.
    assert served(server)["GET /queue"] <= 3 * 6
    assert served(server)["GET /history/*"] <= 3 * 2


def test_deaf_reconnections_do_not_matter(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    server.faults.deaf_reconnect = True
    server.faults.drop_websocket_after = "executing"
    assert len(executor.submit_workflow(bench(0.1), num_samples=2).result(PATIENCE)) == 2
    server.wait_for(lambda s: s.open_websockets == 1, PATIENCE)
    polls = served(server)["GET /queue"]
    assert len(executor.submit_workflow(bench(0.1), num_samples=2).result(PATIENCE)) == 2
    exactly(server, 4)
    assert served(server)["GET /queue"] == polls  # the new connection hears


def test_each_connection_has_a_client_id_of_its_own(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    sockets: list[str] = []
    for _ in range(12):
        assert len(executor.submit_workflow(bench(), num_samples=2).result(PATIENCE)) == 2
        server.drop_websockets()
        server.wait_for(lambda s: s.open_websockets == 0, PATIENCE)
        sockets = [r.query["clientId"] for r in server.requests if r.path == "/ws"]
        if len(sockets) >= 3:
            break  # a run that had not noticed the drop by its end makes none
    assert len(sockets) == len(set(sockets)) >= 3
    assert {prompt.client_id for prompt in server.prompts} <= set(sockets)


@pytest.mark.parametrize("version", VERSIONS)
def test_websocket_images_wait_for_a_websocket(version: str) -> None:
    graph = bench_graph(batch_size=2)
    graph["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    template = WorkflowTemplate.from_graph(graph)
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.refuse_websockets = True
        run = executor.submit_workflow(template)
        futures = run.futures
        server.wait_for(lambda s: served(s)["GET /ws"] >= 1, PATIENCE)
        assert server.prompts == []  # its images would be lost
        server.faults.refuse_websockets = False
        assert [image.type for image in futures[0].result(PATIENCE).images] == ["websocket"] * 2
        ended(server, success=1)


def test_websocket_images_that_came_before_an_old_server_named_its_prompt() -> None:
    graph = bench_graph(batch_size=2)
    graph["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    template = WorkflowTemplate.from_graph(graph)
    with old_and_new("0.3.40") as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.reset_after("POST", "/prompt")
        images = executor.submit_workflow(template).result(PATIENCE)
        assert [image.type for image in images] == ["websocket"] * 2
        ended(server, success=1)


def test_websocket_images_that_were_lost_are_made_again(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    graph = bench_graph(0.1)
    graph["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    server.faults.drop_websocket_after = "before:preview"
    run = executor.submit_workflow(WorkflowTemplate.from_graph(graph))
    result = run.futures[0].result(PATIENCE)
    assert len(result.images) == 1
    assert result.attempts == 2
    assert len(server.prompts) == 2


# Restarts.


@pytest.mark.parametrize(
    ("version", "downtime"), [("0.33.0", 0.0), *((version, 0.3) for version in VERSIONS)]
)
def test_a_restart_loses_no_prompt(version: str, downtime: float) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(bench(0.3), num_samples=5)
        futures = run.futures
        server.wait_for(
            lambda s: statuses(s)["running"] == 1 and statuses(s)["pending"] == 3, PATIENCE
        )
        server.restart(downtime=downtime)
        names = {future.result(PATIENCE).images[0].name for future in futures}
        server.wait_for(lambda s: statuses(s)["success"] == 5, PATIENCE)
        done = statuses(server)
        assert len(names) == 5
        assert done["lost"] == len(server.prompts) - 5 >= 1
        assert done["lost"] <= 4


def test_a_server_that_always_forgets_ends_the_batch(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    run = executor.submit_workflow(bench(ENDLESS, steps=1000))
    for count in range(1, 4):
        server.wait_for(partial(posted_and_running, count), PATIENCE)
        server.restart()
    with pytest.raises(PromptLostError, match="was restarted"):
        run.result(PATIENCE)
    ended(server, lost=3)


def test_an_outage_that_lasts_ends_the_run(server: DevServer) -> None:
    with ComfyServerWorkflowExecutor(server.address, outage_timeout=0.5) as executor:
        run = executor.submit_workflow(bench(ENDLESS, steps=1000), num_samples=3)
        futures = run.futures
        server.wait_for(lambda s: statuses(s)["pending"] == 2, PATIENCE)
        server.faults.refuse_connections = True
        server.drop_websockets()
        with pytest.raises(ServerUnreachableError, match="cannot be reached"):
            futures[0].result(PATIENCE)
        with pytest.raises(ServerUnreachableError):
            run.result(PATIENCE)
    assert run.done()


# Posting.


@pytest.mark.parametrize("version", VERSIONS)
def test_a_post_reset_before_it_was_accepted_is_posted_again(version: str) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.reset_before("POST", "/prompt", times=2)
        assert len(executor.submit_workflow(bench(), num_samples=3).result(PATIENCE)) == 3
        exactly(server, 3)
        assert served(server)["POST /prompt"] == 5


@pytest.mark.parametrize("seconds", [0.0, 0.5])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_post_reset_after_it_was_accepted_is_found_again(version: str, seconds: float) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.reset_after("POST", "/prompt", times=2)
        assert len(executor.submit_workflow(bench(seconds), num_samples=2).result(PATIENCE)) == 2
        exactly(server, 2)
        assert served(server)["POST /prompt"] == 2


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_post_that_was_accepted_and_answered_by_a_page_is_not_queued_twice(
    version: str, status: int
) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.fail_after("POST", "/prompt", status=status, times=2)
        assert len(executor.submit_workflow(bench(0.2), num_samples=2).result(PATIENCE)) == 2
        exactly(server, 2)
        assert served(server)["POST /prompt"] == 2


def test_a_post_that_the_server_lists_late_is_not_repeated(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    server.faults.reset_after("POST", "/prompt")
    for path, body in (
        ("/queue", '{"queue_running": [], "queue_pending": []}'),
        ("/history/*", "{}"),
        ("/history", "{}"),
    ):
        server.faults.fail("GET", path, status=200, body=body)
    assert len(executor.submit_workflow(bench()).result(PATIENCE)) == 1
    assert served(server)["GET /history"] == 1
    exactly(server, 1)


def test_a_post_that_runs_under_an_id_of_the_servers_own_is_not_repeated() -> None:
    with old_and_new("0.3.40") as server, ComfyServerWorkflowExecutor(server.address) as executor:
        queued = threading.Event()

        def hear(event: ProgressEvent) -> None:
            if event.kind == "queued":
                queued.set()

        server.faults.reset_after("POST", "/prompt")
        # It never gets into the history: only its mark in the queue tells.
        run = executor.submit_workflow(bench(ENDLESS, steps=10_000), on_progress=hear)
        assert queued.wait(PATIENCE)
        assert statuses(server) == {"running": 1}
        run.cancel()
        ended(server, interrupted=1)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cancelled_prompt_whose_post_had_no_answer_is_cancelled(version: str) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.reset_after("POST", "/prompt")
        server.faults.delay("GET", "/queue", 0.3)
        run = executor.submit_workflow(bench(ENDLESS, steps=10_000))
        server.wait_for(lambda s: statuses(s)["running"] == 1, PATIENCE)
        run.cancel()
        ended(server, interrupted=1)


def test_a_graph_that_the_server_stumbles_over_is_posted_once(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    server.faults.fail("POST", "/prompt", status=500, body="Server got itself in trouble")
    with pytest.raises(ServerResponseError, match="500"):
        executor.submit_workflow(bench()).result(PATIENCE)
    assert served(server)["POST /prompt"] == 1


# Pages of proxies.


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/prompt"),
        ("POST", "/prompt"),
        ("GET", "/queue"),
        ("GET", "/history/*"),
        ("GET", "/view"),
        ("POST", "/upload/image"),
        ("GET", "/ws"),
    ],
)
def test_a_page_of_a_proxy_on_any_route_is_survived(
    server: DevServer, executor: ComfyServerWorkflowExecutor, method: str, path: str, status: int
) -> None:
    server.faults.fail(method, path, status=status)
    server.faults.refuse_websockets = path in ("/queue", "/history/*")
    image = (server.directory / "input" / "example.png").read_bytes()
    uploads = path == "/upload/image"
    template = loading() if uploads else bench(0.05)
    run = executor.submit_workflow(template, [image] if uploads else None)
    assert len(run.result(PATIENCE)) == 1
    ended(server, success=1)
    failed = [r for r in server.requests if r.status == status and fnmatch(r.path, path)]
    assert len(failed) == 1


@pytest.mark.parametrize(("method", "path"), [("GET", "/prompt"), ("POST", "/prompt")])
def test_retry_after_is_kept(
    server: DevServer, executor: ComfyServerWorkflowExecutor, method: str, path: str
) -> None:
    server.faults.fail(method, path, status=429, headers={"Retry-After": "1"})
    begun = time.monotonic()
    assert len(executor.submit_workflow(bench()).result(PATIENCE)) == 1
    assert time.monotonic() - begun >= 1
    exactly(server, 1)


# Downloads.


def test_the_next_prompt_is_queued_while_images_are_downloaded(server: DevServer) -> None:
    server.faults.delay("GET", "/view", 2 * PATIENCE)
    with ComfyServerWorkflowExecutor(server.address, max_workers=1) as executor:
        run = executor.submit_workflow(bench(), num_samples=2)
        ended(server, success=2)
        assert not run.done()
        run.cancel()


def test_cached_outputs_of_old_servers_are_found_in_the_history() -> None:
    with old_and_new("0.0.8") as server, ComfyServerWorkflowExecutor(server.address) as executor:
        template = bench(seed=5)
        [first] = executor.submit_workflow(template, randomize_seed=False).result(PATIENCE)
        [second] = executor.submit_workflow(template, randomize_seed=False).result(PATIENCE)
        assert (first.cached, second.cached) == (False, True)
        assert (first.name, first.data) == (second.name, second.data)
        assert server.node_runs == {"BenchSampler": 1, "SaveImage": 1}


def test_a_truncated_image_is_fetched_again_whole(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    server.faults.truncate("GET", "/view", times=2)
    (image,) = executor.submit_workflow(bench()).result(PATIENCE)
    assert image.data == (server.directory / "output" / image.name).read_bytes()
    exactly(server, 1)
    assert served(server)["GET /view"] == 3


@pytest.mark.parametrize("websockets", [True, False])
def test_a_late_history_is_waited_for(
    server: DevServer, executor: ComfyServerWorkflowExecutor, websockets: bool
) -> None:
    server.faults.history_delay = 0.5
    server.faults.refuse_websockets = not websockets
    server.faults.drop_websocket_after = "execution_start" if websockets else None
    assert len(executor.submit_workflow(bench(), num_samples=2).result(PATIENCE)) == 2
    exactly(server, 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_deleted_files_of_a_cached_answer_are_made_again(version: str) -> None:
    graph = bench_graph(seed=5)
    graph["3"] = {**graph["2"], "inputs": {"images": ["1", 0], "filename_prefix": "other"}}
    template = WorkflowTemplate.from_graph(graph)
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        first = executor.submit_workflow(template, randomize_seed=False).result(PATIENCE)
        for image in first:
            (server.directory / "output" / image.name).unlink()
        again = executor.submit_workflow(template, randomize_seed=False).result(PATIENCE)
        assert len(first) == len(again) == 2
        assert [image.cached for image in again] == [False, False]
        assert server.node_runs == {"BenchSampler": 1, "SaveImage": 4}
        assert len(server.prompts) == 3


def test_a_file_deleted_before_it_was_fetched_is_an_error_that_names_it(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    server.faults.fail("GET", "/view", status=404)
    with pytest.raises(Exception, match=r"does not have t_00001_\.png of node 2"):
        executor.submit_workflow(bench()).result(PATIENCE)
    assert len(server.prompts) == 1


# Deadlines.


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/prompt"), ("POST", "/prompt"), ("GET", "/view")]
)
def test_a_slow_server_does_not_outlast_the_deadline(
    server: DevServer, executor: ComfyServerWorkflowExecutor, method: str, path: str
) -> None:
    server.faults.delay(method, path, PATIENCE)
    begun = time.monotonic()
    with pytest.raises(WorkflowTimeoutError, match=r"the run's timeout of 0\.5 s passed"):
        executor.submit_workflow(bench(), timeout=0.5).result(PATIENCE)
    assert time.monotonic() - begun < PATIENCE / 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_prompt_that_is_too_slow_is_interrupted(version: str) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(bench(ENDLESS, steps=10_000), batch_timeout=0.3)
        with pytest.raises(WorkflowTimeoutError, match="batch_timeout"):
            run.result(PATIENCE)
        ended(server, interrupted=1)


# Cancelling, and strangers.


@pytest.mark.parametrize("version", VERSIONS)
def test_cancelling_what_waits_leaves_the_stranger_running(version: str) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        stranger = stranger_posts(server, ENDLESS)
        run = executor.submit_workflow(bench(), num_samples=3)
        server.wait_for(lambda s: statuses(s)["pending"] == 3, PATIENCE)
        run.cancel()
        server.wait_for(lambda s: statuses(s)["deleted"] == 3, PATIENCE)
        with pytest.raises(WorkflowCancelledError):
            run.result(PATIENCE)
        executor.close()
        assert status_of(server, stranger) == "running"
        assert served(server)["POST /interrupt"] == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_cancelling_what_runs_leaves_the_stranger_in_the_queue(version: str) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(bench(ENDLESS, steps=10_000))
        server.wait_for(lambda s: statuses(s)["running"] == 1, PATIENCE)
        stranger = stranger_posts(server, 0.2)
        run.cancel()
        server.wait_for(lambda s: status_of(s, stranger) == "success", PATIENCE)
        ended(server, interrupted=1, success=1)


def fail_in_the_middle(executor: ComfyServerWorkflowExecutor, server: DevServer) -> None:
    executor.submit_workflow(bench(ENDLESS, steps=10_000), num_samples=10)
    server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 3}, PATIENCE)
    raise KeyError


@pytest.mark.parametrize("version", VERSIONS)
def test_leaving_with_on_an_error_stops_the_server(version: str) -> None:
    with old_and_new(version) as server:
        with pytest.raises(KeyError), ComfyServerWorkflowExecutor(server.address) as executor:
            fail_in_the_middle(executor, server)
        # What waited was deleted first: nothing began because something was interrupted.
        ended(server, interrupted=1, deleted=3)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_prompt_is_deleted_by_our_own_id_before_its_post_is_answered(version: str) -> None:
    with old_and_new(version) as server:
        http = HttpClient(server.url)
        client, waiter = ComfyUIClient(http), DeadlineWaiter(PATIENCE)
        ours = [str(uuid.uuid4()) for _ in range(3)]
        for prompt_id in ours:
            client.post_prompt(bench_graph(ENDLESS, steps=10_000), prompt_id, "us", waiter)
        server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 2}, PATIENCE)
        client.delete(ours, waiter)
        assert statuses(server) == {"running": 1, "deleted": 2}
        client.cancel(ours[0], waiter)
        ended(server, interrupted=1, deleted=2)
        http.close()


def test_a_run_is_cancelled_while_the_websocket_is_not_answered(server: DevServer) -> None:
    server.faults.delay("GET", "/ws", 5.0)
    executor = ComfyServerWorkflowExecutor(server.address)
    run = executor.submit_workflow(bench())
    server.wait_for(lambda s: served(s)["GET /prompt"] == 1, PATIENCE)
    begun = time.monotonic()
    executor.close(cancel=True)
    assert time.monotonic() - begun < 4
    assert run.cancelled()
    assert server.prompts == []


def test_a_callback_that_wants_to_end_the_program_does_not_keep_a_prompt_running(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    def leave(_: object) -> None:
        raise SystemExit

    run = executor.submit_workflow(bench(ENDLESS, steps=10_000))
    run.futures[0].add_done_callback(leave)
    server.wait_for(lambda s: statuses(s) == {"running": 1}, PATIENCE)
    run.cancel()
    ended(server, interrupted=1)


def test_a_stranger_who_interrupts_ours_is_an_error(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    run = executor.submit_workflow(bench(ENDLESS, steps=10_000))
    server.wait_for(lambda s: statuses(s)["running"] == 1, PATIENCE)
    requests.post(f"{server.url}/interrupt", timeout=PATIENCE)
    with pytest.raises(WorkflowInterruptedError, match="somebody interrupted prompt"):
        run.result(PATIENCE)
    ended(server, interrupted=1)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stranger_who_interrupts_ours_unheard_is_an_error(version: str) -> None:
    with old_and_new(version) as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.refuse_websockets = True
        run = executor.submit_workflow(bench(ENDLESS, steps=10_000))
        server.wait_for(lambda s: statuses(s)["running"] == 1, PATIENCE)
        requests.post(f"{server.url}/interrupt", timeout=PATIENCE)
        with pytest.raises(WorkflowInterruptedError):
            run.result(PATIENCE)


def test_a_stranger_who_clears_the_queue_costs_nothing(
    server: DevServer, executor: ComfyServerWorkflowExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfy_prompt, "SILENCE_SECONDS", 0.3)
    run = executor.submit_workflow(bench(0.5), num_samples=4)
    futures = run.futures
    server.wait_for(lambda s: statuses(s)["running"] == 1 and statuses(s)["pending"] == 3, PATIENCE)
    requests.post(f"{server.url}/queue", json={"clear": True}, timeout=PATIENCE)
    assert len({future.result(PATIENCE).images[0].name for future in futures}) == 4
    server.wait_for(lambda s: statuses(s)["success"] == 4, PATIENCE)
    assert len(server.prompts) == 4 + statuses(server)["deleted"]


def test_strangers_prompts_end_nobody_elses_run(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    strangers = [stranger_posts(server, 0.0) for _ in range(5)]
    images = executor.submit_workflow(bench(), num_samples=5).result(PATIENCE)
    assert len({image.prompt_id for image in images} - set(strangers)) == 5
    ended(server, success=10)


def test_many_faults_at_once(server: DevServer) -> None:
    server.faults.reset_after("POST", "/prompt", times=3)
    server.faults.reset_before("GET", "/view", times=3)
    server.faults.fail("GET", "/queue", times=3)
    server.faults.truncate("GET", "/history/*", times=2)
    stop = threading.Event()

    def drop() -> None:
        while not stop.wait(0.2):
            server.drop_websockets()

    dropper = threading.Thread(target=drop)
    dropper.start()
    try:
        with ComfyServerWorkflowExecutor(server.address) as executor:
            images = executor.submit_workflow(bench(0.02), num_samples=30).result(PATIENCE)
    finally:
        stop.set()
        dropper.join()
    assert len({image.name for image in images}) == 30
    exactly(server, 30)
