"""The engine that asks a server: a real one on loopback, and one that does everything wrong."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Event, Lock, Thread
from typing import Any

import httpx
import pytest

from conftest import HashEmbedder
from eval.tables import read_table
from rag.errors import (
    ModelError,
    ModelFetchError,
    ModelServerError,
    OutOfMemoryError,
    SettingsError,
)
from rag.lm.catalog import resolve_model
from rag.lm.engine import Engine, GenerationDone, Message, Prompt, ScoreRequest, TextPiece
from rag.lm.remote_engine import RemoteEngine
from rag.settings import Settings, load_settings
from rag.types import Answer, Route
from ui.assembly import Fathom
from ui.cli import main

SECRET = "the-key-nobody-may-see"
CHAT = [Message("system", "Answer in one word."), Message("user", "What is the capital of France?")]


def ask(engine: RemoteEngine, prompt: Prompt, limit: int = 8) -> tuple[str, GenerationDone]:
    *steps, done = engine.generate(prompt, max_new_tokens=limit, stop=Event())
    assert isinstance(done, GenerationDone)
    return "".join(step.text for step in steps if isinstance(step, TextPiece)), done


# ---- transformers serve ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Return the URL of `transformers serve` with smollm2-135m, and the model's folder."""
    try:
        fetched = resolve_model("smollm2-135m", Settings())
    except ModelFetchError:
        pytest.skip("smollm2-135m is not fetched (make test fetches it)")
    folder = tmp_path_factory.mktemp("served")
    for path in fetched.iterdir():
        (folder / path.name).symlink_to(path)
    # The server asks the config for the class's name, which a converted model does not have.
    config = json.loads((fetched / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"]})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"transformers serve ended with {server.returncode}")
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url, folder
    finally:
        server.terminate()
        server.wait()


def remote_settings(served: tuple[str, Path], home: Path, **changes: Any) -> Settings:  # noqa: ANN401
    url, folder = served
    given: dict[str, Any] = {
        "home": home,
        "remote_url": f"{url}/v1",
        "remote_model": str(folder),  # it lists the hub's cache, not what it was started with
        "remote_context_tokens": 2048,
        "remote_tokenizer": str(folder),
        "max_new_tokens": 12,
    }
    return Settings(**(given | changes))


@pytest.mark.model
def test_a_real_server_answers_with_a_receipt(
    served: tuple[str, Path], tmp_path: Path, handbook: Path
) -> None:
    fathom = Fathom(remote_settings(served, tmp_path / "home"), embedder=HashEmbedder())
    fathom.ingest(handbook)
    answer = fathom.service().answer("What is the harbour fee?")
    receipt = answer.receipt
    assert receipt.model == f"{served[1]} at {served[0].removeprefix('http://')}"
    assert receipt.route is Route.FULL
    assert receipt.new_tokens > 0
    # What is counted here is what the server counted, template and all.
    planned = fathom.service().plan("What is the harbour fee?", fathom.documents())
    assert receipt.prompt_tokens == planned.prompt.num_tokens
    # What only the server knows is left open.
    assert {gate.gate for gate in receipt.gates} == {"tokens"}
    assert {gate.limit for gate in receipt.gates} == {2048}
    assert receipt.kv_bytes.predicted is receipt.kv_bytes.actual is None
    assert receipt.seconds.prefill_predicted is receipt.cached_tokens is None
    assert receipt.seconds.prefill > 0
    assert fathom.receipts.load(receipt.id) == answer
    assert "cut off at its limit of 12 tokens" in receipt.reason
    # A table of questions, several at once, with the answers of each alone.
    found = dict(fathom.service().answer_many(["What is the harbour fee?", "Is there a beacon?"]))
    assert sorted(found) == [0, 1]
    assert isinstance(found[0], Answer)
    assert found[0].answer == answer.answer


@pytest.mark.model
def test_the_greedy_text_is_that_of_the_same_model_here(
    served: tuple[str, Path], tmp_path: Path
) -> None:
    from rag.lm.local_engine import LocalEngine

    remote = RemoteEngine(remote_settings(served, tmp_path))
    local = LocalEngine.load("smollm2-135m", Settings(device="cpu"))
    here = local.encode_chat(CHAT)
    prompt = remote.encode_chat(CHAT)
    assert prompt.num_tokens == here.num_tokens
    text, done = ask(remote, prompt)
    steps = local.generate(here, max_new_tokens=8, stop=Event())
    expected = "".join(step.text for step in steps if isinstance(step, TextPiece))
    assert text.split()[:2] == expected.split()[:2]
    assert done.prompt_tokens == here.num_tokens


@pytest.mark.model
def test_stop_ends_a_real_answer_and_the_next_one_comes(
    served: tuple[str, Path], tmp_path: Path
) -> None:
    engine = RemoteEngine(remote_settings(served, tmp_path))
    stop = Event()
    prompt = engine.encode_chat([Message("user", "Count from one to a thousand, in words.")])
    done = None
    for step in engine.generate(prompt, max_new_tokens=1500, stop=stop):
        stop.set()
        done = step
    assert isinstance(done, GenerationDone)
    assert done.stopped
    assert 0 < done.new_tokens < 1500
    assert ask(engine, engine.encode_chat(CHAT))[1].new_tokens > 0


@pytest.mark.model
def test_a_real_server_that_does_not_tell_its_context_is_refused(
    served: tuple[str, Path], tmp_path: Path
) -> None:
    engine = RemoteEngine(remote_settings(served, tmp_path, remote_context_tokens=None))
    with pytest.raises(ModelServerError) as caught:
        engine.warm_up()
    assert "does not say how long its context is" in caught.value.message
    assert "FATHOM_REMOTE_CONTEXT_TOKENS" in caught.value.hint
    bounded = RemoteEngine(remote_settings(served, tmp_path, remote_tokenizer=None))
    assert bounded.name.endswith("(tokens bounded by bytes)")
    exact = RemoteEngine(remote_settings(served, tmp_path))
    for text in ("one two three", "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve", "x" * 50):
        assert exact.count_tokens(text) <= bounded.count_tokens(text)
    assert bounded.encode_chat(CHAT).num_tokens > exact.encode_chat(CHAT).num_tokens


@pytest.mark.model
def test_a_batch_keeps_a_real_server_busy_and_in_bounds(
    served: tuple[str, Path],
    tmp_path: Path,
    handbook: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows go out side by side; each has the answer it gets alone, and a bad one harms none."""
    settings = remote_settings(served, tmp_path / "home", max_new_tokens=6)
    fathom = Fathom(settings, embedder=HashEmbedder())
    fathom.ingest(handbook)
    questions = ["What is the harbour fee?", "Is there a beacon?", "", "Who reports?"]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    code = batch(fathom, monkeypatch, source, output, workers=3)
    assert code == 1
    rows = read_table(output).rows
    assert "the question is empty" in rows[2]["error"]
    for question, row in zip(questions, rows, strict=True):
        if question:
            assert row["error"] is None
            assert row["answer"] == fathom.service().answer(question).answer


def batch(
    fathom: Fathom, monkeypatch: pytest.MonkeyPatch, source: Path, output: Path, *, workers: int
) -> int:
    """Run the command over a library that is open here, and return its exit code."""
    monkeypatch.setattr("ui.verbs.batch.open_fathom", lambda _: fathom)
    monkeypatch.setattr("ui.verbs.batch.load_settings", lambda **_: fathom.settings)
    words = ["fathom", "batch", str(source), "-o", str(output), "--workers", str(workers)]
    monkeypatch.setattr(sys, "argv", words)
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# ---- a server that does everything wrong -------------------------------------------------------

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class FaultyServer:
    """Answers as it is told to: a fault for each request, in turn; the last one for all others."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.paths: dict[str, Any] = {"/v1/models": {"data": [{"id": "m", "max_model_len": 1024}]}}
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:  # noqa: ANN401
                pass

            def do_GET(self) -> None:
                outer.keys.add(self.headers["Authorization"])
                told = outer.paths.get(self.path)
                status(404 if told is None else 200, json.dumps(told))(self, {})

            def do_POST(self) -> None:
                outer.keys.add(self.headers["Authorization"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    told = outer.paths.get(self.path)
                    told = told(body) if callable(told) else told
                    return status(404 if told is None else 200, json.dumps(told))(self, {})
                outer.bodies.append(body)
                reply = outer.replies[0]
                if len(outer.replies) > 1:
                    outer.replies.pop(0)
                return reply(self, body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = Thread(target=self.http.serve_forever, args=(0.02,))

    def engine(self, **changes: Any) -> RemoteEngine:  # noqa: ANN401
        given: dict[str, Any] = {
            "remote_url": self.url,
            "remote_timeout_seconds": 5.0,
            "remote_api_key": SECRET,
        }
        return RemoteEngine(Settings(**(given | changes)))


def status(code: int, content: str, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content.encode())))
        handler.end_headers()
        handler.wfile.write(content.encode())

    return reply


def stream(*events: Any, ends: bool = True) -> Reply:  # noqa: ANN401
    """Reply with these events; one that is a string goes out as it is."""

    def reply(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for event in events:
            if callable(event):
                event()
                continue
            data = event if isinstance(event, str) else json.dumps(event)
            handler.wfile.write(f"data: {data}\n\n".encode())
            handler.wfile.flush()
        if ends:
            handler.wfile.write(b"data: [DONE]\n\n")

    return reply


def piece(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish_reason}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 33,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 16},
    },
}
GOOD = stream(piece("Par"), piece("is", "stop"), USAGE)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr("rag.lm.model_server._RETRY_SECONDS", (0.01, 0.01))
    server = FaultyServer()
    server.thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    server.thread.join()


def test_what_the_server_tells_is_used(faulty: FaultyServer) -> None:
    faulty.replies = [GOOD]
    engine = faulty.engine()
    assert engine.context_tokens == 1024
    text, done = ask(engine, engine.encode_chat(CHAT))
    assert text == "Paris"
    assert (done.prompt_tokens, done.new_tokens, done.reused_tokens) == (33, 2, 16)
    assert (done.stopped, done.is_cut_off) == (False, False)
    (body,) = faulty.bodies
    assert body["messages"][-1] == {"role": "user", "content": CHAT[-1].content}
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.0, 8, True)
    faulty.replies = [stream(piece("Par", "length"))]
    assert ask(engine, engine.encode_chat(CHAT))[1].is_cut_off


def test_the_context_of_llama_cpp_and_a_cap_of_the_settings(faulty: FaultyServer) -> None:
    faulty.paths = {
        "/v1/models": {"data": [{"id": "m"}]},
        "/props": {"default_generation_settings": {"n_ctx": 4096}},
    }
    assert faulty.engine().context_tokens == 4096
    assert faulty.engine(remote_context_tokens=600).context_tokens == 600


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_the_server_counts_where_it_can(faulty: FaultyServer, kind: str) -> None:
    if kind == "vllm":
        faulty.paths["/tokenize"] = lambda body: {
            "count": len(str(body.get("messages", body.get("prompt"))).split()) + 7
        }
    else:
        faulty.paths["/apply-template"] = {"prompt": "<s> user one <e>"}
        faulty.paths["/tokenize"] = lambda body: {"tokens": body["content"].split()}
    engine = faulty.engine()
    assert engine.name == f"m at 127.0.0.1:{faulty.http.server_port}"
    assert engine.count_tokens("one two three") == (10 if kind == "vllm" else 3)
    assert engine.encode_chat(CHAT).num_tokens > 3


@pytest.mark.parametrize(
    "fault",
    [
        status(429, "busy", Retry_After="0"),
        status(500, "oops"),
        status(503, "loading"),
        stream(ends=False),
        stream(piece(""), ends=False),
    ],
)
def test_before_the_first_word_it_is_tried_again(faulty: FaultyServer, fault: Reply) -> None:
    faulty.replies = [fault, fault, GOOD]
    engine = faulty.engine()
    assert ask(engine, engine.encode_chat(CHAT))[0] == "Paris"
    assert len(faulty.bodies) == 3
    faulty.replies = [fault]
    with pytest.raises(ModelServerError):
        ask(engine, engine.encode_chat(CHAT))
    assert len(faulty.bodies) == 6


@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        (stream(piece("Par"), ends=False), "broke off", "ask again"),
        (stream(piece("Par"), "{nonsense"), "expected a piece of a chat", "FATHOM_REMOTE_URL"),
        (stream("[1, 2]"), "expected a piece of a chat completion", "FATHOM_REMOTE_URL"),
        (stream({"error": {"message": "worker died"}}), "worker died", "log"),
        (status(401, "no"), "refused the key", "FATHOM_REMOTE_API_KEY"),
        (status(404, "no such model"), "no such model", "FATHOM_REMOTE_MODEL"),
        (status(400, "maximum context length is 512"), "maximum context length", "log"),
        (status(307, "", Location="http://192.0.2.1/"), "status 307", "log"),
        (status(429, "busy", Retry_After="3600"), "busy", "log"),
    ],
)
def test_what_goes_wrong_is_said_once_and_no_half_answer_is_given(
    faulty: FaultyServer, fault: Reply, words: str, hint: str
) -> None:
    faulty.replies = [fault]
    engine = faulty.engine()
    with pytest.raises(ModelServerError) as caught:
        ask(engine, engine.encode_chat(CHAT))
    assert words in caught.value.message
    assert hint in caught.value.hint
    assert len(faulty.bodies) == 1
    assert SECRET not in caught.value.message + caught.value.hint


