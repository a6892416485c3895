"""The command line as people use it: real processes, pipes, terminals and signals."""

from __future__ import annotations

import json
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import certifi
import pytest
import trustme
from cli_kit import BENCH, HOSTILE, PATIENCE, Cli, events

import comfy_executors
from comfy_executors.devserver import DevServer

DEMO = Path(comfy_executors.__file__).with_name("demo") / "workflow.json.jinja"
SECRET = "hunter2-0123456789"


@pytest.fixture(scope="module")
def shared_server() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture
def cli(tmp_path: Path, shared_server: DevServer) -> Cli:
    shared_server.reset()
    return Cli(tmp_path, shared_server)


# run


def test_run_saves_every_image_and_names_it(cli: Cli) -> None:
    done = cli("run", "bench.jinja", "--num-samples", "20", "--batch-size", "8")
    assert (done.returncode, cli.statuses()) == (0, {"success": 3})
    assert sorted(str(cli.folder / line) for line in done.stdout.splitlines()) == cli.saved()
    assert len(cli.saved()) == 20
    # Above it there may be lines of progress, if it takes long.
    assert done.stderr.splitlines()[-1].startswith("20 images in out after ")
    assert "warning" not in done.stderr


def test_run_again_overwrites_nothing(cli: Cli) -> None:
    for _ in range(2):
        assert cli.within("run", "bench.jinja", "--seed", "5", "--output", "a b").returncode == 0
    assert len(cli.saved("a b")) == 2


def test_json_lines_account_for_all(cli: Cli) -> None:
    done = cli(
        *("run", "bench.jinja", "--num-samples", "5", "--batch-size", "2"),
        *("--seed", "7", "--ordered", "--json"),
    )
    start, *images, end = events(done.stdout)
    assert (start["event"], start["num_samples"], start["batches"]) == ("start", 5, 3)
    assert [image["event"] for image in images] == ["image"] * 5
    assert [(image["batch"], image["seed"]) for image in images] == [
        (0, 7), (0, 7), (1, 8), (1, 8), (2, 9),
    ]  # fmt: skip
    assert {image["prompt_id"] for image in images} == {p.prompt_id for p in cli.server.prompts}
    assert all((cli.folder / image["path"]).is_file() for image in images)
    assert (end["event"], end["delivered"], end["failed"]) == ("end", 5, 0)


def test_hostile_text_arrives_as_it_was_typed(cli: Cli) -> None:
    assert cli("run", "bench.jinja", "--var", f"prompt={HOSTILE}").returncode == 0
    (prompt,) = cli.server.prompts
    assert prompt.graph["1"]["inputs"]["text"] == HOSTILE
    assert prompt.graph.keys() == {"1", "2"}


def test_var_json_gives_numbers(cli: Cli) -> None:
    assert cli.within("run", "bench.jinja", "--var-json", "seconds=0.01").returncode == 0
    assert cli.server.prompts[0].graph["1"]["inputs"]["seconds"] == 0.01


def test_input_images_are_sent(cli: Cli) -> None:
    cli.within("run", "bench.jinja")
    template = '{"1": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}},'
    template += '"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], '
    (cli.folder / "load.jinja").write_text(template + '"filename_prefix": "loaded"}}}')
    (image,) = cli.saved()
    assert cli.within("run", "load.jinja", "--input", image).returncode == 0
    assert len(list((cli.folder / "out").glob("loaded*"))) == 1
    assert cli.within("check", "load.jinja", "--input", image).returncode == 0
    assert "--input" in cli.within("check", "load.jinja").stderr


def test_a_failed_batch_cancels_the_others(cli: Cli) -> None:
    done = cli("run", "bench.jinja", "--num-samples", "30", "--var", "fail=boom", "--json")
    *_, end = events(done.stdout)
    assert done.returncode == 1
    assert end["delivered"] == 0
    assert end["failed"] + end["cancelled"] == 30
    assert 1 <= cli.statuses()["error"] < 10
    assert 'Node 1 "Noise" (BenchSampler) failed: RuntimeError: boom' in done.stderr
    assert "Traceback" not in done.stderr


