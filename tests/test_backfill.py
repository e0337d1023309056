"""A backfill into a real Postgres with pgvector, by the real stack: nothing twice, missing or wrong."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import psycopg
import pytest
from conftest import ROOT, TINY, Stack, cosines
from containers import until
from postgres import Database, Postgres, postgres

from tools import search
from tools.backfill import client
from tools.backfill import postgres as store
from tools.backfill.__main__ import check, main, parser
from tools.backfill.connection import connected
from tools.backfill.flow import Wait, Window
from tools.backfill.origin import Origin
from tools.backfill.table import Table

PAGE = (ROOT / "docs" / "backfill.md").read_text()

DIMENSIONS = 48
ROWS = 20_000
"""Five windows."""


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def database(server: Postgres) -> Database:
    return server.database()


def texts_of(count: int) -> list[str]:
    """Short ones of many lengths, none twice."""
    generator = random.Random(7)
    words = ["stone", "river", "paper", "light", "engine", "winter", "copper", "window", "garden", "signal"]
    return [f"{i} {' '.join(generator.choices(words, k=generator.randrange(1, 9)))}" for i in range(count)]


def fill(database: Database, texts: Sequence[str | None], table: str = "chunks") -> None:
    database.run(
        f"CREATE TABLE {table} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, content text, "
        f"embedding vector({DIMENSIONS}))"
    )
    database.copy(f"COPY {table} (content) FROM STDIN", ([text] for text in texts))


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tools.backfill", *map(str, words)]


def chunks(stack: Stack, database: Database, *words: object) -> list[object]:
    url = stack.url("embed", "")
    return [database.url, "--table", "chunks", "--text", "content", "--url", url, "--model", "bert-cls", *words]


def run(*words: object, status: int = 0) -> str:
    """Runs the command to its end, in this process; what it said."""
    with redirect_stderr(io.StringIO()) as said:
        assert main([*map(str, words)]) == status, said.getvalue()
    return said.getvalue()


def embedded(said: str) -> int:
    """Texts that the server embedded, by the summary."""
    (found,) = re.findall(r"rows in [\d.]+ s: (\d+) texts", said)
    return int(found)


def vectors(database: Database, table: str = "chunks", column: str = "embedding") -> npt.NDArray[np.float32]:
    """In the order of ids, zeros for none."""
    found = database.run(f"SELECT {column}::real[] FROM {table} ORDER BY id")
    return np.array([row or [0.0] * DIMENSIONS for (row,) in found], np.float32)


def direct(stack: Stack, texts: list[str], model: str = "bert-cls") -> npt.NDArray[np.float32]:
    """By a call of one's own, with the prompt of documents."""
    rows = []
    for start in range(0, len(texts), 1000):
        body = {"input": texts[start : start + 1000], "model": model, "input_type": "document"}
        rows += stack.post("embed", "/v1/embeddings", body).json()["data"]
    return np.array([row["embedding"] for row in rows], np.float32)


def claims(database: Database, job: subprocess.Popen[Any]) -> None:
    """Waits until the job works, or has ended."""
    jobs = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'backfill'"
    working = f"{jobs} AND datname = current_database()"
    claimed = "SELECT count(*) FROM embedding_claims WHERE first IS NOT NULL"
    until(lambda: database.run(working) == [(2,)] or job.poll() is not None)
    until(lambda: database.run("SELECT to_regclass('embedding_claims')") != [(None,)])
    until(lambda: database.run(claimed) != [(0,)] or job.poll() is not None)


@pytest.fixture(scope="module")
def expected(small: Stack) -> npt.NDArray[np.float32]:
    return direct(small, texts_of(ROWS))


def test_twenty_thousand_rows(small: Stack, database: Database, expected: npt.NDArray[np.float32]) -> None:
    fill(database, texts_of(ROWS))
    said = run(*chunks(small, database))
    assert embedded(said) == ROWS
    assert (vectors(database) == expected).all()
    hashes = "s.text_sha256 = sha256(convert_to(c.content, 'UTF8'))"
    joined = f"SELECT count(*) FROM chunks c JOIN chunks_embedding_origin s ON s.id = c.id AND {hashes}"
    assert database.run(joined) == [(ROWS,)]
    ((origin,),) = database.run("SELECT origin FROM embedding_origins")
    graph = small.get("embed", "/v1/models/bert-cls").json()["graph"]
    assert re.fullmatch("[0-9a-f]{64}", graph)
    assert origin == {
        "family": "bert-cls",
        "source": "bert-cls",
        "revision": None,
        "graph": graph,
        "precision": "fp32",
        "prompt": "document",
        "dimensions": DIMENSIONS,
    }
    assert database.run("SELECT count(*) FROM embedding_claims") == [(0,)]
    again = run(*chunks(small, database))
    assert embedded(again) == 0
    assert f"{ROWS} of them done before" in again