def test_memory_that_runs_out_on_the_server_takes_the_smaller_plan(
    faulty: FaultyServer, settings: Settings, handbook: Path
) -> None:
    faulty.replies = [status(500, "CUDA out of memory"), GOOD]
    changes = {"remote_url": faulty.url, "remote_context_tokens": 8000, "retrieval_tokens": 200}
    faulty.paths["/v1/models"] = {"data": [{"id": "m"}]}
    fathom = Fathom(settings.model_copy(update=changes), embedder=HashEmbedder())
    fathom.ingest(handbook)
    receipt = fathom.service().answer("What is the harbour fee?").receipt
    assert receipt.route is Route.RETRIEVAL
    assert "memory ran out on the server" in receipt.escalations[0]
    faulty.replies = [status(500, "CUDA out of memory")]
    with pytest.raises(OutOfMemoryError):
        fathom.service().answer("What is the harbour fee?")


def test_a_prompt_that_is_too_long_is_never_sent(faulty: FaultyServer) -> None:
    faulty.replies = [GOOD]
    engine = faulty.engine()
    with pytest.raises(ModelError, match="has 1,024"):
        ask(engine, Prompt((Message("user", "x"),), 1020))
    assert faulty.bodies == []


def test_a_server_that_knows_no_stream_options_is_asked_without(faulty: FaultyServer) -> None:
    faulty.replies = [status(422, "Unexpected fields: {'stream_options'}"), GOOD]
    engine = faulty.engine()
    for _ in range(2):
        assert ask(engine, engine.encode_chat(CHAT))[0] == "Paris"
    assert ["stream_options" in body for body in faulty.bodies] == [True, False, False]


