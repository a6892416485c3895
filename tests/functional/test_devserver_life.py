"""The dev server's start, stop, restart and reset, and how tests wait for it."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import trustme
import websocket
from devserver_client import (
    PATIENCE,
    Client,
    bench,
    call,
    dev_server,
    endless,
    finished,
    get,
    kind_of,
    plain,
    post,
    running,
)

from comfy_executors.devserver import DevServer


@pytest.fixture
def server() -> Iterator[DevServer]:
    with dev_server() as started:
        yield started


def test_a_restart_forgets_everything_but_the_files(server: DevServer) -> None:
    client = Client(server)
    done = client.post(plain())
    client.end()
    dead = client.post(endless())
    waiting = client.post(plain(5))
    client.until("progress")
    server.restart()
    client.rest()
    assert [record.status for record in server.prompts] == ["success", "lost", "lost"]
    assert get(server, "/queue") == {"queue_running": [], "queue_pending": []}
    assert [get(server, f"/history/{id_}") for id_ in (done, dead, waiting)] == [{}, {}, {}]
    assert (server.directory / "output" / "plain_00001_.png").exists()
    post(server, plain())
    server.wait_for(lambda s: s.prompts[-1].status == "success")
    assert server.prompts[-1].number == 0
    assert server.prompts[-1].cached_nodes == []


def test_connections_are_refused_while_a_server_restarts(server: DevServer) -> None:
    restart = threading.Thread(target=server.restart, kwargs={"downtime": 1000.0})
    restart.start()
    with pytest.raises(requests.ConnectionError):
        # The restart begins during one of these.
        list(iter(lambda: call(server, "GET", "/queue").status_code, None))
    server.stop()
    restart.join(PATIENCE)
    assert not restart.is_alive()


def test_reset_makes_a_server_as_good_as_new(server: DevServer) -> None:
    client = Client(server)
    client.run(plain())
    server.faults.fail("GET", "/queue", times=None)
    server.faults.refuse_connections = True
    server.reset()
    assert (server.prompts, server.requests, server.node_runs) == ([], [], Counter())
    assert server.open_websockets == 0
    assert call(server, "GET", "/queue").status_code == 200
    assert get(server, "/history") == {}
    post(server, plain())
    server.wait_for(finished())
    assert server.node_runs == Counter(EmptyImage=1, SaveImage=1)
    assert [path.name for path in (server.directory / "output").iterdir()] == ["plain_00001_.png"]


def test_nothing_is_left_after_stop() -> None:
    before = set(threading.enumerate())
    server = DevServer().start()
    client = Client(server)
    client.post(endless())
    client.until("progress")
    address, directory = (server.address.split(":")[0], server.port), server.directory
    server.stop()
    server.stop()
    assert set(threading.enumerate()) - before == set()
    client.rest()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=PATIENCE)
    assert not directory.exists()
    with socket.socket() as successor:
        successor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        successor.bind(address)
        successor.listen()


def test_a_running_server_cannot_be_started(server: DevServer) -> None:
    with pytest.raises(RuntimeError, match="already runs at http"):
        server.start()
    assert call(server, "GET", "/queue").status_code == 200


def test_a_stopped_server_can_be_started_again(server: DevServer) -> None:
    server.stop()
    with pytest.raises(RuntimeError, match="does not run"):
        server.restart()
    server.start()
    assert call(server, "GET", "/queue").status_code == 200


@pytest.mark.parametrize("refusing", [False, True])
def test_a_port_in_use_is_a_clear_error(server: DevServer, refusing: bool) -> None:
    before = set(threading.enumerate())
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{server.port}: Address"):
        DevServer(server.port).start()
    assert set(threading.enumerate()) - before == set()


def test_two_servers_know_nothing_of_each_other(server: DevServer, tmp_path: Path) -> None:
    with DevServer(directory=tmp_path) as other:
        prompt_id = post(other, plain())
        other.wait_for(finished())
        assert get(server, f"/history/{prompt_id}") == {}
        assert server.node_runs == Counter()
    assert (tmp_path / "output" / "plain_00001_.png").exists()


def test_required_headers_guard_http_and_websocket() -> None:
    secret = {"Authorization": "Bearer k"}
    with dev_server(headers=secret) as server:
        assert call(server, "GET", "/queue").status_code == 401
        assert (
            call(server, "GET", "/queue", headers={"Authorization": "Bearer x"}).status_code == 401
        )
        assert call(server, "GET", "/queue", headers=secret).status_code == 200
        with pytest.raises(websocket.WebSocketBadStatusException) as error:
            Client(server)
        assert error.value.status_code == 401
        assert kind_of(Client(server, header=secret).receive()) == "status"


def test_a_path_prefix_is_in_front_of_everything() -> None:
    with dev_server(path_prefix="/comfy/ui/") as server:
        assert server.url == f"http://127.0.0.1:{server.port}/comfy/ui"
        assert kind_of(Client(server).receive()) == "status"
        assert call(server, "GET", "/api/queue").status_code == 200
        assert requests.get(f"http://{server.address}/queue", timeout=PATIENCE).status_code == 404
        assert [record.path for record in server.requests][:2] == ["/ws", "/queue"]


def test_tls_serves_http_and_websocket(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(trusted)
    with dev_server(ssl_context=context) as server:
        assert server.url.startswith("https://")
        assert call(server, "GET", "/queue", verify=trusted).status_code == 200
        client = Client(server, sslopt={"ca_certs": trusted})
        assert kind_of(client.receive()) == "status"
        server.drop_websockets()
        client.rest()


def test_wait_for_says_what_it_waited_for(server: DevServer) -> None:
    post(server, endless())
    server.wait_for(running)
    with pytest.raises(TimeoutError, match=r"len\(s\.prompts\) == 7.*prompts: 1 running"):
        server.wait_for(lambda s: len(s.prompts) == 7, timeout=0.05)


def test_wait_for_sees_each_step(server: DevServer) -> None:
    post(server, bench(seconds=0.2, steps=8))
    looks: list[bool] = []

    def look(server: DevServer) -> bool:
        looks.append(bool(server.prompts[0].executed_nodes))
        return looks[-1]

    server.wait_for(look)
    assert len(looks) > 4


def test_records_that_were_handed_out_do_not_change(server: DevServer) -> None:
    post(server, endless())
    server.wait_for(running)
    before = server.prompts
    call(server, "POST", "/interrupt")
    server.wait_for(finished())
    assert before[0].status == "running"


def test_many_clients_at_once_lose_nothing(server: DevServer) -> None:
    def work(number: int) -> None:
        client = Client(server, str(number))
        for color in range(5):
            client.run(plain(color, prefix=f"client{number}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert Counter(record.status for record in server.prompts) == Counter(success=30)
    assert len({path.name for path in (server.directory / "output").iterdir()}) == 30


def test_without_its_packages_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from comfy_executors.errors import MissingExtraError\n"
        "try:\n    import comfy_executors.devserver\n"
        "except MissingExtraError as error:\n    print(error.package, error.extra)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "aiohttp devserver\n"


def test_the_pytest_plugin_gives_a_clean_server_to_each_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        'pytest_plugins = ["comfy_executors.devserver.pytest_plugin"]\n'
    )
    (tmp_path / "test_it.py").write_text(
        "import requests\n"
        "def test_one(comfy_dev_server):\n"
        "    requests.get(comfy_dev_server.url + '/queue')\n"
        "    assert len(comfy_dev_server.requests) == 1\n"
        "def test_two(comfy_dev_server, comfy_dev_server_factory):\n"
        "    assert comfy_dev_server.requests == []\n"
        "    other = comfy_dev_server_factory(version='0.8.0')\n"
        "    stats = requests.get(other.url + '/system_stats').json()\n"
        "    assert stats['system']['comfyui_version'] == '0.8.0'\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "2 passed" in run.stdout, run.stdout + run.stderr


def test_a_delayed_post_dies_with_the_server(server: DevServer) -> None:
    server.faults.delay("POST", "/prompt", 0.3)
    body = json.dumps({"prompt": plain()}).encode()
    head = f"POST /prompt HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + body)
        # Answered after the post was read, which came earlier.
        assert call(server, "GET", "/queue").status_code == 200
        server.restart()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    server.wait_for(lambda s: s.requests[-1].path == "/prompt")
    assert server.requests[-1].status is None
    assert server.prompts == []


def test_keys_are_not_shown_in_records() -> None:
    with dev_server(headers={"Authorization": "Bearer k3y"}) as server:
        call(server, "GET", "/queue", headers={"Authorization": "Bearer k3y"})
        assert server.requests[0].headers["Authorization"] == "Bearer k3y"
        assert "k3y" not in repr(server.requests) + repr(server)