def test_vectors_are_those_of_the_reference(small: Stack, database: Database) -> None:
    texts = json.loads((TINY / "texts.json").read_text())
    fill(database, texts)
    run(*chunks(small, database, "--prompt", "query"))
    reference = np.load(TINY / "bert-cls" / "expected.npz")["query_embeddings"]
    assert cosines(vectors(database), reference).min() >= 0.999


def test_killed_five_times_two_jobs_end_it_the_same(
    small: Stack, database: Database, expected: npt.NDArray[np.float32]
) -> None:
    fill(database, texts_of(ROWS))
    generator = random.Random(3)
    done = [0]
    for _ in range(5):
        job = subprocess.Popen(command(*chunks(small, database)), cwd=ROOT, stderr=subprocess.DEVNULL)
        claims(database, job)
        time.sleep(generator.random())
        job.kill()
        job.wait()
        with_vector = "SELECT count(embedding) FROM chunks"
        with_origin = "SELECT count(*) FROM chunks_embedding_origin"
        assert database.run(with_vector) == database.run(with_origin)
        done += [count for (count,) in database.run(with_vector)]
    assert done == sorted(done)
    words = command(*chunks(small, database))
    jobs = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [embedded(job.communicate()[1]) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert sum(counts) == ROWS - done[-1]  # of which the first to begin may do all
    assert (vectors(database) == expected).all()


def test_a_job_waits_for_what_another_claimed_and_takes_it_over(gateway: Gateway, database: Database) -> None:
    """The other one's server never answers, and it is killed when this one has nothing else to do."""
    fill(database, texts_of(30_000))
    words = command(database.url, "--table", "chunks", "--text", "content", "--url")
    with Gateway() as silent:
        silent.open.clear()
        dead = subprocess.Popen([*words, silent.url], cwd=ROOT, stderr=subprocess.DEVNULL)
        claimed = "SELECT sum(last::bigint - first::bigint + 1) FROM embedding_claims"
        claims(database, dead)
        living = subprocess.Popen([*words, gateway.url], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert living.stderr is not None
        said = next(line for line in living.stderr if line.startswith("waiting for"))
        assert re.match("waiting for another job, which has claimed the ids from 1 to 4096 of public", said)
        ((done, left),) = database.run("SELECT count(embedding), count(*) - count(embedding) FROM chunks")
        assert done == len(gateway.texts) > 0
        assert database.run(claimed) == [(left,)]
        dead.kill()
        dead.wait()
        silent.open.set()
        silent.shutdown()
    rest = living.communicate()[1]
    assert living.returncode == 0, rest
    assert sorted(gateway.texts) == sorted(texts_of(30_000))
    assert database.run("SELECT count(embedding) FROM chunks") == [(30_000,)]
    assert database.run("SELECT count(*) FROM embedding_claims") == [(0,)]


def test_texts_that_change_are_never_given_a_stale_vector(gateway: Gateway, database: Database) -> None:
    """One changes while it is embedded, one becomes empty, one goes away."""
    fill(database, ["a", "b", "c", "d"])

    def change(texts: list[str]) -> None:
        if "a" in texts:
            database.run("UPDATE chunks SET content = 'another b' WHERE id = 2")
            database.run("UPDATE chunks SET content = '' WHERE id = 3")
            database.run("DELETE FROM chunks WHERE id = 4")

    gateway.meanwhile = change
    said = run(database.url, "--table", "chunks", "--text", "content", "--url", gateway.url, status=3)
    assert "2 rows in" in said
    assert "3: its text is empty" in said
    assert [sorted(texts) for _, texts in gateway.calls] == [["a", "b", "c", "d"], ["another b"]]
    hashes = (
        "SELECT id FROM chunks_embedding_origin JOIN chunks USING (id) WHERE text_sha256 = sha256(content::bytea)"
    )
    assert sorted(database.run(hashes)) == [(1,), (2,)]
    assert database.run("SELECT count(*) FROM chunks_embedding_origin") == [(2,)]
    assert database.run("SELECT id FROM chunks WHERE embedding IS NULL") == [(3,)]


def test_what_has_no_vector_is_listed_and_stops_nothing(small: Stack, database: Database, tmp_path: Path) -> None:
    fill(database, ["a", None, "", "b", "word " * 200_000, "x" * (2**24 + 1), " "])
    said = run(*chunks(small, database, "--refused", tmp_path / "refused.jsonl"), status=3)
    assert "4 rows in" in said
    assert "1 texts were cut" in said
    listed = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in listed} == {
        "2": "its text is NULL",
        "3": "its text is empty",
        "6": "its text has 16777217 bytes, over the 16777216 that a call may have",
    }
    assert all(f"  {row['id']}: {row['reason']}" in said for row in listed)
    there = [vector is not None for (vector,) in database.run("SELECT embedding FROM chunks ORDER BY id")]
    assert there == [True, False, False, True, True, False, True]
    assert (vectors(database)[[0, 3]] == direct(small, ["a", "b"])).all()
    database.run("UPDATE chunks SET content = '' WHERE id = 1")
    said = run(*chunks(small, database), status=3)
    assert "1: its text is empty" in said
    assert database.run("SELECT count(*) FROM chunks WHERE id = 1 AND embedding IS NULL") == [(1,)]
    assert database.run("SELECT count(*) FROM chunks_embedding_origin WHERE id = 1") == [(0,)]


def test_a_text_that_the_model_refuses_is_found_among_others(small: Stack, database: Database) -> None:
    hostile = "a" + "\u0903" * 2_000_000
    fill(database, [*texts_of(100), hostile, *texts_of(100)])
    said = run(*chunks(small, database), status=3)
    assert "200 rows in" in said
    assert re.search(r"^  101: .+", said, re.MULTILINE)


def test_a_server_that_is_gone_is_waited_for(
    small: Stack, database: Database, expected: npt.NDArray[np.float32]
) -> None:
    """It goes while the first vectors cannot be written yet."""
    fill(database, texts_of(ROWS))
    with psycopg.connect(database.url) as keeper:
        keeper.execute("LOCK TABLE chunks IN SHARE MODE")
        job = subprocess.Popen(command(*chunks(small, database)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        claims(database, job)
        for process in small.tree():
            with suppress(psutil.NoSuchProcess):  # the others end with the first
                process.kill()
        small.process.wait()
    assert job.stderr is not None
    assert any("waiting for http://127.0.0.1" in line for line in job.stderr)
    small.start()
    said = job.communicate()[1]
    assert job.returncode == 0, said
    assert (vectors(database) == expected).all()


def test_two_vector_spaces_never_mix(small: Stack, database: Database) -> None:
    fill(database, texts_of(50))
    run(*chunks(small, database))
    other = chunks(small, database, "--model", "roberta")
    said = run(*other, status=1)
    assert re.search(r"^error: public\.chunks\.embedding holds 50 vectors of bert-cls \(.*--replace", said, re.M)
    assert (vectors(database) == direct(small, texts_of(50))).all()
    said = run(*other, "--replace", "--where", "id <= 10", status=1)
    assert "of which --where would leave 40" in said
    run(*other, "--replace")
    assert (vectors(database) == direct(small, texts_of(50), "roberta")).all()
    assert embedded(run(*other)) == 0
    assert "holds 50 vectors of roberta" in run(*chunks(small, database, "--prompt", "query"), status=1)


def test_vectors_of_unknown_origin_are_not_taken_for_ours(small: Stack, database: Database) -> None:
    fill(database, texts_of(5))
    database.run(f"UPDATE chunks SET embedding = array_fill(1, ARRAY[{DIMENSIONS}])::real[]::vector WHERE id = 2")
    assert "holds 1 vectors of unknown origin" in run(*chunks(small, database), status=1)
    run(*chunks(small, database, "--replace"))
    assert (vectors(database) == direct(small, texts_of(5))).all()


def test_only_what_is_missing_or_changed_is_done(small: Stack, database: Database) -> None:
    fill(database, texts_of(100))
    run(*chunks(small, database))
    database.run("UPDATE chunks SET content = 'another text' WHERE id = 7")
    database.run("UPDATE chunks SET embedding = NULL WHERE id = 8")
    database.run("INSERT INTO chunks (content) VALUES ('a new one')")
    assert embedded(run(*chunks(small, database))) == 3
    texts = [text for (text,) in database.run("SELECT content FROM chunks ORDER BY id")]
    assert (vectors(database) == direct(small, texts)).all()


MOMENTS = "CASE i WHEN 1 THEN 'infinity' ELSE '2000-01-01'::timestamptz + i * interval '1 h' END"


@pytest.mark.parametrize("kind", ["uuid", "text", "timestamptz"])
def test_any_kind_of_id_and_a_table_of_their_own(small: Stack, database: Database, kind: str) -> None:
    """A schema, names that want quotes, percent signs in them and in the filter, behind which is a comment."""
    database.run('CREATE SCHEMA "My % {Docs}"')
    make = {"uuid": "gen_random_uuid()", "text": "'b' || i || '\"é'", "timestamptz": MOMENTS}[kind]
    database.run(
        f'CREATE TABLE "My % {{Docs}}"."Chunks" ("Id" {kind} PRIMARY KEY, "the text" varchar); '
        f'INSERT INTO "My % {{Docs}}"."Chunks" SELECT {make}, \'text \' || i FROM generate_series(1, 5000) i'
    )
    words: list[object] = [database.url, "--table", '"My % {Docs}"."Chunks"', "--id", "Id", "--text", "the text"]
    words += [
        "--into",
        "vectors",
        "--where",
        "\"the text\" LIKE 'text 1%' -- a tenth",
        "--url",
        small.url("embed", ""),
    ]
    assert embedded(run(*words)) == 1111
    joined = (
        'SELECT c."the text", v.embedding::real[] FROM "My % {Docs}"."Chunks" c JOIN vectors v ON v.id = c."Id"'
    )
    rows = database.run(joined)
    assert len(rows) == 1111
    assert (np.array([row for _, row in rows], np.float32) == direct(small, [text for text, _ in rows])).all()
    assert embedded(run(*words)) == 0
    assert embedded(run(*words[:-4], *words[-2:])) == 5000 - 1111


def test_half_precision_and_an_index(small: Stack, database: Database) -> None:
    fill(database, texts_of(200))
    database.run(f"ALTER TABLE chunks ALTER embedding TYPE halfvec({DIMENSIONS})")
    database.run("CREATE SCHEMA elsewhere; ALTER EXTENSION vector SET SCHEMA elsewhere")
    said = run(*chunks(small, database, "--index"))
    assert "built: CREATE INDEX CONCURRENTLY" in said
    definition = "SELECT indexdef FROM pg_indexes WHERE tablename = 'chunks' AND indexdef LIKE '%hnsw%'"
    assert "halfvec_cosine_ops" in database.run(definition)[0][0]
    np.testing.assert_allclose(vectors(database), direct(small, texts_of(200)), atol=1e-3)
    database.run("INSERT INTO chunks (content) VALUES ('a new one')")
    assert "chunks_embedding_idx is kept in step" in run(*chunks(small, database, "--index"))
    assert len(database.run(definition)) == 1


def test_a_dry_run_writes_nothing(small: Stack, database: Database) -> None:
    fill(database, [*texts_of(600), None])
    said = run(*chunks(small, database, "--dry-run"))
    assert re.search(r"600 texts of \d+ bytes are to be done; 512 of them took .* hours", said)
    assert database.run("SELECT count(embedding), to_regclass('embedding_origins') FROM chunks") == [(0, None)]
    run(*chunks(small, database), status=3)
    assert "nothing is to be done" in run(*chunks(small, database, "--dry-run"))


WRONG: dict[str, tuple[str, list[object], str]] = {
    "size": (
        "ALTER TABLE chunks ALTER embedding TYPE vector(1024)",
        [],
        r"is vector\(1024\) and the model gives 48",
    ),
    "type": ("ALTER TABLE chunks ALTER embedding TYPE text", [], r"embedding is text: .* of type vector\(48\)"),
    "no vector": (
        "ALTER TABLE chunks DROP embedding",
        [],
        r"ALTER TABLE chunks ADD COLUMN embedding vector\(48\)$",
    ),
    "no text": ("", ["--text", "body"], r"has no column 'body' for --text: it has id, content, embedding"),
    "no table": ("", ["--table", "missing"], "there is no table missing in the database 'test"),
    "no key": ("ALTER TABLE chunks DROP CONSTRAINT chunks_pkey", [], "is not known to be unique"),
    "no extension": ("DROP EXTENSION vector CASCADE", [], "run CREATE EXTENSION vector"),
    "filter": ("", ["--where", "nonsense ="], "Postgres refuses: syntax error"),
    "no right": ("", ["--into", "pg_catalog.mine"], "Postgres refuses: permission denied"),
    "view": ("CREATE VIEW v AS SELECT * FROM chunks", ["--table", "v"], "v is no table but a view"),
    "bytes": (
        "ALTER TABLE chunks ALTER content TYPE bytea USING ''",
        [],
        "content is bytea: name a column of texts",
    ),
    "any size": ("ALTER TABLE chunks ALTER embedding TYPE vector", ["--index"], r"make it vector\(48\)"),
    "file": ("", ["--refused", "/missing/file"], "/missing/file: No such file or directory"),
    "model": ("", ["--model", "gpt"], "no model 'gpt'"),
    "reranker": ("", ["--model", "bert-cross-encoder"], "serves no model that embeds called bert-cross-encoder"),
    "prompt": ("", ["--prompt", "summary"], "there is no prompt 'summary': bert-cls has document, query"),
    "dimensions": ("", ["--dimensions", "7"], "gives 48 dimensions and was not trained to give fewer"),
    "calls": ("", ["--calls", "0"], "--calls must be at least 1"),
    "url": ("", ["--url", "localhost"], "'localhost' is no URL"),
    "no server": ("", ["--url", "http://127.0.0.1:9"], "no gateway answers at http://127.0.0.1:9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_sentence(small: Stack, database: Database, name: str) -> None:
    fill(database, ["a"])
    statement, words, sentence = WRONG[name]
    if statement:
        database.run(statement)
    assert_one_sentence(run(*chunks(small, database, *words), status=1), sentence)


def assert_one_sentence(said: str, sentence: str) -> None:
    lines = [line for line in said.splitlines() if line and "row/s]" not in line]  # of the bar
    lines = [line for line in lines if not line.startswith("vectors of ")]
    assert len(lines) == 1, said
    assert re.match(rf"error: .*{sentence}", lines[0]), said


def test_a_wrong_password_and_no_database(small: Stack, database: Database) -> None:
    words = chunks(small, database)
    url = str(words[0])
    wrong = [re.sub(r":a%20.*@", ":wrong@", url), *words[1:]]
    assert_one_sentence(run(*wrong, status=1), "cannot connect to Postgres: password authentication failed")
    missing = [f"{url}-not-there", *words[1:]]
    assert_one_sentence(run(*missing, status=1), 'cannot connect to Postgres: database ".*" does not exist')
    gone = [re.sub(r":\d+/", ":9/", url), *words[1:]]
    assert_one_sentence(run(*gone, status=1), "cannot connect to Postgres: connection failed")
    assert_one_sentence(run(url, status=1), "name the table with --table")


class Gateway(ThreadingHTTPServer):
    """Speaks as a gateway does, and is busy, failing or another model when the test says so."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, dict[str, str]]] = []
        """Statuses and headers of the next calls, before all is well."""
        self.open = threading.Event()
        """Cleared, it answers nobody."""
        self.open.set()
        self.meanwhile: Callable[[list[str]], None] = lambda _: None
        """Is done before a call is answered."""
        self.graph = "a"
        self.broken = False
        self.poison = ""
        """A text that no call with it survives."""
        self.calls: list[tuple[float, list[str]]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def texts(self) -> list[str]:
        """All that it was sent."""
        return [text for _, texts in self.calls for text in texts]


class Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        names = ("revision", "minimum_dimensions", "ignored", "residency", "pooling")
        model = {"id": "m", "task": "embed", "prompts": [], "source": "s", "precision": "fp32"}
        model |= {"graph": self.server.graph, **dict.fromkeys(names)}
        self._reply(200, model if self.path.endswith("/m") else {"data": [model]}, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "ready?" in body["input"]:
            if self.server.broken:
                self._reply(502, {"error": {"message": "broken"}}, {})
                return
        else:
            self.server.calls.append((time.monotonic(), body["input"]))
            self.server.open.wait()
            self.server.meanwhile(body["input"])
            if self.server.broken or self.server.poison in body["input"]:
                self._reply(502, {"error": {"message": "broken"}}, {})
                return
            if self.server.answers:
                status, headers = self.server.answers.pop(0)
                self._reply(status, {"error": {"message": "wait"}}, headers)
                return
        row = base64.b64encode(np.ones(DIMENSIONS, "<f4").tobytes()).decode()
        data = [{"embedding": row} for _ in body["input"]]
        self._reply(200, {"data": data}, {"X-Token-Count": "1", "X-Truncated": "0"})

    def _reply(self, status: int, content: object, headers: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as running:
        yield running
        running.open.set()
        running.shutdown()


def test_a_busy_server_is_obeyed(gateway: Gateway, database: Database) -> None:
    fill(database, ["a"])
    gateway.answers = [(429, {"Retry-After": "2"}), (503, {"Retry-After": "1"})]
    said = run(database.url, "--table", "chunks", "--text", "content", "--url", gateway.url)
    first, second, third = (moment for moment, _ in gateway.calls)
    assert second - first >= 2
    assert third - second >= 1
    assert "waiting for" in said


def test_a_call_that_takes_too_long_is_sent_in_halves(gateway: Gateway, database: Database) -> None:
    fill(database, texts_of(64))
    gateway.answers = [(504, {})]
    run(database.url, "--table", "chunks", "--text", "content", "--url", gateway.url)
    assert [len(texts) for _, texts in gateway.calls] == [64, 32, 32]
    assert database.run("SELECT count(embedding) FROM chunks") == [(64,)]


def test_a_broken_server_is_waited_for_and_a_text_that_breaks_it_is_found(
    gateway: Gateway, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It recovers after three calls, but for one text."""
    monkeypatch.setattr(client, "PATIENCE", 1)
    fill(database, ["a", "poison", "b"])
    gateway.poison, gateway.broken = "poison", False

    def change(_: list[str]) -> None:
        gateway.broken = len(gateway.calls) < 3

    gateway.meanwhile = change
    said = run(database.url, "--table", "chunks", "--text", "content", "--url", gateway.url, status=3)
    assert "waiting for" in said
    assert "  2: broken" in said
    assert len(gateway.calls) > 3
    assert database.run("SELECT id FROM chunks WHERE embedding IS NOT NULL") == [(1,), (3,)]


def test_postgres_that_goes_away_is_one_sentence(gateway: Gateway, database: Database) -> None:
    fill(database, texts_of(50))
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'backfill'"
    gateway.meanwhile = lambda _: database.run(end) and None
    words = [database.url, "--table", "chunks", "--text", "content", "--url", gateway.url]
    assert re.search(r"^error: Postgres has gone \(.*run the same", run(*words, status=1), re.MULTILINE)
    gateway.meanwhile = lambda _: None
    assert "50 rows in" in run(*words)


def test_a_server_that_becomes_another_model_writes_nothing(gateway: Gateway, database: Database) -> None:
    fill(database, texts_of(50))
    gateway.meanwhile = lambda _: setattr(gateway, "graph", "another")
    words = [database.url, "--table", "chunks", "--text", "content", "--url", gateway.url]
    assert re.search("^error: .* has become m .* and was m ", run(*words, status=1), re.MULTILINE)
    assert database.run("SELECT count(embedding) FROM chunks") == [(0,)]


def test_a_job_can_be_stopped_whatever_it_waits_for(gateway: Gateway, database: Database) -> None:
    """One for a lock of Postgres, the other for the first."""
    fill(database, ["a"])
    words = command(database.url, "--table", "chunks", "--text", "content", "--url", gateway.url)
    locked = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with psycopg.connect(database.url) as keeper:
        keeper.execute("LOCK TABLE chunks IN SHARE MODE")
        first = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        until(lambda: database.run(locked) == [(1,)])
        second = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        assert any("waiting for another job" in line for line in second.stderr)
        for job, number in ((second, signal.SIGINT), (first, signal.SIGTERM)):
            job.send_signal(number)
            said = job.communicate(timeout=60)[1]
            assert job.returncode == 130, said
            assert "stopped: run the same command again to go on" in said
    assert database.run("SELECT count(embedding) FROM chunks") == [(0,)]


class Job:
    """One that does a step when it is told to, without a server: windows of ten rows, vectors of ones."""

    def __init__(self, database: Database, stack: ExitStack, where: str | None = None) -> None:
        self.database, self.ends = database, stack.enter_context(ExitStack())
        reader, writer = (self.ends.enter_context(connected(database.url)) for _ in range(2))
        self.sessions = [connection.info.backend_pid for connection in (reader, writer)]
        options = Namespace(table="chunks", id="id", text="content", vector="embedding", into=None, where=where)
        table = Table.find(reader, options, DIMENSIONS, make=True)
        self.store = store.Postgres(reader, writer, table, Origin("m", None, None, None, None, None, DIMENSIONS))
        self.store.begin(False)

    def read(self) -> Window:
        window = self.store.read()
        assert isinstance(window, Window)
        return window

    def waits(self) -> str | None:
        """What for; None where nobody else keeps it."""
        found = self.store.read()
        assert isinstance(found, Wait)
        return found.why

    def write(self, window: Window) -> int:
        return self.store.write(window, np.ones((len(window.ids), DIMENSIONS), np.float32), {})

    def die(self) -> None:
        self.ends.close()
        left = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
        until(lambda: self.database.run(left, [self.sessions]) == [(0,)])


@pytest.fixture
def jobs(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    """Makes jobs on a table of forty rows."""
    monkeypatch.setattr("tools.backfill.claims.WINDOW_ROWS", 10)
    fill(database, texts_of(40))
    with ExitStack() as stack:
        yield lambda where=None: Job(database, stack, where)


def numbers(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last + 1)]


def test_two_jobs_wait_for_each_other_while_they_write(jobs: Callable[..., Job]) -> None:
    one, two = jobs(), jobs()
    a, b, c, d = one.read(), two.read(), one.read(), two.read()
    assert [window.ids for window in (a, b, c, d)] == [numbers(i + 1, i + 10) for i in range(0, 40, 10)]
    assert one.waits() == "another job, which has claimed the ids from 11 to 20 of public.chunks.embedding"
    assert two.waits() == "another job, which has claimed the ids from 1 to 10 of public.chunks.embedding"
    assert (one.write(a), two.write(b), one.write(c)) == (10, 10, 10)
    assert one.waits() == "another job, which has claimed the ids from 31 to 40 of public.chunks.embedding"
    assert two.waits() is None
    assert two.write(d) == 10
    assert one.store.read() is None
    assert two.store.read() is None


def test_what_a_dead_job_had_claimed_is_done_at_once(jobs: Callable[..., Job]) -> None:
    dead, living, late = jobs(), jobs(), jobs()
    written, lost = dead.read(), dead.read()
    dead.write(written)
    windows = [living.read()]
    assert windows[0].ids == numbers(21, 30)
    dead.die()
    windows.append(living.read())
    assert windows[1].ids == lost.ids == numbers(11, 20)
    windows.append(living.read())
    assert [living.write(window) for window in windows] == [10, 10, 10]
    assert living.store.read() is None
    assert late.store.read() is None


def test_jobs_of_unlike_filters_do_no_row_twice(jobs: Callable[..., Job]) -> None:
    even, low, whole = jobs("id % 2 = 0"), jobs("id < 16"), jobs()
    first = even.read()
    assert first.ids == numbers(1, 20)[1::2]
    second = low.read()
    assert second.ids == ["1"]  # the rest may be another's
    assert low.waits() == "another job, which has claimed the ids from 2 to 20 of public.chunks.embedding"
    third = whole.read()
    assert third.ids == numbers(21, 30)
    assert low.write(second) == 1
    assert even.write(first) == 10
    fourth = low.read()
    assert fourth.ids == numbers(3, 15)[::2]
    fifth = whole.read()
    assert fifth.ids == ["17", "19"]
    sixth = even.read()
    assert sixth.ids == numbers(31, 40)[1::2]
    for job, window in ((low, fourth), (whole, fifth), (even, sixth)):
        assert job.write(window) == len(window.ids)
    assert low.store.read() is None
    assert even.waits() == "another job, which has claimed the ids from 21 to 30 of public.chunks.embedding"
    whole.write(third)
    last = whole.read()
    assert last.ids == numbers(31, 40)[::2]
    whole.write(last)
    assert even.store.read() is whole.store.read() is None


def test_a_text_that_changes_is_read_again_and_its_claim_lasts(
    jobs: Callable[..., Job], database: Database
) -> None:
    """In the same job, or in another when that one dies; a text that never stands still is listed in the end."""
    one, two = jobs("id <= 10"), jobs("id <= 10")
    window = one.read()
    for times in range(1, store.ROUNDS + 1):
        database.run("UPDATE chunks SET content = content || ' changed' WHERE id = 3")
        assert one.write(window) == (9 if times == 1 else 0)
        assert two.waits() is not None
        window = one.read()
        assert window.ids == ["3"]
    assert window.texts == [None]
    assert window.reasons == {
        0: "4 times its text changed meanwhile, or a trigger or row policy kept its vector out"
    }
    one.die()
    window = two.read()
    assert window.texts == [f"{texts_of(3)[2]}{' changed' * store.ROUNDS}"]
    assert two.write(window) == 1
    assert two.store.read() is None


def test_a_deadlock_with_somebody_else_is_tried_again(jobs: Callable[..., Job], database: Database) -> None:
    """Who has the second row and wants the first, and is patient."""
    job = jobs()
    window = job.read()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s) AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as thread, psycopg.connect(database.url) as other:
        other.execute("SET deadlock_timeout = '100 s'")
        other.execute("UPDATE chunks SET content = content WHERE id = 2")
        written = thread.submit(job.write, window)
        until(lambda: database.run(waiting, [job.sessions]) == [(1,)])
        other.execute("UPDATE chunks SET content = content WHERE id = 1")
        other.commit()
        assert written.result(60) == 10
    assert database.run("SELECT count(embedding) FROM chunks") == [(10,)]


def test_stacks_of_unlike_builds_are_refused(gateway: Gateway, database: Database) -> None:
    fill(database, ["a"])
    with Gateway() as other:
        words = [database.url, "--table", "chunks", "--text", "content", "--url", gateway.url, other.url]
        run(*words)
        other.graph = "another"
        assert_one_sentence(run(*words, status=1), "their vectors do not mix")
        other.shutdown()


def test_another_job_with_other_vectors_is_refused(
    jobs: Callable[..., Job], gateway: Gateway, database: Database
) -> None:
    """Before the first has written anything that would tell."""
    jobs()
    words = [database.url, "--table", "chunks", "--text", "content", "--url", gateway.url]
    assert_one_sentence(run(*words, status=1), "another job is filling public.chunks.embedding")


def test_the_help_is_one_screen() -> None:
    done = subprocess.run(command("--help"), cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 115


CORPUS = {
    "photosynthesis": "Plants make sugar out of light, water and carbon dioxide.",
    "bank": "The central bank raised its interest rates by half a point.",
    "python": "A generator yields values one at a time and keeps its place in between.",
    "rome": "The Roman aqueducts carried water over long distances into the cities.",
    "index": "An index on a column lets the database find rows without reading all of them.",
    "whale": "The blue whale is the largest animal that has ever lived.",
}
QUESTIONS = {
    "how do plants turn light into sugar": "photosynthesis",
    "what did the central bank do to interest rates": "bank",
    "what does a generator yield": "python",
    "how did water get into Roman cities": "rome",
    "how does a database find rows quickly": "index",
    "which animal is the largest": "whale",
}
"""The answer to each, as whoever reads it would say."""


def test_a_question_finds_its_text(stack: Stack, database: Database) -> None:
    """Question, vector, order by pgvector, /rerank of the first 80, among two hundred others; as the page says."""
    database.run("CREATE TABLE chunks (id text PRIMARY KEY, content text)")
    database.run(re.findall(r"```sql\n(CREATE EXTENSION.*?)```", PAGE, re.DOTALL)[0].replace("1024", "384"))
    database.copy(
        "COPY chunks (id, content) FROM STDIN", [*CORPUS.items(), *((f"t{t}", t) for t in texts_of(200))]
    )
    words: list[object] = ["--table", "chunks", "--text", "content", "--url", stack.url("embed", "")]
    assert_one_sentence(asked(database, "which animal", *words, status=1)[1], "no backfill has filled")
    shown_commands = re.findall(r'^make backfill ARGS="postgresql://me@localhost/rag (.*)"$', PAGE, re.MULTILINE)
    assert len(shown_commands) == 2
    assert "206 texts of" in run(database.url, *shown_commands[0].split(), *words[4:])
    assert "built: CREATE INDEX" in run(database.url, *shown_commands[1].split(), *words[4:])
    (shown_search,) = re.findall(r'tools.search postgresql://me@localhost/rag "(.*)" (.*)$', PAGE, re.MULTILINE)
    lines = asked(database, shown_search[0], *shown_search[1].split(), *words[4:])[0].splitlines()
    assert (len(lines), lines[0].split("  ")[1]) == (10, "photosynthesis")
    for question, answer in QUESTIONS.items():
        lines = asked(database, question, *words, "--top", 3)[0].splitlines()
        assert len(lines) == 3
        assert lines[0].split("  ")[1] == answer
    near = [row for (row,) in nearest(stack, database, next(iter(QUESTIONS)))]
    assert len(near) == 80
    scores = stack.rerank(next(iter(QUESTIONS)), [text for _, text in rows_of(database, near)])["scores"]
    shown = asked(database, next(iter(QUESTIONS)), *words, "--top", 80)[0].splitlines()
    assert [float(line.split("  ")[0]) for line in shown] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)


def asked(database: Database, question: str, *words: object, status: int = 0) -> tuple[str, str]:
    """What `python -m tools.search` prints."""
    with redirect_stdout(io.StringIO()) as shown, redirect_stderr(io.StringIO()) as said:
        assert search.main([database.url, question, *map(str, words)]) == status, said.getvalue()
    return shown.getvalue(), said.getvalue()


def nearest(stack: Stack, database: Database, question: str) -> list[Any]:
    """By the SQL of the page."""
    (sql,) = re.findall(r"```sql\n(SET hnsw.*?)```", PAGE, re.DOTALL)
    body = {"input": question, "input_type": "query"}
    vector = stack.post("embed", "/v1/embeddings", body).json()["data"][0]["embedding"]
    statement = sql.split(";")[1]
    return database.run(statement.replace("$1", f"'{vector}'").replace("id, content", "id"))


def rows_of(database: Database, ids: list[str]) -> list[Any]:
    return database.run("SELECT id, content FROM chunks WHERE id = ANY(%s)", [ids])


def test_a_question_to_another_model_is_refused(small: Stack, database: Database) -> None:
    fill(database, ["a"])
    run(*chunks(small, database))
    words = ["--table", "chunks", "--text", "content", "--url", small.url("embed", "")]
    assert_one_sentence(
        asked(database, "a", *words, "--model", "roberta", status=1)[1], "holds vectors of bert-cls .* --model"
    )
    assert "1  a" in asked(database, "a", *words)[0]
    assert_one_sentence(asked(database, "", *words, status=1)[1], "the question is empty")


def test_every_command_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", str)  # Ray has an environment of its own
    (tmp_path / "a.parquet").touch()
    lines = re.findall(r'^make backfill ARGS="(.*)"$', PAGE, re.MULTILINE)
    lines += re.findall(r"^\S+ -m tools\.backfill (.*)$", PAGE, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        check(parser().parse_args(shlex.split(line.partition(" <")[0].replace("corpus/", str(tmp_path)))))
    targets = set(re.findall(r"^([a-z./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert (
        set(re.findall(r"^make (\S+)", PAGE, re.MULTILINE))
        == {"serve", "backfill", ".venv-ray/ray.lock"}
        <= targets
    )
