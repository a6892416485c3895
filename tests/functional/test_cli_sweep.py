"""`run --vars`: a run a row, results.jsonl, and --resume after whatever happened."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_kit import HOSTILE, PATIENCE, Cli, Terminal, events

from comfy_executors import OutputFileError
from comfy_executors.cli_results import Results, row_ids
from comfy_executors.devserver import DevServer


@pytest.fixture(scope="module")
def server() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture
def cli(tmp_path: Path, server: DevServer) -> Cli:
    server.reset()
    return Cli(tmp_path, server)


def write_csv(cli: Cli, *rows: dict[str, Any], name: str = "rows.csv") -> None:
    with (cli.folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(cli: Cli, *rows: Any) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (cli.folder / "rows.jsonl").write_text(text, encoding="utf-8")


def records(cli: Cli, output: str = "out") -> list[Any]:
    return events((cli.folder / output / "results.jsonl").read_text("utf-8"))


def row_of(record: Any) -> Any:
    return record["row"]


def texts(cli: Cli) -> Counter[str]:
    return Counter(prompt.graph["1"]["inputs"]["text"] for prompt in cli.server.prompts)


CSV = ("run", "bench.jinja", "--vars", "rows.csv")
JSONL = ("run", "bench.jinja", "--vars", "rows.jsonl")


# What comes out


def test_each_row_is_run_and_written_down(cli: Cli) -> None:
    rows = [{"prompt": "a fox"}, {"prompt": HOSTILE}, {"prompt": ""}]
    write_csv(cli, *rows)
    done = cli(*CSV, "--ordered")
    assert done.returncode == 0
    found = sorted(records(cli), key=row_of)
    assert [(record["row"], record["variables"]) for record in found] == list(enumerate(rows))
    assert texts(cli) == {"a fox": 1, HOSTILE: 1, "": 1}
    seeds = {p.prompt_id: p.graph["1"]["inputs"]["seed"] for p in cli.server.prompts}
    for record in found:
        [image] = record["images"]
        assert image["seed"] == record["seed"] == seeds[image["prompt_id"]]
        assert image["path"] == f"{record['row']:05d}_{image['name']}"
        assert record["error"] is None
    paths = [f"out/{record['images'][0]['path']}" for record in found]
    assert done.stdout.splitlines() == paths
    assert sorted(str(cli.folder / path) for path in paths) == cli.saved()
    assert done.stderr.splitlines()[-1].startswith("3 rows, 3 images in out after ")


def test_json_lines_keep_their_types_and_say_how_a_row_is_run(cli: Cli) -> None:
    write_jsonl(
        cli,
        {"prompt": "a", "seconds": 0.01, "num_samples": 3, "seed": 5},
        {"prompt": "b"},
    )
    options = ("--batch-size", "2", "--seed", "9", "--var-json", "seconds=0.02", "--json")
    done = cli.within(*JSONL, *options, "--ordered")
    start, first, second, end = events(done.stdout)
    assert (done.returncode, start["rows"], start["done"]) == (0, 2, 0)
    assert [image["seed"] for image in first["images"]] == [5, 5, 6]
    assert [image["seed"] for image in second["images"]] == [9]
    inputs = [prompt.graph["1"]["inputs"] for prompt in cli.server.prompts]
    assert Counter((i["text"], i["seconds"], i["batch_size"]) for i in inputs) == {
        ("a", 0.01, 2): 1, ("a", 0.01, 1): 1, ("b", 0.02, 1): 1,
    }  # fmt: skip
    assert (end["rows"], end["delivered"], end["failed"], end["missing"]) == (2, 4, 0, 0)


def test_csv_says_how_a_row_is_run(cli: Cli) -> None:
    rows = ({"prompt": "a", "seed": 5, "num_samples": 2}, {"prompt": "b", "seed": ""})
    write_csv(cli, *rows)
    assert cli.within(*CSV, "--seed", "8").returncode == 0
    assert sorted(p.graph["1"]["inputs"]["seed"] for p in cli.server.prompts) == [5, 6, 8]


def test_rows_name_their_input_images(cli: Cli) -> None:
    assert cli.within("run", "bench.jinja", "--output", ".").returncode == 0
    (cli.folder / "load.jinja").write_text(
        '{"1": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}},'
        '"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], '
        '"filename_prefix": "loaded"}}}'
    )
    write_csv(cli, {"input_images": "noise_00001_.png"}, {"input_images": "none.png"})
    done = cli.within("run", "load.jinja", "--vars", "rows.csv")
    assert (done.returncode, len(cli.saved())) == (1, 1)
    assert "error: row 1: cannot read the input image 'none.png'" in done.stderr


def test_a_failed_row_stops_no_other(cli: Cli) -> None:
    rows = [{"prompt": str(i), "fail": "boom" if i % 5 == 0 else ""} for i in range(20)]
    write_csv(cli, *rows)
    done = cli(*CSV, "--num-samples", "2")
    assert done.returncode == 1
    assert Counter(record["row"] for record in records(cli)) == dict.fromkeys(range(20), 1)
    failed = [record for record in records(cli) if record["error"]]
    assert sorted(record["row"] for record in failed) == [0, 5, 10, 15]
    assert {record["error"]["exception_type"] for record in failed} == {"RuntimeError"}
    assert len(cli.saved()) == 32
    assert done.stderr.count("boom") == 1
    assert "16 of 20 rows, 32 images in out after" in done.stderr
    assert "; 4 rows failed; " in done.stderr


def test_rows_are_told_in_order_when_one_ends_before_another(cli: Cli) -> None:
    write_jsonl(cli, {}, {"input_images": ["none.png"]}, {}, {"input_images": ["none.png"]}, {})
    told = events(cli.within(*JSONL, "--ordered", "--json").stdout)
    assert [event["row"] for event in told if event["event"] == "row"] == [0, 1, 2, 3, 4]


def test_rows_that_wait_for_their_turn_to_be_told_are_written_down(cli: Cli) -> None:
    fail = {"input_images": ["none.png"]}
    write_jsonl(cli, {"seconds": 3600}, *[fail] * 9, {"prompt": "last"})
    process = cli.start(*JSONL, "--ordered", "--json", "--max-workers", "2")
    # Four rows are begun ahead, so that seven have ended when the eleventh is there.
    cli.server.wait_for(lambda server: len(server.prompts) == 2, PATIENCE)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    written = [record["row"] for record in records(cli)]
    assert sorted(written) == list(range(1, len(written) + 1))
    assert len(written) >= 7
    told = [event["row"] for event in events(out) if event["event"] == "row"]
    # Ctrl-C may come when a row has just been written down.
    assert told in (written, written[:-1])


def test_rows_on_a_terminal(cli: Cli) -> None:
    write_jsonl(cli, {}, {"seconds": 3600})
    with Terminal(cli, *JSONL, "--max-workers", "1") as terminal:
        # The path comes when the row has been written down, which is after the bar has counted it.
        terminal.wait_for(
            lambda lines: (
                "row 1: Noise" in lines
                and any("1/2 [" in x for x in lines)
                and any(x.startswith("out/00000_") for x in lines)
            )
        )
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        assert terminal.lines[-1].startswith("1 of 2 rows, 1 image in out after")
    assert cli.statuses() == {"success": 1, "interrupted": 1}


def test_a_closed_pipe_ends_the_sweep_and_loses_nothing(cli: Cli) -> None:
    write_csv(cli, *({"prompt": str(i)} for i in range(200)))
    process = cli.start(*CSV, "--var-json", "seconds=0.02")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(PATIENCE) == 1
    process.stderr.close()
    assert not {"running", "pending"} & cli.statuses().keys()
    assert cli.within(*CSV, "--var-json", "seconds=0.02", "--resume").returncode == 0
    assert Counter(record["row"] for record in records(cli)) == dict.fromkeys(range(200), 1)
    assert len(cli.saved()) == 200


# The file of rows


def test_a_file_that_is_rewritten_does_not_disturb_its_sweep(cli: Cli) -> None:
    # More than is read ahead of the rows that are run.
    prompts = [f"{index} {'fox ' * 500}" for index in range(100)]
    write_csv(cli, *({"prompt": prompt} for prompt in prompts))
    process = cli.start(*CSV, "--max-workers", "1")
    cli.server.wait_for(lambda server: len(server.prompts) >= 3, PATIENCE)
    (cli.folder / "rows.csv").write_text('prompt,promt\n"', "utf-8")  # in place, as editors do
    _, told = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "error" in told) == (0, False), told
    assert texts(cli) == dict.fromkeys(prompts, 1)
    assert [r["variables"]["prompt"] for r in sorted(records(cli), key=row_of)] == prompts


def test_rows_come_from_a_pipe(cli: Cli) -> None:
    os.mkfifo(cli.folder / "rows.csv")
    process = cli.start(*CSV)
    (cli.folder / "rows.csv").write_text("prompt\na\nb\n", "utf-8")
    process.communicate(timeout=PATIENCE)
    assert (process.returncode, texts(cli)) == (0, {"a": 1, "b": 1})


def test_blank_rows_of_a_spreadsheet_are_no_rows(cli: Cli) -> None:
    text = "prompt,fail\na,\n,\n\n  , \nb,\n,,,\n,\n"
    (cli.folder / "rows.csv").write_text(text, "utf-8")
    done = cli.within(*CSV)
    assert (done.returncode, texts(cli)) == (0, {"a": 1, "b": 1})
    assert done.stderr.count("rows.csv: 4 blank rows are left out") == 1
    (cli.folder / "rows.csv").write_text("prompt,fail\n,\na,\nb,\nc,\n", "utf-8")
    done = cli.within(*CSV, "--resume")
    assert "2 of 3 rows are done; 1 to do" in done.stderr
    assert "rows.csv: 1 blank row is left out" in done.stderr
    assert {r["row"]: r["variables"]["prompt"] for r in records(cli)} == {0: "a", 1: "b", 2: "c"}
    assert len(records(cli)) == len(cli.server.prompts) == 3
    (cli.folder / "rows.csv").write_text("prompt,fail\n,\n", "utf-8")
    assert "there is no row in rows.csv" in cli.within(*CSV).stderr


def test_an_empty_text_alone_in_its_line_is_a_row(cli: Cli) -> None:
    (cli.folder / "rows.csv").write_text('prompt\n""\n\n" "\n', "utf-8")
    done = cli.within(*CSV)
    assert (done.returncode, texts(cli)) == (0, {"": 1, " ": 1})
    assert "blank" not in done.stderr


def test_no_room_for_a_copy_of_the_rows_is_told(cli: Cli) -> None:
    write_csv(cli, *({"prompt": str(index)} for index in range(1000)))
    done = cli.with_files_below(1000, *CSV)
    assert (done.returncode, cli.server.prompts) == (2, [])
    [told] = done.stderr.splitlines()
    assert told == (
        "error: cannot make a temporary copy of rows.csv: File too large; "
        "$TMPDIR names another folder for it"
    )


# What cannot work


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.txt", "a", "--vars takes a .csv, .tsv, .jsonl or .ndjson file, not rows.txt"),
        ("rows.csv", "", "there is no row in rows.csv"),
        ("rows.csv", "prompt\n", "there is no row in rows.csv"),
        ("rows.csv", "promt\nx\n", "promt (did you mean prompt?); the template has fail, prompt"),
        ("rows.csv", "prompt,nonsense\nx,y\n", "'nonsense'; the template has"),
        ("rows.csv", "prompt,prompt\nx,y\n", "rows.csv has two columns prompt"),
        ("rows.csv", "prompt,fail\nx\n", "rows.csv, line 2: 1 values for 2 columns"),
        ("rows.csv", 'prompt\n"x\n', "rows.csv, line 2: "),
        ("rows.csv", "batch_size\n2\n", "batch_size is filled in by --batch-size"),
        ("rows.jsonl", '{"prompt": "x"}\n{"prompt": \n', "rows.jsonl, line 2: no JSON"),
        ("rows.jsonl", "[1]\n", "rows.jsonl, line 1: a row is a JSON object, not list"),
        ("rows.jsonl", '{}\n{"promt": "x"}\n', "promt (did you mean prompt?)"),
        ("rows.csv", "prompt\n\udcff\n", "rows.csv is no UTF-8 text: save it as CSV UTF-8"),
        ("rows.jsonl", '{"prompt": "\udcff"}', "rows.jsonl is no UTF-8 text: save it as UTF-8"),
        ("rows.csv", "prompt;fail\nx;\n", "the columns are separated by ;: save it with commas"),
        ("rows.csv", "prompt,\nx,\n", "rows.csv, line 1: column 2 has no name"),
    ],
)
def test_wrong_rows_are_told_before_anything_is_sent(
    cli: Cli, name: str, text: str, words: str
) -> None:
    (cli.folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    done = cli.within("run", "bench.jinja", "--vars", name)
    assert (done.returncode, done.stdout, cli.server.prompts) == (2, "", [])
    assert words in done.stderr
    assert not (cli.folder / "out").exists()


@pytest.mark.parametrize(
    ("place", "warned"),
    [
        ('"tiling": {{ tiling | default(true) }}, "x": ""', True),
        ('"tiling": {{tiling}}, "x": ""', True),
        ('"x": "{% if tiling %}a{% endif %}"', True),
        ('"x": "{% if not tiling %}a{% endif %}"', True),
        ('"x": "{{ tiling }}"', False),
        ('"x": "is it: {{ tiling }}"', False),
        ('"x": "{% if tiling == \'no\' %}a{% endif %}"', False),
    ],
)
def test_a_no_that_counts_as_true_is_warned_of(cli: Cli, place: str, warned: bool) -> None:
    template = cli.folder / "bench.jinja"
    template.write_text(template.read_text().replace('"steps": 4', f'"steps": 4, {place}'))
    write_csv(cli, {"tiling": "True"}, {"tiling": "No"}, {"tiling": "yes"})
    words = "warning: No in the column tiling is a text, which counts as true"
    assert cli.within(*CSV).stderr.count(words) == warned
    write_jsonl(cli, {"tiling": False}, {"tiling": "no"})
    assert "warning" not in cli.within(*JSONL, "--output", "typed").stderr


def test_wrong_options_are_told(cli: Cli) -> None:
    write_csv(cli, {"prompt": "x"})
    for arguments, words in (
        (["--vars", "none.csv"], "cannot read none.csv: No such file or directory"),
        (["--vars", "rows.csv", "--var", "promt=x"], "promt (did you mean prompt?)"),
        (["--vars", "rows.csv", "--output", "bench.jinja"], "cannot save into bench.jinja"),
        (["--resume"], "--resume goes with --vars"),
    ):
        done = cli.within("run", "bench.jinja", *arguments)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    (cli.folder / "wants.jinja").write_text('{"1": {"class_type": "{{ node }}", "inputs": {}}}')
    write_jsonl(cli, {})
    done = cli.within("run", "wants.jinja", "--vars", "rows.jsonl")
    assert "does not have node, which the template wants; for all rows: --var node" in done.stderr
    assert cli.server.prompts == []


def test_no_server_ends_the_sweep_and_loses_nothing(cli: Cli) -> None:
    write_csv(cli, *({"prompt": str(i)} for i in range(100)))
    done = cli.within(*CSV, "--server", "127.0.0.1:1", "--json")
    assert (done.returncode, events(done.stdout)[-1]["missing"]) == (3, 100)
    assert done.stderr.count("Connection refused") == 1
    assert not (cli.folder / "out" / "results.jsonl").exists()
    assert cli.within(*CSV, "--resume", "--quiet").returncode == 0
    assert len(cli.saved()) == 100


# A full disk

SIZED = """{
  "1": {"class_type": "BenchSampler", "inputs": {
    "seed": 1, "width": {{ width }}, "height": 64, "batch_size": 1, "steps": 4,
    "seconds": 0, "fail": "", "text": "{{ prompt }}"}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "noise"}}
}"""


def test_an_image_that_cannot_be_saved_ends_the_sweep(cli: Cli) -> None:
    (cli.folder / "sized.jinja").write_text(SIZED, "utf-8")
    rows = [{"prompt": str(index), "width": 1024 if index == 1 else 16} for index in range(50)]
    write_jsonl(cli, *rows)
    sweep = ("run", "sized.jinja", "--vars", "rows.jsonl")
    done = cli.with_files_below(50_000, *sweep, "--gallery")
    assert done.returncode == 1
    error, end = done.stderr.splitlines()[:2]
    assert error.startswith("error: row 1: cannot save ")
    assert error.endswith(": File too large")
    count = len(cli.saved())
    assert end.startswith(f"{count} of 50 rows, {count} image")
    assert end.endswith("; run it again with --resume for the rest")
    # The rows that were begun by then, and no other.
    sent = len(cli.server.prompts)
    assert count < sent < 50
    left = {path.name for path in (cli.folder / "out").iterdir()}
    assert left - {"results.jsonl", "index.html"} == {Path(path).name for path in cli.saved()}
    assert ("index.html" in left) == (count > 0)

    assert cli.within(*sweep, "--resume").returncode == 0
    assert len(cli.server.prompts) == sent + 50 - count
    assert sorted(map(row_of, records(cli))) == list(range(50))
    assert len(cli.saved()) == 50


def test_results_that_cannot_be_written_end_the_sweep(cli: Cli) -> None:
    rows = [{"prompt": str(index)} for index in range(50)]
    write_csv(cli, *rows)
    done = cli.with_files_below(5000, *CSV, "--gallery")
    assert done.returncode == 1
    assert 0 < len(cli.server.prompts) < 50
    error, end, gallery = done.stderr.splitlines()
    assert error == "error: cannot write out/results.jsonl: File too large"
    whole = (cli.folder / "out" / "results.jsonl").read_text("utf-8").rpartition("\n")[0]
    count = len(whole.splitlines())
    assert end.startswith(f"{count} of 50 rows, {count} images in out after ")
    assert gallery == "error: cannot write out/index.html: File too large"
    assert cli.within(*CSV, "--resume").returncode == 0
    assert sorted(map(row_of, records(cli))) == list(range(50))
    assert len(cli.saved()) == 50


def test_no_room_to_resume_is_told(cli: Cli) -> None:
    write_csv(cli, *({"prompt": str(index)} for index in range(10)))
    assert cli.within(*CSV).returncode == 0
    before = (cli.folder / "out" / "results.jsonl").read_bytes()
    done = cli.with_files_below(2000, *CSV, "--resume")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cannot write out/.results.jsonl.new: File too large\n"
    assert (cli.folder / "out" / "results.jsonl").read_bytes() == before
    assert not (cli.folder / "out" / ".results.jsonl.new").exists()
    assert cli.within(*CSV, "--resume").returncode == 0
    assert len(cli.server.prompts) == 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".results.jsonl.new", "cannot write out/.results.jsonl.new: Is a directory"),
        ("results.jsonl", "cannot read out/results.jsonl: Is a directory"),
    ],
)
def test_what_is_in_the_way_of_resuming_is_told(cli: Cli, name: str, words: str) -> None:
    write_csv(cli, {"prompt": "x"})
    (cli.folder / "out" / name).mkdir(parents=True)
    done = cli.within(*CSV, "--resume")
    assert (done.returncode, done.stderr) == (2, f"error: {words}\n")
    assert cli.server.prompts == []


def test_files_that_cannot_be_moved_are_told(tmp_path: Path) -> None:
    row = {"prompt": "x"}
    [row_id] = row_ids([row])
    with contextlib.closing(Results(tmp_path, {})) as results:
        unfinished = results.folder_of(row_id)
        unfinished.mkdir(parents=True)
        (unfinished / "a.png").write_bytes(b"a")
        (tmp_path / "a.png").mkdir()
        record = {"row": 0, "id": row_id, "error": None, "outputs": []}
        with pytest.raises(OutputFileError, match=r"cannot save .*a\.png: Is a directory") as told:
            results.append({**record, "images": [{"path": "a.png"}]})
        assert isinstance(told.value.__cause__, OSError)
        with pytest.raises(OutputFileError, match=r"cannot save .*a\.png: Is a directory"):
            results.resume([row_id])
        (tmp_path / "a.png").rmdir()
        assert results.resume([row_id]).done == {0}
    assert (tmp_path / "a.png").read_bytes() == b"a"


# Resuming


def test_resume_does_what_is_missing(cli: Cli) -> None:
    rows = [{"prompt": str(i), "fail": ""} for i in range(10)]
    rows[3]["fail"] = "boom"
    write_csv(cli, *rows)
    assert cli.within(*CSV).returncode == 1
    again = cli.within(*CSV)
    assert (again.returncode, "results.jsonl is there already" in again.stderr) == (2, True)

    rows[3]["fail"] = ""  # mended
    rows[4]["prompt"] = "another"  # changed
    write_csv(cli, {"prompt": "new", "fail": ""}, *rows)  # and moved
    done = cli.within(*CSV, "--resume")
    assert done.returncode == 0
    assert "8 of 11 rows are done; 3 to do" in done.stderr
    assert "warning: 1 result in out/results.jsonl belong to rows that" in done.stderr
    counts = Counter(record["row"] for record in records(cli))
    assert (counts.pop(None), counts) == (1, dict.fromkeys(range(11), 1))
    now = {record["row"]: record["variables"]["prompt"] for record in records(cli)}
    assert [now[index] for index in range(11)] == ["new", *(row["prompt"] for row in rows)]
    assert texts(cli) == {**dict.fromkeys("012456789", 1), "3": 2, "another": 1, "new": 1}

    nothing = cli.within(*CSV, "--resume")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert len(cli.server.prompts) == 13
    write_csv(cli, {"prompt": "alone", "fail": "boom"})
    assert cli.within(*CSV, "--output", "alone").returncode == 1
    alone = cli.within(*CSV, "--output", "alone", "--resume")
    assert "0 of 1 row is done; 1 to do, 1 of which failed before" in alone.stderr


def test_images_of_a_row_that_is_made_again_take_no_names_of_each_other(cli: Cli) -> None:
    write_jsonl(cli, {"prompt": "a", "num_samples": 3})
    assert cli.within(*JSONL).returncode == 0
    before = {path: Path(path).read_bytes() for path in cli.saved()}
    (cli.folder / "out" / "results.jsonl").unlink()
    cli.server.reset()  # and with it the server's counter: the same three names come again
    assert cli.within(*JSONL).returncode == 0
    [record] = records(cli)
    paths = {str(cli.folder / "out" / image["path"]) for image in record["images"]}
    assert (len(before), len(paths), len(cli.saved())) == (3, 3, 6)
    assert set(cli.saved()) == before.keys() | paths
    assert {path: Path(path).read_bytes() for path in before} == before


def test_a_last_line_without_its_end_is_a_result(cli: Cli) -> None:
    write_csv(cli, {"prompt": "a"}, {"prompt": "b"})
    assert cli.within(*CSV, "--ordered").returncode == 0
    results = cli.folder / "out" / "results.jsonl"
    whole = results.read_text("utf-8")
    results.write_text(whole.rstrip("\n"), "utf-8")  # as some editors leave it
    write_csv(cli, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    assert cli.within(*CSV, "--resume").returncode == 0
    assert results.read_text("utf-8").startswith(whole)
    assert texts(cli) == {"a": 1, "b": 1, "c": 1}
    assert sorted(map(row_of, records(cli))) == [0, 1, 2]


def test_equal_rows_are_rows_of_their_own(cli: Cli) -> None:
    write_csv(cli, *[{"prompt": "same"}] * 3)
    assert cli.within(*CSV).returncode == 0
    write_csv(cli, *[{"prompt": "same"}] * 5)
    assert cli.within(*CSV, "--resume").returncode == 0
    assert len(cli.server.prompts) == 5
    assert sorted(record["row"] for record in records(cli)) == [0, 1, 2, 3, 4]


def test_a_changed_template_or_option_is_named(cli: Cli) -> None:
    write_csv(cli, {"prompt": "x"})
    made = ("--seed", "5", "--var-json", "seconds=0", "--var", "fail=")
    assert cli.within(*CSV, *made).returncode == 0
    before = (cli.folder / "out" / "results.jsonl").read_bytes()

    def refused(*options: str) -> str:
        done = cli.within(*CSV, "--resume", *options)
        told = done.stderr.partition("; begin anew")[0].partition(": --resume would mix")[0]
        assert (done.returncode, told.endswith(" since out/results.jsonl was begun")) == (2, True)
        return told.partition(" changed")[0]

    assert refused("--seed", "6", *made[2:]) == "error: --seed"
    assert refused(*made, "--num-samples", "2") == "error: --num-samples"
    assert refused(*made, "--batch-size", "2") == "error: --batch-size"
    assert refused(*made, "--include-previews") == "error: --include-previews"
    changed = refused(*made[:2], *made[4:], "--var-json", "seconds=0.01")
    assert changed == "error: --var seconds"
    assert refused(*made[:4]) == "error: --var fail"  # not given any more
    assert refused(*made, "--input", "rows.csv") == "error: --input"
    template = cli.folder / "bench.jinja"
    template.write_text(template.read_text().replace('"width": 16', '"width": 32'))
    assert refused(*made) == "error: the template"
    several = refused("--batch-size", "2", "--var", "prompt=y")
    assert several == (
        "error: the template, --batch-size, --seed, --var prompt, --var fail, --var seconds"
    )
    template.write_text(template.read_text().replace('"width": 32', '"width": 16'))
    write_csv(cli, {"prompt": "y"})
    other = cli.within(*CSV, "--resume", *made)
    assert (other.returncode, "is --vars the right file?" in other.stderr) == (2, True)
    assert (cli.folder / "out" / "results.jsonl").read_bytes() == before
    assert len(cli.server.prompts) == 1


@pytest.mark.parametrize("said", [{"template": "0123", "options": "4567"}, {"digests": "0123"}])
def test_results_that_do_not_say_how_they_were_made_are_refused(
    cli: Cli, said: dict[str, str]
) -> None:
    write_csv(cli, {"prompt": "x"})
    assert cli.within(*CSV).returncode == 0
    [record] = records(cli)
    del record["digests"]
    results = cli.folder / "out" / "results.jsonl"
    results.write_text(json.dumps({**record, **said}) + "\n", "utf-8")
    done = cli.within(*CSV, "--resume")
    assert (done.returncode, done.stderr) == (
        2,
        "error: out/results.jsonl does not say of which template and options its results are: "
        "begin anew in another --output\n",
    )


def test_another_process_is_kept_out(cli: Cli) -> None:
    write_jsonl(cli, {"seconds": 3600})
    first = cli.start(*JSONL)
    cli.server.wait_for(lambda _: cli.statuses() == {"running": 1}, PATIENCE)
    second = cli.within(*JSONL, "--resume")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=PATIENCE)
    assert (second.returncode, "another process is at work in out" in second.stderr) == (2, True)
    assert first.returncode == 130


def test_what_is_no_result_is_named(cli: Cli) -> None:
    write_csv(cli, {"prompt": "x"})
    (cli.folder / "out").mkdir()
    (cli.folder / "out" / "results.jsonl").write_text('{"mine": 1}\n')
    done = cli.within(*CSV, "--resume")
    assert (done.returncode, "line 1, is no result of a row" in done.stderr) == (2, True)
    assert (cli.folder / "out" / "results.jsonl").read_text() == '{"mine": 1}\n'
    assert [path.name for path in (cli.folder / "out").iterdir()] == ["results.jsonl"]


def test_files_whose_line_was_written_are_moved_later(tmp_path: Path) -> None:
    [row_id] = row_ids([{"prompt": "x"}])
    results = Results(tmp_path, {"template": "t"})
    unfinished = results.folder_of(row_id)
    unfinished.mkdir(parents=True)
    (unfinished / "00000_a.png").write_bytes(b"a")
    record = {
        "row": 0, "id": row_id, "error": None, "outputs": [], "images": [{"path": "00000_a.png"}],
        "digests": {"template": "t"},
    }  # fmt: skip
    # As left by a process that was killed between the line and the move.
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    assert results.resume([row_id]).done == {0}
    results.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000_a.png", "results.jsonl"]


@pytest.mark.parametrize(
    ("options", "words"),
    [((), "is there already"), (("--resume", "--seed", "5"), "--seed changed since")],
)
def test_a_command_that_is_refused_removes_no_images(
    cli: Cli, options: tuple[str, ...], words: str
) -> None:
    write_csv(cli, {"prompt": "x"})
    assert cli.within(*CSV).returncode == 0
    [record] = records(cli)
    [image] = record["images"]
    # As left by a process that was killed between the line and the move.
    unfinished = cli.folder / "out" / ".unfinished" / record["id"]
    unfinished.mkdir(parents=True)
    (cli.folder / "out" / image["path"]).rename(unfinished / image["path"])

    refused = cli.within(*CSV, *options)
    assert (refused.returncode, words in refused.stderr) == (2, True)
    assert [path.name for path in unfinished.iterdir()] == [image["path"]]
    assert cli.within(*CSV, "--resume").returncode == 0
    left = sorted(path.name for path in (cli.folder / "out").iterdir())
    assert left == sorted([image["path"], "results.jsonl"])
    assert len(cli.server.prompts) == 1


@pytest.mark.slow
def test_killed_and_resumed_every_row_is_there_once(cli: Cli) -> None:
    """1,000 rows of which 5 % fail, and SIGKILL at a random point."""
    draw = random.Random()
    failing = set(draw.sample(range(1000), 50))
    rows = [{"prompt": str(i), "fail": "boom" if i in failing else ""} for i in range(1000)]
    write_csv(cli, *rows)
    point = draw.randrange(50, 950)
    print("killed after", point, "prompts")

    process = cli.start(*CSV, "--quiet")
    cli.server.wait_for(lambda server: len(server.prompts) >= point, PATIENCE)
    process.kill()
    process.communicate(timeout=PATIENCE)
    cli.server.wait_for(lambda _: not {"running", "pending"} & cli.statuses().keys(), PATIENCE)
    sent = texts(cli)
    results = cli.folder / "out" / "results.jsonl"
    whole, _, _ = results.read_text("utf-8").rpartition("\n")
    good = [record for record in events(whole) if record["error"] is None]
    # A line that was broken off: as after a power cut, since one `write` is seldom cut in two.
    results.write_text(f'{whole}\n{{"row": 7, "variables": {{"pro')
    assert sent.keys() < {row["prompt"] for row in rows}
    assert 0 < len(good) <= sum(sent.values())

    done = cli(*CSV, "--resume", "--json")
    assert (done.returncode, events(done.stdout)[0]["done"]) == (1, len(good))
    found = records(cli)
    assert Counter(record["row"] for record in found) == dict.fromkeys(range(1000), 1)
    assert {record["row"] for record in found if record["error"]} == failing
    assert all(record["variables"] == rows[record["row"]] for record in found)
    # The second run has sent each row once that had no image, and no other.
    again = texts(cli) - sent
    kept = {str(record["row"]) for record in good}
    assert again == {row["prompt"]: 1 for row in rows if row["prompt"] not in kept}
    assert len(cli.server.prompts) == sum(sent.values()) + 1000 - len(good)
    # One image for each row that did not fail, and no other file anywhere.
    paths = [image["path"] for record in found for image in record["images"]]
    assert len(paths) == len(set(paths)) == 950
    files = {str(path.relative_to(results.parent)) for path in results.parent.rglob("*")}
    assert files == {"results.jsonl", *paths}
