"""`plaudit serve` as people run it: what it says, what it refuses, several models, a full queue, and how it leaves."""

import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import httpx2
import pytest

from plaudit_model.encode import Encoder
from plaudit_model.footprint import Room
from plaudit_model.reward_model import RewardModel
from plaudit_server import cli
from plaudit_server.engine import EngineSettings
from plaudit_server.errors import RequestError
from plaudit_server.lifecycle import listen
from plaudit_server.served import Name
from plaudit_server.settings import Limits, ServerSettings, SettingsError

KEY = "correct-horse-battery"
BODY = {"prompt": "Human: what is the best way?", "response": "practise daily"}
GEMMA = "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>\n"


def test_a_bad_model_or_configuration_exits_78_with_one_clear_line(plaudit, tmp_path, tiny_model_dir):
    def refused(*arguments):
        code = plaudit.run("serve", *arguments)
        assert plaudit.stdout == ""
        lines = plaudit.stderr.strip().splitlines()
        assert lines[-1].startswith("error: ") and "Traceback" not in plaudit.stderr
        return code, lines[-1]

    assert refused(tmp_path / "nothing")[0] == 78
    code, line = refused(tiny_model_dir, "--host", "0.0.0.0")
    assert code == 78 and "--api-key" in line and "--insecure" in line
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")
    code, line = refused(broken, "--port", "0")
    assert code == 78 and "model.safetensors" in line
    code, line = refused(tiny_model_dir, "--device", "cuda:0,cuda:0")
    assert code == 78 and "two workers on cuda:0 would only share it" in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = refused(tmp_path / "nothing", "--port", taken.getsockname()[1])  # before the model is looked for
    assert code == 78 and "cannot listen" in line