def test_stop_closes_the_connection_while_the_server_is_silent(faulty: FaultyServer) -> None:
    closed, begun = Event(), Event()

    def silent(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        begun.set()
        if handler.connection.recv(1) == b"":  # the other side is gone
            closed.set()

    faulty.replies = [silent]
    engine, stop = faulty.engine(remote_timeout_seconds=60.0), Event()
    prompt = engine.encode_chat(CHAT)

    def stop_it() -> None:
        begun.wait()
        stop.set()

    Thread(target=stop_it).start()
    (done,) = engine.generate(prompt, max_new_tokens=8, stop=stop)
    assert isinstance(done, GenerationDone)
    assert (done.stopped, done.new_tokens) == (True, 0)
    assert closed.wait(10)


def test_a_silent_server_is_given_up_after_the_timeout(faulty: FaultyServer) -> None:
    let_go = Event()
    faulty.replies = [stream(let_go.wait)]
    engine = faulty.engine(remote_timeout_seconds=0.2)
    with pytest.raises(ModelServerError, match=r"sent nothing for 0\.2 s"):
        ask(engine, engine.encode_chat(CHAT))
    let_go.set()


def test_one_failure_in_a_table_leaves_the_others(faulty: FaultyServer) -> None:
    faulty.replies = [GOOD, status(400, "no"), GOOD, GOOD]
    engine = faulty.engine(remote_parallel=1)
    prompts = [engine.encode_chat(CHAT)] * 4
    done = []

    def read() -> None:
        for number, step in engine.generate_many(prompts, max_new_tokens=8, stop=Event()):
            if isinstance(step, GenerationDone):
                done.append(number)

    with pytest.raises(ModelServerError):
        read()
    assert done == [0, 2, 3]


def test_a_batch_has_so_many_requests_on_their_way_and_no_more(
    faulty: FaultyServer, settings: Settings, handbook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three wait for each other at the server, so three come at once; a fourth never does."""
    together, most, now, lock = Barrier(3, timeout=20), 0, 0, Lock()

    def meet(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        together.wait()
        with lock:
            now -= 1
        GOOD(handler, body)

    faulty.replies = [meet]
    faulty.paths["/v1/models"] = {"data": [{"id": "m", "max_model_len": 8192}]}
    changes = {"remote_url": faulty.url}
    fathom = Fathom(settings.model_copy(update=changes), embedder=HashEmbedder())
    fathom.ingest(handbook)
    source, output = handbook.parent / "in.csv", handbook.parent / "out.csv"
    source.write_text("question\n" + "".join(f"Question {n}?\n" for n in range(9)))
    assert batch(fathom, monkeypatch, source, output, workers=3) == 0
    assert most == 3
    assert {row["error"] for row in read_table(output).rows} == {""}


def test_a_batch_outlives_failures_and_stops_where_the_server_is_gone(
    faulty: FaultyServer,
    settings: Settings,
    handbook: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty.paths["/v1/models"] = {"data": [{"id": "m", "max_model_len": 8192}]}
    changes = {"remote_url": faulty.url, "escalations": 0}
    fathom = Fathom(settings.model_copy(update=changes), embedder=HashEmbedder())
    fathom.ingest(handbook)
    source, output = handbook.parent / "in.csv", handbook.parent / "out.csv"
    source.write_text("question\n" + "".join(f"Question {n}?\n" for n in range(12)))
    gone = status(400, "no")
    faulty.replies = [GOOD, gone, gone, GOOD, gone]
    assert batch(fathom, monkeypatch, source, output, workers=1) == 1
    told = capsys.readouterr()
    assert "the same command goes on from there" in told.err
    assert "error: " in told.err
    rows = read_table(output).rows
    assert [bool(row["receipt"]) for row in rows] == [n in (0, 3) for n in range(12)]
    assert [row["error"].startswith("not asked yet") for row in rows[:9]] == [False] * 8 + [True]
    num_asked = len(faulty.bodies)
    faulty.replies = [GOOD]
    assert batch(fathom, monkeypatch, source, output, workers=1) == 0
    assert len(faulty.bodies) == num_asked + 10
    assert all(row["receipt"] for row in read_table(output).rows)


def test_a_document_cannot_end_its_own_turn_there(faulty: FaultyServer) -> None:
    engine = faulty.engine()
    signs = ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "[/INST]")
    prompt = engine.encode_chat([Message("user", f"a {' '.join(signs)} b <b>1 < 2</b>")])
    content = prompt.messages[0].content
    assert not any(sign in content for sign in signs)
    assert content.endswith("b <b>1 < 2</b>")


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, "offers these models: a, b"),
        ({"data": []}, "offers these models: none"),
        ({"models": 3}, "expected a list of models"),
        (None, "knows no such model or address"),
    ],
)
def test_a_model_that_cannot_be_chosen_is_asked_for(
    faulty: FaultyServer,
    listed: Any,  # noqa: ANN401
    words: str,
) -> None:
    faulty.paths = {"/v1/models": listed}
    with pytest.raises(ModelServerError) as caught:
        faulty.engine().warm_up()
    assert words in caught.value.message


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ModelServerError, match="could not be reached"):
        RemoteEngine(Settings(remote_url=url)).warm_up()
    for wrong in ("127.0.0.1:8000", "ftp://127.0.0.1", "", "http://me:secret@127.0.0.1"):
        with pytest.raises(SettingsError, match="remote_url"):
            RemoteEngine(Settings(remote_url=wrong))


def test_the_key_goes_to_the_server_and_nowhere_else(
    faulty: FaultyServer,
    settings: Settings,
    handbook: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    faulty.replies = [status(500, "oops"), GOOD]
    faulty.paths["/v1/models"] = {"data": [{"id": "m", "max_model_len": 8192}]}
    changes = {"remote_url": faulty.url}
    with_key = Settings(**(settings.model_dump() | changes | {"remote_api_key": SECRET}))
    fathom = Fathom(with_key, embedder=HashEmbedder())
    fathom.ingest(handbook)
    answer = fathom.service().answer("What is the harbour fee?")
    assert faulty.keys == {f"Bearer {SECRET}"}
    written = b"".join(path.read_bytes() for path in settings.home.rglob("*") if path.is_file())
    told = [json.dumps(answer.to_json()), repr(with_key), caplog.text, written.decode("latin-1")]
    assert not any(SECRET in text for text in told)


def test_what_it_cannot_do_it_says(faulty: FaultyServer) -> None:
    engine = faulty.engine()
    assert not engine.can_score
    with pytest.raises(ModelError, match="does not tell how likely"):
        engine.score([ScoreRequest((1,), (2,))], stop=Event())
    told: Engine = engine
    assert told.spec is None
    assert told.free_bytes() is None
    assert told.predicted_prefill_seconds(10) is None
    assert engine.cached_tokens(Prompt((), 1), None) == 0


def test_nothing_is_sent_before_it_is_needed(faulty: FaultyServer) -> None:
    engine = faulty.engine()
    assert not faulty.keys
    engine.warm_up()
    assert faulty.keys == {f"Bearer {SECRET}"}


def test_a_server_and_a_local_model_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FATHOM_REMOTE_URL", "http://127.0.0.1:8000/v1")
    with pytest.raises(SettingsError) as caught:
        load_settings(model="smollm2-135m")
    assert "FATHOM_REMOTE_MODEL" in caught.value.hint
    assert load_settings().remote_url == "http://127.0.0.1:8000/v1"
