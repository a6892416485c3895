"""200 clients at once, on 4 processes with 4 threads each; every one of them is accounted for."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
from served import WORKERS, gunicorn

IMAGES, STREAMS, JOBS, LEAVERS = 110, 40, 30, 20
EACH = 2  # images of a stream and of a job
LINGERS = "lingers"  # what a leaver asks for, and would take minutes

TEMPLATE = """{
  "1": {"class_type": "BenchSampler",
        "inputs": {"seed": 0, "width": 64, "height": 64, "batch_size": {{ batch_size }},
                   "steps": {% if "lingers" in prompt %}3000{% else %}{{ steps }}{% endif %},
                   "seconds": {% if "lingers" in prompt %}300{% else %}0.01{% endif %},
                   "text": "{{ prompt }}", "fail": ""}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "load"}}
}"""


def form(prompt, number=1):
    return {"prompt": prompt, "steps": 4, "num_samples": number}


class Clients:
    """Two hundred of them; each returns what it got."""

    def __init__(self, site):
        self.site = site
        self.may_leave = {}

    def image(self, number):
        answer = self.site.visitor().post(f"{self.site.url}/image", form("image"), timeout=100)
        return "image", answer.status_code, answer.content.startswith(b"\x89PNG")

    def stream(self, number):
        answer = self.site.visitor().post(
            f"{self.site.url}/stream", form("stream", EACH), timeout=100
        )
        kinds = Counter(json.loads(line)["kind"] for line in answer.text.splitlines())
        return "stream", answer.status_code, (kinds["image"], kinds["error"], kinds["end"])

    def job(self, number):
        visitor = self.site.visitor()
        answer = visitor.post(f"{self.site.url}/jobs", form("job", EACH), timeout=100)
        url = self.site.url + answer.json()["status_url"]
        while (told := visitor.get(url, timeout=100).json())["state"] == "running":
            time.sleep(0.5)
        return "job", answer.status_code, (told["state"], len(told["images"]))

    def leave(self, number):
        """Ask for what lingers, and close the connection when it is being made."""
        name, path = f"{LINGERS} {number}", ("/image", "/stream")[number % 2]
        self.may_leave[name] = Event()
        connection = self.site.visitor().begin(path, form(name))
        assert self.may_leave[name].wait(100)
        connection.close()
        return "leaver", path

    def let_go(self, server):
        """Let each leaver leave when its prompt runs."""
        for _ in range(LEAVERS):
            server.wait_for(lambda server: self.names_to_leave(server), 90)
            for name in self.names_to_leave(server):
                self.may_leave.pop(name).set()

    def names_to_leave(self, server):
        running = [prompt for prompt in server.prompts if prompt.status == "running"]
        texts = [prompt.graph["1"]["inputs"]["text"] for prompt in running]
        return [text for text in texts if text in self.may_leave]


@pytest.mark.slow
def test_two_hundred_clients(tmp_path, comfy_dev_server, database):
    template = tmp_path / "load.json.jinja"
    template.write_text(TEMPLATE)
    started = time.monotonic()
    with gunicorn(tmp_path, comfy_dev_server, database, COMFY_TEMPLATE=str(template)) as site:
        clients = Clients(site)
        kinds = (
            [clients.image] * IMAGES
            + [clients.stream] * STREAMS
            + [clients.job] * JOBS
            + [clients.leave] * LEAVERS
        )
        kinds = [kinds[(7 * number) % len(kinds)] for number in range(len(kinds))]  # mixed
        keeper = Thread(target=clients.let_go, args=(comfy_dev_server,))
        keeper.start()
        with ThreadPoolExecutor(len(kinds)) as pool:
            futures = [pool.submit(kind, number) for number, kind in enumerate(kinds)]
        answers = Counter(future.result() for future in futures)
        keeper.join()
        comfy_dev_server.wait_for(
            lambda server: not {"running", "pending"} & {p.status for p in server.prompts}
        )
        exit_code = site.stop()
        log = site.log.read_text("utf-8")
        threads = [json.loads(file.read_text()) for file in tmp_path.glob("*.threads")]
    prompts = Counter(
        (prompt.graph["1"]["inputs"]["text"].split()[0], prompt.status)
        for prompt in comfy_dev_server.prompts
    )
    print(f"\n{len(futures)} clients in {time.monotonic() - started:.1f} s")
    print(f"answers: {dict(answers)}\nprompts: {dict(prompts)}\nthreads at the end: {threads}")
    assert answers == {
        ("image", 200, True): IMAGES,
        ("stream", 200, (EACH, 0, 1)): STREAMS,
        ("job", 202, ("done", EACH)): JOBS,
        ("leaver", "/image"): LEAVERS // 2,
        ("leaver", "/stream"): LEAVERS // 2,
    }
    assert prompts == {
        ("image", "success"): IMAGES,
        ("stream", "success"): STREAMS * EACH,
        ("job", "success"): JOBS * EACH,
        (LINGERS, "interrupted"): LEAVERS,
    }
    assert exit_code == 0
    assert "SIGKILL" not in log
    assert len(threads) == WORKERS
    assert all("Comfy" not in name and "job" not in name for names in threads for name in names)
