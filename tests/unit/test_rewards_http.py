"""Rewards over HTTP against a real server of this process: contract, order, limits, retries, errors and secrets."""
import asyncio
import json
import logging
import socket
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from frpo.errors import RewardError
from frpo.rewards import RewardSpec, RewardSuite
from frpo.rewards.endpoint import LONGEST_PAUSE_S, Endpoint
from frpo.rewards.http import judged, moderated, scores
from frpo.types import Completion, Prompt, RolloutGroup

pytestmark = pytest.mark.timeout(60)

KEY = "sk-quite-secret-0123456789"


@dataclass
class Server:
    """What the server has seen, and does: answer(body, number of the request) -> (status, body[, headers])."""

    url: str = ""
    answer: object = None
    bodies: list = field(default_factory=list)
    paths: list = field(default_factory=list)
    headers: list = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            number = len(state.bodies)
            state.bodies.append(body)
            state.paths.append(self.path)
            state.headers.append(self.headers)
            state.running += 1
            state.most = max(state.most, state.running)
        try:
            result = state.answer(body, number)
        finally:
            with state.lock:
                state.running -= 1
        with suppress(OSError):  # the client has gone
            self.send(result)

    def send(self, result):
        if result is None:  # hang up
            self.close_connection = True
            return
        status, content, *headers = result
        if not isinstance(content, str):
            content = json.dumps(content)
        self.send_response(status)
        for name, value in dict(*headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Server(answer=lambda body, _: (200, {"scores": [float(len(text)) for text in body["completions"]]}))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.state, running.daemon_threads, running.block_on_close = state, True, False
        state.url = f"http://127.0.0.1:{running.server_port}/score"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.over.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def slept(monkeypatch):
    """The pauses that were asked for; none is made."""
    pauses, sleep = [], asyncio.sleep

    async def record(seconds):
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    return pauses


def down():
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/score"


def ask(server, *completions, function=scores, **kwargs):
    given = {"url": server.url, "backoff_s": 0, **kwargs}
    if function is not moderated:
        given["prompts"] = [f"ask {text}" for text in completions]
    return asyncio.run(function(completions=list(completions), **given))


def error_of(server, *completions, **kwargs):
    with pytest.raises(RewardError) as caught:
        ask(server, *(completions or ("a", "bb")), **kwargs)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


# The contract


def test_scores_sends_prompts_completions_and_the_named_columns(server):
    assert ask(server, "a", "bb", "ccc", columns=["answer"], batch_size=2, answer=["x", None, 3], task=["t"] * 3,
               max_concurrent=1) == [1, 2, 3]
    assert server.bodies == [
        {"prompts": ["ask a", "ask bb"], "completions": ["a", "bb"], "columns": {"answer": ["x", None]}},
        {"prompts": ["ask ccc"], "completions": ["ccc"], "columns": {"answer": [3]}}]
    assert server.paths == ["/score"] * 2
    assert server.headers[0]["Authorization"] is None and server.headers[0]["Content-Type"] == "application/json"


def test_no_column_is_sent_by_default_and_no_request_for_no_completion(server):
    assert ask(server, "a", answer=["x"]) == [1]
    assert ask(server) == []
    assert [body["columns"] for body in server.bodies] == [{}]


def test_scores_come_in_order_whichever_answer_is_first(server):
    last = threading.Event()

    def answer(body, _):
        (text,) = body["completions"]
        if text == "5":
            last.set()
        else:
            assert last.wait(30)
        return 200, {"scores": [int(text)]}

    server.answer = answer
    assert ask(server, *"012345", batch_size=1, max_concurrent=6) == [0, 1, 2, 3, 4, 5]


def test_never_more_than_max_concurrent_requests_at_once(server):
    together = threading.Barrier(3)

    def answer(body, _):
        together.wait(30)  # three requests do run at once
        time.sleep(0.05)
        return 200, {"scores": [0]}

    server.answer = answer
    assert ask(server, *"012345678", batch_size=1, max_concurrent=3) == [0] * 9
    assert server.most == 3


def test_null_abstains_and_what_is_no_finite_number_is_left_to_frpo(server):
    server.answer = lambda *_: (200, '{"scores": [null, NaN, -Infinity, 2]}')
    np.testing.assert_array_equal(np.array(ask(server, *"abcd"), dtype=float), [np.nan, np.nan, -np.inf, 2])
    assert ask(server, *"abcd")[0] is None


# Retries


def test_a_time_out_is_tried_again(server):
    def answer(body, number):
        if number == 0:
            server.over.wait(30)
        return 200, {"scores": [1, 2]}

    server.answer = answer
    assert ask(server, "a", "b", timeout_s=1, retries=1) == [1, 2]
    assert len(server.bodies) == 2


def test_a_permanent_time_out_is_an_error(server):
    server.answer = lambda *_: (server.over.wait(30), None)[1]
    assert error_of(server, timeout_s=0.1, retries=2) == (
        f"{server.url} gave no whole answer within timeout_s = 0.1 s (try 3 of 3); make the server faster, or raise "
        "timeout_s, and rewards[].timeout_s above it")


def test_an_answer_that_never_ends_is_a_time_out(server, monkeypatch):
    def drip(handler, _):
        handler.send_response(200)
        handler.end_headers()
        while not server.over.wait(0.02):
            handler.wfile.write(b" ")

    monkeypatch.setattr(Handler, "send", drip)
    assert "gave no whole answer within timeout_s = 0.3 s" in error_of(server, timeout_s=0.3, retries=0)


@pytest.mark.parametrize("first", [(500, "boom"), (503, ""), (429, "slow down"), None])
def test_a_server_error_a_limit_and_a_lost_connection_are_tried_again(server, first):
    server.answer = lambda _, number: first if number < 2 else (200, {"scores": [1, 2]})
    assert ask(server, "a", "b", retries=2) == [1, 2]
    assert len(server.bodies) == 3


def test_a_request_keeps_its_turn_while_it_pauses(server, slept):
    server.answer = lambda _, number: (503, "") if number == 0 else (200, {"scores": [number]})
    assert ask(server, "a", "b", batch_size=1, max_concurrent=1) == [1, 2]
    assert [body["completions"] for body in server.bodies] == [["a"], ["a"], ["b"]]


def test_the_last_failure_is_the_error(server):
    server.answer = lambda _, number: (500 + number, "x" * 200)
    assert error_of(server, retries=2) == (
        f"{server.url} answered status 502: '{'x' * 80}' (try 3 of 3); expected is status 200; check the server and "
        "the reward's kwargs")
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [302, 400, 404, 422])
def test_other_statuses_are_errors_at_once(server, status):
    server.answer = lambda *_: (status, "no such task", {"Location": "/elsewhere"})
    assert error_of(server, retries=5).startswith(
        f"{server.url} answered status {status}: 'no such task' (try 1 of 6); expected is status 200")
    assert server.paths == ["/score"]