@pytest.fixture(scope="module")
def both(serve, tiny_model_dir, tiny_bert_dir):
    """Two models behind a key; foreign text is rendered again."""
    running = serve(f"first={tiny_model_dir}", tiny_bert_dir, "--rendered-text", "rerender", "--overlong", "error",
                    "--cpus", str(min(os.sched_getaffinity(0))), "--wait", "passive", "--memory-cap", "0.5",
                    PLAUDIT_API_KEY=KEY, alone=True)  # fmt: skip
    with httpx2.Client(base_url=running.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield running, client


def test_it_says_what_it_serves_and_how_to_ask(both):
    running, client = both
    info = client.get("/info").json()
    for model in info["models"]:
        assert model["model"] in running.said and model["revision"] in running.said and model["sharing"] in running.said
    assert "curl -s " + running.url in running.said and "from plaudit import Client" in running.said
    assert KEY not in running.said + running.log.read_text()
    assert all(model["memory_bytes"]["cap"] == 1 << 29 for model in info["models"])
    assert all(0 < model["memory_bytes"]["weights"] < 1 << 29 for model in info["models"])


@pytest.mark.soak
def test_weights_of_int8_are_served(serve, tiny_model_dir):
    ours = RewardModel.load(tiny_model_dir, dtype="int8")
    encoded = ours.encoder.encode(BODY["prompt"], BODY["response"])
    with httpx2.Client(base_url=serve(tiny_model_dir, "--dtype", "int8").url, timeout=60) as client:
        score = client.post("/score", json=BODY).json()["score"]
        [model] = client.get("/info").json()["models"]
    assert score == float(ours.score_encoded([encoded])[0, 0])
    assert (model["dtype"], model["numerics"]) == ("int8", ours.numerics)
    assert model["memory_bytes"]["weights"] == Room(0).prediction(ours.module, "int8")["weights"]


def test_cpus_and_waiting_are_the_workers(both):
    running, _ = both
    cpu = str(min(os.sched_getaffinity(0)))
    hosts, workers = running.hosts(), running.workers()
    assert len(hosts) == len(workers) == 2
    assert all(b"OMP_WAIT_POLICY=passive" in Path(f"/proc/{host}/environ").read_bytes() for host in hosts)
    allowed = [Path(f"/proc/{pid}/status").read_text().split("Cpus_allowed_list:")[1].split()[0] for pid in workers]
    assert allowed == [cpu, cpu]
    assert os.sched_getaffinity(running.process.pid) == os.sched_getaffinity(0)
    assert "M parameters loaded and proven in" in running.log.read_text()


@pytest.mark.parametrize("wrong", ["x", "1-", "-3", "0,,1", "3-1", "0-99999999", "4096"])
def test_cpus_that_make_no_sense_are_refused(wrong):
    with pytest.raises(SettingsError, match="cpus"):
        cli._cpus(wrong)


def test_the_printed_lines_work_as_they_stand(both):
    running, _ = both
    lines = [line.strip() for line in running.said.splitlines() if line.startswith("  ") and " -" in line]
    curl, python = [line for line in lines if line.startswith("curl") or "from plaudit import Client" in line]
    environment = {**os.environ, "PLAUDIT_API_KEY": KEY, "PYTHONSAFEPATH": "1"}
    for line in (curl, python):
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "score" in done.stdout, done.stderr


def test_several_models_are_named_in_body_or_path(both):
    _, client = both
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["first", "bert"]
    assert [model["id"] for model in client.get("/m/bert/v1/models").json()["data"]] == ["bert"]
    assert client.get("/m/bert/readyz").json() == {"status": "ready", "models": {"bert": "ready"}}
    one = client.post("/score", content=json.dumps({**BODY, "model": "first"})).json()
    other = client.post("/m/bert/score", content=json.dumps(BODY)).json()
    assert (one["model"], other["model"]) == ("first", "bert") and one["score"] != other["score"]
    assert one["revision"] != other["revision"]
    unnamed = client.post("/score", content=json.dumps(BODY))
    assert (unnamed.status_code, unnamed.json()["error"]["code"]) == (422, "ambiguous_model")
    torn = client.post("/m/bert/score", content=json.dumps({**BODY, "model": "first"}))
    assert (torn.status_code, torn.json()["error"]["code"]) == (422, "ambiguous_model")
    assert client.get("/m/bert/info").json()["shares_prompt"] is False


def test_a_transform_without_statistics_is_a_422_that_names_it(both):
    _, client = both
    for transform in ("normalized", "probability"):
        answer = client.post("/m/first/score", content=json.dumps({**BODY, "transform": transform}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "missing_statistics")
        assert answer.json()["error"]["param"] == "transform"
    compared = client.post("/m/first/compare", content=b'{"prompt": "p", "response_a": "a", "response_b": "b"}')
    assert (compared.status_code, compared.json()["error"]["code"]) == (422, "missing_statistics")


def test_foreign_text_is_rendered_again_and_the_startup_choice_of_overlong_holds(both):
    _, client = both
    reward = client.post("/m/first/get_reward", content=json.dumps({"query": [GEMMA]})).json()["rewards"][0]
    native = client.post("/m/first/score", content=json.dumps({"prompt": "hi", "response": "hello"})).json()["score"]
    assert reward == native
    long = client.post("/m/first/get_reward", content=json.dumps({"query": ["word " * 2_000]}))
    assert (long.status_code, long.json()["error"]["code"]) == (422, "too_long")


def test_the_key_covers_every_route_but_the_probes(both):
    running, client = both
    paths = ["/", *client.get("/openapi.json").json()["paths"], "/openapi.json", "/m/first/score", "/nowhere"]
    assert len(paths) >= 13
    with httpx2.Client(base_url=running.url) as stranger:
        for path in paths:
            for method in ("GET", "POST", "OPTIONS"):
                open_to_all = path in ("/livez", "/readyz", "/health")
                assert (stranger.request(method, path).status_code == 401) is not open_to_all, (method, path)
        assert stranger.get("/metrics", headers={"x-api-key": KEY}).status_code == 200
        assert stranger.get(running.url.replace("http://", f"http://any:{KEY}@") + "/info").status_code == 200


def test_one_of_two_sleeps_then_both_and_what_is_patient_is_answered_once_they_wake(both):
    _, client = both
    body = {"model": "first", "prompt": "p", "response": "over http"}
    answers = []

    def ask(**options):
        return client.post("/score", content=json.dumps(body | options))

    first = ask().json()
    foreign = client.post("/sleep", headers={"origin": "https://elsewhere.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "foreign_page")
    assert client.get("/readyz").status_code == 200
    assert client.post("/m/first/sleep").json() == {"models": {"first": "asleep"}}
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json() == {"status": "asleep", "models": {"first": "asleep", "bert": "ready"}}
    assert 'plaudit_asleep{model="first"} 1.0' in client.get("/metrics").text
    refused = ask(response="another")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
    assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["retryable"]
    assert ask(model="bert").status_code == 200
    waits = threading.Thread(target=lambda: answers.append(ask(response="patient", priority="batch")))
    waits.start()
    while 'plaudit_queue_items{model="first"} 1.0' not in client.get("/metrics").text:
        pass
    assert client.post("/sleep").json() == {"models": {"first": "asleep", "bert": "asleep"}}
    assert client.post("/wake").json() == {"models": {"first": "ready", "bert": "ready"}}
    waits.join()
    assert answers[0].status_code == 200 and answers[0].json()["revision"] == first["revision"]
    assert client.get("/readyz").status_code == 200
    assert ask(model=f"first@{first['revision']}").json()["score"] == first["score"]


def test_a_full_queue_a_client_that_leaves_and_a_drain(serve, tiny_model_dir, fault_variable, fault_text):
    """A hung worker holds everything still, so that each of these can be seen. What another client may add to a queue
    that is full is seen beside it."""
    full = str(len(Encoder.open(tiny_model_dir).encode("p", "waits").ids))
    running = serve(tiny_model_dir, "--queue-tokens", full, "--drain-seconds", "3", **fault_variable)
    host, port = running.url.removeprefix("http://").split(":")
    with httpx2.Client(base_url=running.url, timeout=60) as client:
        hung = threading.Thread(target=lambda: answers.append(ask(fault_text["hang"])))
        answers = []

        def ask(response):
            return client.post("/score", content=json.dumps({"prompt": "p", "response": response}))

        def waits(tokens):
            while (client.get("/info").json()["queued_tokens"] > 0) is not tokens:
                pass

        hung.start()
        while not any('plaudit_queue_items{model="qwen3"} 1.0' in line for line in client.get("/metrics").iter_lines()):
            pass
        waits(False)
        body = json.dumps({"prompt": "p", "response": "waits"}).encode()
        head = f"POST /score HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port))) as leaver:
            leaver.sendall(head + body)
            waits(True)
            refused = ask("one too many")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["retry_after_ms"] > 0
            forged = {"x-forwarded-for": "127.0.0.9", "forwarded": "for=127.0.0.9", "x-real-ip": "127.0.0.9"}
            assert client.post("/score", content=body, headers=forged).status_code == 503
            with socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0)) as other:
                other.sendall(head + json.dumps({"prompt": "p", "response": "other"}).encode())
                while client.get("/info").json()["queued_tokens"] <= int(full):
                    pass
            for path, body in {
                "/get_reward": {"query": ["one too many"]},
                "/v1/score/evaluation": {"model": "model", "messages": ["one too many"]},
                "/classify": {"input": "one too many", "use_activation": False},
                "/v1/embeddings": {"input": "one too many"},
            }.items():
                reward = client.post(path, json=body)
                assert (reward.status_code, reward.json()["error"]["code"]) == (503, "overloaded")
                assert "retry-after" in reward.headers
            assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
        waits(False)
        running.process.send_signal(signal.SIGTERM)
        while client.get("/readyz").status_code != 503:
            pass
        late = ask("after the signal")
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        hung.join()
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "draining"
    assert running.process.wait(60) == 0
    assert "Traceback" not in running.log.read_text()


def test_accepted_work_is_finished_before_it_leaves_also_where_its_terminal_is_closed(serve, tiny_model_dir):
    running = serve(tiny_model_dir, "--token-budget", "512")
    responses = [f"{n} " + "word " * 60 for n in range(40)]
    got = []

    def ask():
        body = json.dumps({"prompt": "p", "responses": responses})
        got.append(httpx2.post(running.url + "/score", content=body, timeout=60))

    asking = threading.Thread(target=ask)
    with running.standing_still(), httpx2.Client(base_url=running.url) as client:
        asking.start()
        while client.get("/info").json()["queued_tokens"] == 0:
            pass
        running.process.send_signal(signal.SIGHUP)
        while "leaving" not in running.log.read_text():
            pass
        running.process.send_signal(signal.SIGHUP)  # the shell's, then the kernel's
    assert running.process.wait(60) == 0
    asking.join()
    assert got[0].status_code == 200 and None not in got[0].json()["scores"] and len(got[0].json()["scores"]) == 40


def test_a_client_that_reads_nothing_of_its_answer_is_not_waited_for_for_ever():
    """The system ends such a connection, and so the request."""
    with listen(ServerSettings(port=0)) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 180_000


@pytest.mark.soak
def test_a_second_signal_exits_at_once(serve, tiny_model_dir, fault_variable, fault_text):
    running = serve(tiny_model_dir, **fault_variable)
    body = json.dumps({"prompt": "p", "response": fault_text["hang"]})

    def ask():
        with pytest.raises(httpx2.TransportError):
            httpx2.post(running.url + "/score", content=body, timeout=60)

    asking = threading.Thread(target=ask)
    asking.start()
    while 'plaudit_queue_items{model="qwen3"} 1.0' not in httpx2.get(running.url + "/metrics").text:
        pass
    running.process.send_signal(signal.SIGTERM)
    while "leaving" not in running.log.read_text():
        pass
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(20) == 128 + signal.SIGINT
    asking.join()


@pytest.mark.parametrize(
    ("argument", "id", "source"),
    [("/models/skywork", "skywork", "/models/skywork"), ("owner/Name-8B", "Name-8B", "owner/Name-8B"),
     ("starter", "starter", "starter"), ("rm=/models/x", "rm", "/models/x"), ("rm=owner/name", "rm", "owner/name"),
     ("./models/x/", "x", "./models/x/"), ("/models/a=b", "a=b", None)],
)  # fmt: skip
def test_ids_come_from_names(argument, id, source):
    if source is None:
        with pytest.raises(SettingsError, match="give it a name"):
            Name.parse(argument)
    else:
        assert Name.parse(argument) == Name(id, source)


def test_two_models_of_one_name_are_refused_with_the_line_to_type():
    assert [name.id for name in Name.all(["/a/model", "b=/b/model"])] == ["model", "b"]
    for first, second, line in (
        ("runs/a/model", "runs/b/model", "a=runs/a/model b=runs/b/model"),
        ("/x/a/model", "/y/a/model", "model-1=/x/a/model model-2=/y/a/model"),
    ):
        with pytest.raises(SettingsError, match=f"name model; give them others: plaudit serve {line}$"):
            Name.all([first, second])


@pytest.mark.parametrize("argument", ["", "=x", "rm=", "a b", "-x", "x" * 97])
def test_an_id_that_would_not_fit_into_a_url_is_refused(argument):
    with pytest.raises(SettingsError):
        Name.parse(argument)


@pytest.mark.parametrize(
    "wrong",
    [{"host": "0.0.0.0"}, {"host": "192.168.0.1"}, {"host": "rm.example"}, {"api_key": "short"},
     {"api_key": "with space x"}, {"port": 70_000}, {"overlong": "cut"}, {"rendered_text": "maybe"},
     {"encode_threads": 0}, {"deadline_seconds": 0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(SettingsError):
        ServerSettings(**wrong)


def test_settings_that_are_safe_are_taken():
    assert ServerSettings(host="0.0.0.0", api_key=KEY).hosts is None
    assert ServerSettings(host="0.0.0.0", insecure=True).hosts is None
    assert ServerSettings(host="::1").hosts >= {"localhost", "[::1]"}
    assert "rm.example" in (ServerSettings(allowed_hosts=("rm.example",)).hosts or ())
    assert KEY not in repr(ServerSettings(api_key=KEY))
    with pytest.raises(SettingsError):
        Limits(header_bytes=0)
    with pytest.raises(SettingsError):
        Limits(held_bytes=1)


def test_the_defaults_that_help_shows_are_the_engines():
    options = inspect.signature(cli.serve, eval_str=True).parameters
    for name in ("token_budget", "max_wait_ms", "queue_tokens"):
        shown = options[name].annotation.__metadata__[0].show_default
        assert float(shown) == getattr(EngineSettings(), name)


def test_request_errors_name_known_codes_only():
    with pytest.raises(KeyError):
        RequestError("no_such_code", "")