def test_ignore_errors_runs_all_and_says_one_thing_once(cli: Cli) -> None:
    failing = (*("run", "bench.jinja", "--num-samples", "6"), *("--var", "fail=boom"))
    done = cli.within(*failing, "--ignore-errors", "--json")
    errors = [event for event in events(done.stdout) if event["event"] == "error"]
    assert (done.returncode, cli.statuses()) == (1, {"error": 6})
    assert sorted(error["batch"] for error in errors) == [0, 1, 2, 3, 4, 5]
    assert {error["exception_type"] for error in errors} == {"RuntimeError"}
    assert done.stderr.count("boom") == 1


def test_timeout(cli: Cli) -> None:
    slow = ("run", "bench.jinja", "--var-json", "seconds=3600", "--num-samples", "3")
    done = cli(*slow, "--timeout", "0.7")
    assert (done.returncode, "timeout" in done.stderr) == (1, True)
    assert cli.statuses()["success"] == 0
    assert not {"running", "pending"} & cli.statuses().keys()


def test_quiet_leaves_the_paths(cli: Cli) -> None:
    done = cli("run", "bench.jinja", "--quiet")
    assert (done.stderr, len(done.stdout.splitlines())) == ("", 1)


def test_a_literal_batch_size_is_pointed_out(cli: Cli) -> None:
    (cli.folder / "four.jinja").write_text(BENCH.replace("{{ batch_size }}", "4"))
    done = cli.within("run", "four.jinja", "--num-samples", "2", "--batch-size", "2")
    assert len(cli.saved()) == 8
    assert "--batch-size has no effect" in done.stderr
    assert "write {{ batch_size }} in the template" in done.stderr


def test_previews_are_taken_when_asked_for(cli: Cli) -> None:
    (cli.folder / "preview.jinja").write_text(
        BENCH.replace("SaveImage", "PreviewImage").replace(', "filename_prefix": "noise"', "")
    )
    for command in ("check", "run"):
        refused = cli.within(command, "preview.jinja")
        assert (refused.returncode, "makes only previews" in refused.stderr) == (2, True)
        assert cli.within(command, "preview.jinja", "--include-previews").returncode == 0
    assert len(cli.saved()) == 1


# Fewer images than asked for

# All but the brace that ends it.
FEWER = BENCH.replace('"batch_size": {{ batch_size }}', '"batch_size": {{ batch_size // 4 }}')[:-1]
TEXT = ', "3": {"class_type": "PreviewAny", "inputs": {"source": "hello"}}\n}'
VIDEO = """, "3": {"class_type": "SaveWEBM", "inputs": {"images": ["1", 0],
  "filename_prefix": "clip", "codec": "vp9", "fps": 24.0, "crf": 32.0}}\n}"""
EIGHT = ("run", "fewer.jinja", "--num-samples", "8", "--batch-size", "4")


@pytest.mark.parametrize("ending", ["}", TEXT])
@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_fewer_images_than_asked_for_are_1(cli: Cli, ending: str, quiet: list[str]) -> None:
    (cli.folder / "fewer.jinja").write_text(f"{FEWER}{ending}")
    done = cli.within(*EIGHT, *quiet)
    assert (done.returncode, cli.statuses()) == (1, {"success": 2})
    assert "2 of 8 images" in done.stderr
    assert len(cli.saved()) == 2


def test_videos_make_up_for_images(cli: Cli) -> None:
    (cli.folder / "fewer.jinja").write_text(f"{FEWER}{VIDEO}")
    done = cli.within(*EIGHT)
    assert (done.returncode, cli.statuses()) == (0, {"success": 2})
    assert "2 of 8 images and 2 other files" in done.stderr


def test_a_run_that_makes_only_text_is_0(cli: Cli) -> None:
    (cli.folder / "text.jinja").write_text(
        '{"1": {"class_type": "PreviewAny", "inputs": {"source": "{{ batch_size }}"}}}'
    )
    done = cli.within("run", "text.jinja", "--num-samples", "8", "--batch-size", "8")
    assert done.returncode == 0
    assert "0 of 8 images and 1 other file" in done.stderr