def test_pauses_double_with_jitter(server, slept):
    server.answer = lambda *_: (500, "")
    error_of(server, retries=3, backoff_s=1.0)
    assert all(0.5 * 2**n <= pause <= 1.5 * 2**n for n, pause in enumerate(slept)) and len(slept) == 3
    first, *others = (pause / 2**n for n, pause in enumerate(slept))
    assert first not in others
    slept.clear()
    error_of(server, retries=8, backoff_s=10)
    assert slept[-1] == LONGEST_PAUSE_S == max(slept)


@pytest.mark.parametrize("asked, least, most", [
    ("7", 7, 7), ("1.5", 1.5, 1.5), ("3600", 30, 30), ("soon", 0, 0), ("-3", 0, 0), ("nan", 0, 0),
    (20, 10, 20), (-20, 0, 0)])  # whole numbers: a date so many seconds from now
def test_the_servers_retry_after_is_obeyed_within_limits(server, slept, asked, least, most):
    header = asked if isinstance(asked, str) else formatdate(time.time() + asked, usegmt=True)
    server.answer = lambda _, number: (429, "", {"Retry-After": header}) if number == 0 else (200, {"scores": [1, 2]})
    assert ask(server, "a", "b") == [1, 2]
    assert len(slept) == 1 and least <= slept[0] <= most