# What cannot work


USAGE = [
    (["run"], "TEMPLATE"),
    (["run", "none.jinja"], "cannot read the template none.jinja: No such file or directory"),
    (["run", "bench.jinja", "--num-samples", "0"], "a whole number from 1"),
    (["run", "bench.jinja", "--num-samples", "3000000000"], "the 1,000,000 batches that one run"),
    (["run", "bench.jinja", "--timeout", "inf"], "a number of seconds"),
    (["run", "bench.jinja", "--seed", "-1"], "a whole number from 0"),
    (["run", "bench.jinja", "--seed", str(2**64 - 1), "--num-samples", "2"], "seed"),
    (["run", "bench.jinja", "--var", "fox"], "write name=value"),
    (["run", "bench.jinja", "--var-json", "fail=fox"], "is not JSON"),
    (["run", "bench.jinja", "--var", "promt=x"], "did you mean prompt?"),
    (["run", "bench.jinja", "--var", "fail=x", "--var", "fail=y"], "given twice"),
    (["run", "bench.jinja", "--var", "batch_size=2"], "filled in by --batch-size"),
    (["run", "bench.jinja", "--input", "none.png"], "none.png': No such file or directory"),
    (
        ["run", "bench.jinja", "--output", "bench.jinja"],
        "output_dir bench.jinja is a file, not a folder",
    ),
    (["run", "bench.jinja", "--server", "ftp://host"], "not an address"),
    (["run", "bench.jinja", "--header", "@none.txt"], "cannot read none.txt: No such file"),
    (["run", "bench.jinja", "--header", "@."], "cannot read .: Is a directory"),
    (["run", "bench.jinja", "--ca", "none.pem"], "cannot read none.pem: No such file"),
    (["run", "bench.jinja", "--ca", "bench.jinja"], "bench.jinja holds no certificate"),
    (["run", "bench.jinja", "--ca", certifi.where(), "--insecure"], "not allowed with"),
    (["run", str(DEMO)], "give them with --var prompt=TEXT"),
    (["devserver", "--port", "70000"], "a whole number from 0 to 65535"),
    ([], "run a template and save its images"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE)
def test_wrong_usage_is_2(cli: Cli, arguments: list[str], words: str) -> None:
    done = cli.within(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert cli.server.prompts == []


def test_a_refused_graph_is_2(cli: Cli) -> None:
    bad = ("--var", "prompt=x", "--var", "checkpoint=sd_xl.safetensors")
    done = cli.within("run", str(DEMO), *bad, "--json")
    errors = [event for event in events(done.stdout) if event["event"] == "error"]
    assert done.returncode == 2
    assert errors[0]["problems"][0]["input_name"] == "ckpt_name"
    assert "nearest: sd_xl_base_1.0.safetensors" in done.stderr


def test_no_server_is_3(cli: Cli) -> None:
    done = cli("run", "bench.jinja", "--server", "127.0.0.1:1", "--json")
    assert done.returncode == 3
    assert "Connection refused" in done.stderr
    assert [event["event"] for event in events(done.stdout)] == ["start", "error", "end"]
    assert cli("check", "bench.jinja", "--server", "127.0.0.1:1").returncode == 3


def test_another_kind_of_server_is_3(cli: Cli) -> None:
    address = f"{cli.server.url}/view"
    done = cli.within("run", "bench.jinja", "--server", address)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)
    assert address in done.stderr


def test_a_key_is_asked_for_sent_and_never_shown(cli: Cli) -> None:
    with DevServer(headers={"Authorization": f"Bearer {SECRET}"}) as server:
        key = ("--server", server.url, "--header", f"Authorization: Bearer {SECRET}")
        refused = cli.within("run", "bench.jinja", "--server", server.url)
        taken = cli.within("run", "bench.jinja", *key)
        assert (refused.returncode, taken.returncode) == (3, 0)
        assert cli.within("check", "bench.jinja", *key).returncode == 0
    assert "--header" in refused.stderr
    malformed = cli.within("run", "bench.jinja", "--header", SECRET)
    wrong = cli.within("run", "bench.jinja", *key[:2], "--header", f"Key: {SECRET}\nX")
    assert (malformed.returncode, wrong.returncode) == (2, 2)
    for done in (taken, malformed, wrong):
        assert SECRET not in done.stdout + done.stderr


def test_headers_are_read_from_a_file(cli: Cli) -> None:
    headers = {"Authorization": f"Bearer {SECRET}", "X-Team": "foxes"}
    lines = "".join(f"{name}: {value}\n\n" for name, value in headers.items())
    (cli.folder / "keys.txt").write_text(f"\ufeff{lines}", encoding="utf-8")
    with DevServer(headers=headers) as server:
        for command in ("run", "check"):
            key = (command, "bench.jinja", "--server", server.url, "--header")
            assert cli.within(*key, "@keys.txt").returncode == 0
            assert cli.within(*key, "X-Team: foxes").returncode == 3
            both = cli.within(*key, f"Authorization: Bearer {SECRET}", "--header", "X-Team: foxes")
            assert both.returncode == 0


@pytest.mark.parametrize("content", [SECRET.encode(), f"X: {SECRET}\xff".encode("latin-1")])
def test_a_file_of_no_headers_is_named_and_not_shown(cli: Cli, content: bytes) -> None:
    (cli.folder / "keys.txt").write_bytes(content)
    done = cli.within("run", "bench.jinja", "--header", "@keys.txt")
    assert (done.returncode, "keys.txt" in done.stderr) == (2, True)
    assert SECRET not in done.stderr


def test_an_own_ca_and_none(cli: Cli) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(cli.folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with DevServer(ssl_context=context) as server:
        for command in ("run", "check"):
            refused = cli.within(command, "bench.jinja", "--server", server.url)
            assert (refused.returncode, "--ca FILE" in refused.stderr) == (3, True)
            for option in (["--ca", "ca.pem"], ["--insecure"]):
                done = cli(command, "bench.jinja", "--server", server.url, *option)
                assert (done.returncode, "Warning" in done.stderr) == (0, False)


# Pipes, terminals and signals


def test_ctrl_c_cancels_on_the_server(cli: Cli) -> None:
    slow = ("run", "bench.jinja", "--var-json", "seconds=3600", "--num-samples", "20", "--json")
    process = cli.start(*slow)
    cli.server.wait_for(lambda _: cli.statuses() == {"running": 1, "pending": 3}, PATIENCE)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert cli.statuses() == {"interrupted": 1, "deleted": 3}
    *_, end = events(out)
    assert (end["delivered"], end["cancelled"], end["interrupted"]) == (0, 20, True)
    assert "Traceback" not in err


def test_what_came_before_ctrl_c_is_told(cli: Cli) -> None:
    process = cli.start(
        *("run", "bench.jinja", "--var-json", "seconds=0.05", "--num-samples", "2000")
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)  # as service managers and `timeout` do
    rest, err = process.communicate(timeout=PATIENCE)
    paths = [first.strip(), *rest.splitlines()]
    assert process.returncode == 130
    assert sorted(str(cli.folder / path) for path in paths) == cli.saved()
    assert f"{len(paths)} of 2000 images" in err
    assert not {"running", "pending"} & cli.statuses().keys()


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "bench.jinja", "--num-samples", "40", "--var", "seconds=0.2"),
        ("run", "bench.jinja", "--json"),
        ("run", "bench.jinja", "--json", "--var", "unknown=1"),
        ("version",),
    ],
)
def test_a_full_stdout_is_one_line(cli: Cli, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        process = cli.start(*arguments, stdout=full)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    last = "error: cannot write to stdout: No space left on device"
    assert [line for line in err.splitlines() if "error" in line.lower()] == [last]
    cli.server.wait_for(lambda server: not {"running", "pending"} & set(cli.statuses()))
    assert cli.statuses()["success"] < 40


def test_a_closed_pipe_ends_the_run_quietly(cli: Cli) -> None:
    process = cli.start(
        *("run", "bench.jinja", "--var-json", "seconds=0.05", "--num-samples", "2000")
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(PATIENCE) == 1
    assert len(cli.server.prompts) < 2000
    assert not {"running", "pending"} & cli.statuses().keys()
    process.stderr.close()


# check


def test_check_finds_all_and_runs_nothing(cli: Cli) -> None:
    bad = ("--var", "checkpoint=sd_xl", "--var", "steps=many", "--var-json", "width=7")
    done = cli("check", str(DEMO), "--var", "prompt=x", *bad)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 3
    assert 'Node 4 "Load Checkpoint" (CheckpointLoaderSimple), input ckpt_name:' in done.stdout
    assert "3 errors and 0 warnings; nothing was run" in done.stderr
    assert cli.server.prompts == []


def place_in_demo(text: str) -> tuple[int, int]:
    before = DEMO.read_text("utf-8").split(text)[0]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def test_check_in_json(cli: Cli) -> None:
    done = cli.within("check", str(DEMO), "--var", "prompt=x", "--var", "steps=many", "--json")
    variables, problem, end = events(done.stdout)
    assert variables["defaults"]["steps"] == 20
    assert (problem["line"], problem["column"]) == place_in_demo("{{ steps |")
    assert (problem["event"], problem["level"]) == ("problem", "error")
    assert (problem["node_id"], problem["input_name"], problem["value"]) == ("3", "steps", "many")
    assert (end["event"], end["errors"], done.returncode) == ("end", 1, 2)


def test_check_without_a_server_renders(cli: Cli) -> None:
    del cli.environment["COMFYUI_URL"]
    many = ("--var", "prompt=x", "--var", "steps=many")
    assert cli.within("check", str(DEMO), *many).returncode == 0
    (cli.folder / "bad.jinja").write_text('{"1": {"class_type": "A", "inputs": {},}}')
    done = cli.within("check", "bad.jinja")
    assert (done.returncode, "trailing comma" in done.stderr) == (2, True)


def test_check_lists_the_variables_that_are_wanted(cli: Cli) -> None:
    done = cli.within("check", str(DEMO))
    assert done.returncode == 2
    assert {"prompt: required", "steps: default 20"} <= set(done.stdout.splitlines())
    assert "batch_size: filled in by --batch-size" in done.stdout.splitlines()
    assert "missing variables: prompt" in done.stderr


# demo, devserver, version


def test_the_demo_makes_16_images_and_says_what_is_next(cli: Cli) -> None:
    done = cli("demo", "--output", "pictures")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 16)
    assert len({Path(path).read_bytes() for path in cli.saved("pictures")}) == 16
    assert "comfy-executors template export.json -o workflow.json.jinja" in done.stderr
    assert "comfy-executors check TEMPLATE" in done.stderr
    assert str(DEMO) in done.stderr


@pytest.mark.parametrize("command", ["demo", "devserver"])
def test_a_missing_extra_is_named(cli: Cli, command: str) -> None:
    cli.block("aiohttp")
    done = cli(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'comfy-executors[devserver]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_devserver_serves_until_it_is_stopped(cli: Cli, stop: signal.Signals) -> None:
    process = cli.start("devserver", "--port", "0", "--json", "--step-seconds", "0")
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    assert cli("run", "bench.jinja", "--server", url).returncode == 0
    process.send_signal(stop)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert len(cli.saved()) == 1


def test_a_taken_port_is_named(cli: Cli) -> None:
    done = cli.within("devserver", "--port", str(cli.server.port))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(cli.server.port) in done.stderr


def test_version(cli: Cli) -> None:
    for arguments in ("version", "--version"):
        done = cli(arguments)
        assert (done.returncode, done.stdout.strip()) == (0, comfy_executors.__version__)


def test_without_a_command_the_help_is_printed(cli: Cli) -> None:
    done = cli()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == cli("--help").stdout