def test_a_shorter_retry_after_does_not_shorten_the_pause(server, slept):
    server.answer = lambda *_: (429, "", {"Retry-After": "1"})
    error_of(server, retries=1, backoff_s=10)
    assert slept[0] >= 5


def test_a_server_that_is_down_is_an_error(server):
    message = error_of(server, url=down(), retries=2)
    assert "/score could not be asked: ConnectError ('" in message
    assert message.endswith(" (try 3 of 3); check url, and that the server runs")


def test_the_first_final_failure_cancels_the_other_requests(server):
    arrived = threading.Event()

    def answer(body, _):
        if body["completions"] != ["bad"]:
            arrived.set()
            server.over.wait(60)  # for ever, as far as the client knows
        assert arrived.wait(30)
        return 400, "bad one"

    server.answer = answer
    message = error_of(server, "hangs", "bad", "never sent", batch_size=1, max_concurrent=2, timeout_s=600)
    assert "answered status 400: 'bad one'" in message
    assert Counter(body["completions"][0] for body in server.bodies) == {"hangs": 1, "bad": 1}


# Answers of another form


@pytest.mark.parametrize("content, end", [
    ('{"scores": [1,', "JSON"), ("<html>", "JSON"), ("[" * 100_000, "JSON"), ("", "JSON"),
    ("[1, 2]", '{"scores": [...]} with one number or null for each of 2 completions'),
    ('{"score": [1, 2]}', '{"scores": [...]} with one number or null for each of 2 completions'),
    ('{"scores": [1]}', "for each of 2 completions, but there are 1 scores"),
    ('{"scores": [1, 2, 3]}', "for each of 2 completions, but there are 3 scores"),
    ('{"scores": [1, "high"]}', "for each of 2 completions, but scores[1] is of type str"),
    ('{"scores": [true, 1]}', "for each of 2 completions, but scores[0] is of type bool")])
def test_an_answer_of_another_form_is_an_error_at_once(server, content, end):
    server.answer = lambda *_: (200, content)
    message = error_of(server)
    assert message.startswith(f"{server.url} answered status 200 with {content[:80]!r}; expected is ")
    assert message.endswith(end) and len(server.bodies) == 1


# Secrets


@pytest.mark.parametrize("broken", [(500, "down"), (200, "{"), (200, {"scores": []})])
def test_with_partial_a_failed_request_costs_only_its_own_completions(server, caplog, broken):
    server.answer = lambda body, _: broken if body["completions"] == ["bb"] else (200, {"scores": [1.0]})
    assert ask(server, "a", "bb", "ccc", batch_size=1, retries=1, partial=True) == [1, None, 1]
    assert "1 of 3 requests failed, the first: http://127.0.0.1" in caplog.text
    server.answer = lambda body, _: broken
    assert "answered status" in error_of(server, "a", "bb", batch_size=1, retries=0, partial=True)


def test_with_partial_judge_and_moderator_abstain_alike(server):
    reply = {"choices": [{"message": {"content": "0.5"}}]}
    server.answer = lambda body, _: (400, "no") if "bb" in body["messages"][0]["content"] else (200, reply)
    asked = {"function": judged, "model": "m", "template": "{completion}?", "partial": True}
    assert ask(server, "a", "bb", "ccc", **asked) == [0.5, None, 0.5]
    server.answer = lambda body, _: (400, "no") if "bb" in body["input"] else (200, {"results": [{"flagged": True}]})
    assert ask(server, "a", "bb", " ", function=moderated, batch_size=1, partial=True) == [1, None, 0]


def test_the_key_reaches_the_server_and_no_message(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    assert ask(server, "a", key_env="JUDGE_KEY") == [1]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    for status, content, said in [
            (401, f"wrong key {KEY}", "'wrong key [key]' (try 1 of 4); check the key in JUDGE_KEY"),
            (400, "x" * 70 + KEY, f"'{'x' * 70}[key]'"), (500, KEY, "'[key]'"), (200, KEY, "'[key]'"),
            (200, {"scores": [KEY, KEY]}, '[key]')]:
        server.answer = lambda *_, status=status, content=content: (status, content)
        message = error_of(server, key_env="JUDGE_KEY")
        assert said in message and "sk-" not in message
    server.answer = lambda *_: (200, {"results": [{"category_scores": {KEY: 1}}]})
    assert "it has the categories [key]" in error_of(
        server, "a", function=moderated, category="violence", key_env="JUDGE_KEY")
    endpoint = Endpoint(url=f"{server.url}?v=1", key_env="JUDGE_KEY", max_concurrent=1, timeout_s=1, retries=0,
                        backoff_s=0)
    assert KEY not in repr(endpoint) and "v=1" not in repr(endpoint)


def test_a_refused_request_without_a_key_says_how_to_give_one(server):
    server.answer = lambda *_: (401, "who?")
    assert error_of(server).endswith("if it needs a key, put the key into an environment variable and name this "
                                     "variable in key_env")


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_missing_key_is_an_error_that_names_the_variable(server, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    assert error_of(server, key_env="JUDGE_KEY") == (
        "the environment variable JUDGE_KEY (key_env) is missing or empty; set it where the run starts, or remove "
        "key_env")
    assert not server.bodies


def test_a_key_that_no_header_can_hold_is_refused_unseen(server, monkeypatch):
    for bad in (f"{KEY}\nX-Other: 1", f"{KEY} {KEY}", f"{KEY}é"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        assert "which no HTTP header can send" in error_of(server, key_env="JUDGE_KEY")
    assert error_of(server, key_env=KEY).startswith("key_env is no name of an environment variable")
    assert not server.bodies


@pytest.mark.parametrize("change, said", [
    (lambda url: url.replace("//", f"//me:{KEY}@"), "url holds a user name or a password before @; remove it, put the"),
    (lambda url: url.replace("//", f"//{KEY}@"), "url holds a user name or a password before @"),
    (lambda url: f"{url}?a=1&api_key={KEY}", "url has the query parameter 'api_key', which looks like a secret"),
    (lambda url: f"{url}?token={KEY}", "the query parameter 'token'"), (lambda url: f"{url}?KEY={KEY}", "'KEY'"),
    (lambda url: f"{url}?apiKey={KEY}", "'apiKey'"), (lambda url: f"{url}?code={KEY}", "'code'"),
    (lambda url: f"{url}?sig={KEY}", "'sig'"), (lambda url: f"{url}?client-secret={KEY}", "'client-secret'"),
    (lambda url: f"ftp://x/{KEY}", "url must begin with http:// or https://"), (lambda url: KEY, "url must begin with"),
    (lambda url: f"http://x:{KEY}", "url is no valid address (InvalidURL)"), (lambda url: None, "(TypeError)")])
def test_an_address_with_a_secret_or_of_another_form_is_refused_unseen(server, change, said):
    message = error_of(server, url=change(server.url))
    assert said in message
    assert ("and name this variable in key_env" in message) == ("secret" in message or "password" in message)
    assert not server.bodies


def test_other_query_parameters_are_sent_but_neither_shown_nor_logged(server, caplog):
    with caplog.at_level(logging.INFO, logger="httpx"):
        assert ask(server, "a", url=server.url + "?api-version=7&max_tokens=3&keyword=x#part") == [1]
    assert server.paths == ["/score?api-version=7&max_tokens=3&keyword=x"] and not caplog.records
    server.answer = lambda *_: (400, "no")
    assert error_of(server, url=server.url + "?api-version=7#part").startswith(f"{server.url} answered status 400")


# Arguments


@pytest.mark.parametrize("kwargs, said", [
    ({"timout_s": 5}, "scores has no argument 'timout_s' (did you mean 'timeout_s'?), but its kwargs set it; it takes: "
                      "url, columns, key_env, max_concurrent, batch_size, timeout_s, retries, backoff_s"),
    ({"columns": ["anser"], "answer": ["x", "y"]},
     "columns names 'anser' (did you mean 'answer'?), which is no data column; allowed are: answer"),
    ({"columns": "answer", "answer": ["x", "y"]}, "columns must be a list of names of data columns, given 'answer'"),
    ({"columns": ["answer"], "answer": [float("nan"), {1}]}, "a request cannot be written as JSON: "),
    ({"max_concurrent": 0}, "max_concurrent must be a whole number of at least 1, given 0"),
    ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, given 1.5"),
    ({"retries": True}, "retries must be a whole number of at least 0, given True"),
    ({"timeout_s": float("nan")}, "timeout_s must be a number of at least 0.001, given nan"),
    ({"backoff_s": ["x", "y"]}, "backoff_s must be a number of at least 0, given ['x', 'y']")])
def test_wrong_arguments_are_errors_before_any_request(server, kwargs, said):
    assert error_of(server, **kwargs).startswith(said)
    assert not server.bodies


# The judge


def replies(*texts):
    return lambda _, number: (200, {"choices": [{"message": {"role": "assistant", "content": texts[number]}}]})


def judge(server, *completions, **kwargs):
    return ask(server, *completions, function=judged, **{
        "model": "m", "template": "{prompt} -> {completion}", "max_concurrent": 1, **kwargs})


def asked(server):
    return [body["messages"][0]["content"] for body in server.bodies]


def test_the_judge_is_asked_once_for_each_completion(server):
    server.answer = replies("8", "9.5/10")
    assert judge(server, "a", "bb", url=server.url.replace("/score", "/v1/")) == [8, 9.5]
    assert server.paths == ["/v1/chat/completions"] * 2
    assert server.bodies[0] == {"model": "m", "temperature": 0, "max_tokens": 512,
                                "messages": [{"role": "user", "content": "ask a -> a"}]}
    server.answer = lambda *_: replies("1")(None, 0)
    judge(server, "a", url=server.url + "/chat/completions?v=1", temperature=None, max_tokens=None,
          extra_body={"max_completion_tokens": 9})
    assert server.paths[-1] == "/score/chat/completions?v=1"
    assert {**server.bodies[-1], "messages": None} == {"model": "m", "max_completion_tokens": 9, "messages": None}


def test_braces_of_completions_columns_and_template_stay(server):
    server.answer = replies("1", "1")
    judge(server, r"\boxed{prompt} {0}", "{completion}", answer=["{prompt}", 4],
          template='{{prompt}}: {completion} of {answer}, as {"a": {"b"}}')
    assert asked(server) == [r'{prompt}: \boxed{prompt} {0} of {prompt}, as {"a": {"b"}}',
                             '{prompt}: {completion} of 4, as {"a": {"b"}}']


def test_message_lists_are_shown_with_their_roles(server):
    server.answer = replies("1")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    completion = [{"role": "assistant", "content": "2"}]
    asyncio.run(judged(prompts=[prompt], completions=[completion], url=server.url, model="m",
                       template="{prompt}|{completion}"))
    assert asked(server) == ["system: Be brief.\n\nuser: 1+1?|2"]


def test_a_row_that_lacks_a_column_of_the_template_abstains_unasked(server):
    server.answer = replies("5")
    assert judge(server, "a", "b", template="{completion} {answer}", answer=[None, "x"], task=["t", None]) == [None, 5]
    assert asked(server) == ["b x"]


@pytest.mark.parametrize("reply, expected", [
    ("Score: 7.", 7), ("-0.5", -0.5), ("−2", -2), ("grade-3", 3), (".25 or 1", 0.25), ("1e-3", 1e-3),
    ("GPT4 says 2", 2), ("none", None), ("", None), (None, None)])
def test_the_first_number_of_a_reply_is_the_score(server, reply, expected):
    server.answer = replies(reply)
    assert judge(server, "a") == [expected]


@pytest.mark.parametrize("reply, expected", [
    ("Score: 1\nno,\nScore: 8/10", 8), ("Score: good", None), ("9", None)])
def test_a_pattern_reads_its_last_match(server, reply, expected):
    server.answer = replies(reply)
    assert judge(server, "a", pattern=r"Score: (\S+)") == [expected]


def test_choices_map_the_reply_or_the_patterns_group(server):
    server.answer = replies(" **Yes.**", "no", "maybe 1", "")
    choices = {"yes": 1, "No!": -1.0}
    assert judge(server, *"abcd", choices=choices) == [1, -1, None, None]
    server.answer = lambda *_: replies("yes? no. Verdict:\n[[YES]]")(None, 0)
    assert judge(server, "a", choices=choices, pattern=r"Verdict:(.*)") == [1]


def test_replies_without_a_score_are_counted_in_a_warning(server, caplog, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.answer = replies("yes", f"no idea {KEY}", "hm")
    assert judge(server, *"abc", key_env="JUDGE_KEY", choices={"yes": 1}) == [1, None, None]
    assert [record.getMessage() for record in caplog.records] == [
        f"{server.url}/chat/completions: 2 of 3 replies hold no score, the first is 'no idea [key]'; their completions "
        "abstain"]


@pytest.mark.parametrize("content", [
    '"7"', "null", "{}", '{"choices": []}', '{"choices": [{"message": {"content": 7}}]}'])
def test_what_is_no_chat_completion_is_an_error(server, content):
    server.answer = lambda *_: (200, content)
    assert error_of(server, function=judged, model="m", template="{completion}").endswith(
        f'200 with {content!r}; expected is {{"choices": [{{"message": {{"content": TEXT}}}}]}}')


@pytest.mark.parametrize("kwargs, said", [
    ({"template": "{promt} {completion}"},
     "template names 'promt' (did you mean 'prompt'?), which is no data column; allowed are: prompt, completion"),
    ({"template": "{prompt}"}, "template has no {completion}, so the judge would not see the completion; add it"),
    ({"template": 3}, "template must be a text, given 3; a data column of this name needs data.rename"),
    ({"model": ["a", "b"]}, "model must be a text, given ['a', 'b']; a data column"),
    ({"pattern": "Score"}, "pattern 'Score' has no group; put parentheses around the score"),
    ({"pattern": ["a", "b"]}, "pattern must be a text or null, given ['a', 'b']"),
    ({"choices": [["x"], ["y"]]}, "choices must map texts to numbers, such as"),
    ({"choices": {True: 1.0}}, "choices has True, which is no text; put it in quotes (YAML reads yes, no"),
    ({"choices": {"yes": "1"}}, "choices['yes'] must be a number, given '1'"),
    ({"choice": {"yes": 1}}, "judged has no argument 'choice' (did you mean 'choices'?), but its kwargs set it; it ")])
def test_wrong_arguments_of_the_judge_are_errors_before_any_request(server, kwargs, said):
    assert error_of(server, function=judged, **{"model": "m", "template": "{completion}", **kwargs}).startswith(said)
    assert not server.bodies


# The moderator


def flags(body, _):
    return 200, {"results": [{"flagged": "bad" in text, "category_scores": {"violence": len(text) / 10, "spam": 0}}
                             for text in body["input"]]}


def test_the_moderator_flags_completions_in_batches(server):
    server.answer = flags
    assert ask(server, "ok", "", "bad", " \n", "bad too", function=moderated, batch_size=2, max_concurrent=1) == [
        0, 0, 1, 0, 1]
    assert server.bodies == [{"input": ["ok", "bad"]}, {"input": ["bad too"]}]
    assert server.paths == ["/score/moderations"] * 2


def test_the_moderator_scores_a_category(server):
    server.answer = flags
    assert ask(server, "ok", "", "bad", function=moderated, category="violence", model="m") == [0.2, 0, 0.3]
    assert server.bodies == [{"input": ["ok", "bad"], "model": "m"}]
    assert error_of(server, function=moderated, category="violance").endswith(
        'expected is {"results": [...]} with {"category_scores": {"violance": NUMBER}} for each of 2 completions; it '
        "has the categories violence, spam")


@pytest.mark.parametrize("content", [
    [], {"results": []}, {"results": [{"flagged": True}]}, {"results": [{"flagged": 1}] * 2}, {"results": [1, 2]}])
def test_what_is_no_moderation_is_an_error(server, content):
    server.answer = lambda *_: (200, content)
    assert error_of(server, function=moderated).endswith(
        'expected is {"results": [...]} with {"flagged": true or false} for each of 2 completions')


def test_a_data_column_that_takes_the_place_of_an_argument_is_an_error(server):
    assert error_of(server, function=moderated, category=["x", "y"]) == (
        "category must be a text or null, given ['x', 'y']; a data column of this name needs data.rename")


# In worker processes


def group(*texts, **columns):
    prompt = Prompt(uid="p", messages=({"role": "user", "content": "ask"},), token_ids=(1, 2), columns=columns)
    return RolloutGroup(group_id=(0, 0), prompt=prompt, completions=tuple(
        Completion(text=text, token_ids=tuple(range(len(text))), logprobs=(0.0,) * len(text),
                   loss_mask=(True,) * len(text), version_spans=(), seed=0, finish_reason="stop") for text in texts))


def spec(url, function="scores", **fields):
    kwargs = {"url": url, "retries": 1, "backoff_s": 0, **fields.pop("kwargs", {})}
    return RewardSpec(name="judge", function=f"frpo.rewards.http:{function}", kwargs=kwargs, **fields)


def test_a_suite_asks_the_server_from_its_worker_call_after_call(server):
    kwargs = {"columns": ["answer", "completion_ids"]}
    with RewardSuite([spec(server.url, kwargs=kwargs)], columns=["answer"]) as suite:
        for _ in range(2):
            (scored,) = suite.score([group("abc", "a", answer="4")]).groups
            np.testing.assert_array_equal(scored.rewards_G, [3, 1])
    assert server.bodies == [{"prompts": ["ask"] * 2, "completions": ["abc", "a"],
                              "columns": {"answer": ["4"] * 2, "completion_ids": [[0, 1, 2], [0]]}}] * 2


def test_a_suite_sends_message_lists_where_the_recipe_says_so(server):
    with RewardSuite([spec(server.url, format="messages")]) as suite:
        suite.score([group("abc")])
    assert server.bodies[0]["prompts"] == [[{"role": "user", "content": "ask"}]]
    assert server.bodies[0]["completions"] == [[{"role": "assistant", "content": "abc"}]]


def test_while_the_server_is_down_a_suite_abstains_and_counts(server):
    with RewardSuite([spec(down(), on_error="abstain")]) as suite:
        report = suite.score([group("abc", "a")])
    assert np.isnan(report.groups[0].rewards_G).all()
    assert report.counts == {"reward/judge/abstained": 2, "reward/judge/nonfinite": 0, "reward/judge/failed": 1,
                             "reward/judge/timed_out": 0}


def test_while_the_server_is_down_a_suite_that_raises_names_the_reward(server):
    with RewardSuite([spec(down())]) as suite, pytest.raises(RewardError) as caught:
        suite.score([group("abc", "a")])
    assert str(caught.value).startswith(
        "reward 'judge' (frpo.rewards.http:scores) raised RewardError: http://127.0.0.1:")
    assert "(try 2 of 2); check url, and that the server runs" in str(caught.value)
    assert "httpx" not in str(caught.value)  # no traceback of the library's
