"""Ask an HTTP server: check its address and the key, send the requests of one call, try again, read the JSON answers.

What is asked, and what the answers mean, is up to the caller (`http`). Nothing is kept between calls.
"""
from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from frpo.errors import RewardError

LONGEST_PAUSE_S = 30.0
"""Most seconds between two tries of a request, whatever the server asks for."""

Result = TypeVar("Result")
Body = Mapping[str, Any]

logger = logging.getLogger(__name__)

_AGAIN = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)
_SECRET = re.compile(
    r"(key|token|secret|passw(or)?d|pwd|auth|authorization|credentials?|sig|signature)(?![a-z])|^code$", re.IGNORECASE)
_REMEDY = "put the key into an environment variable and name this variable in key_env"
_JITTER = random.Random()  # not the global generator, which a user's own reward may have seeded


class UnexpectedError(Exception):
    """Error of a reader of answers: the answer has another form. The text says what is expected."""


Reader = Callable[[Any, Body], Result]
"""Function of an answer (JSON, decoded) and of the body that was sent."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Address to ask, and how. For the fields see `http`. path: added to the path of `url` unless it ends so already.

    Raises RewardError for a wrong field, for an address with a secret and for a missing key.
    """

    url: str = field(repr=False)
    path: str = ""
    key_env: str | None
    max_concurrent: int
    timeout_s: float
    retries: int
    backoff_s: float
    partial: bool = False

    def __post_init__(self) -> None:
        check_number("max_concurrent", self.max_concurrent, 1, whole=True)
        check_number("retries", self.retries, 0, whole=True)
        check_number("timeout_s", self.timeout_s, 0.001)
        check_number("backoff_s", self.backoff_s, 0)
        self._address(), self._key()

    @property
    def label(self) -> str:
        """The address without its query, for messages."""
        return str(self._address().copy_with(query=None, fragment=None))

    def quoted(self, text: str) -> str:
        """Return the first 80 characters in quotes, without the key."""
        return repr(self._hidden(text)[:80])

    async def ask(self, bodies: Sequence[Body], read: Reader[Result]) -> list[Result | None]:
        """Send each body and return what `read` makes of its answer, in order.

        The first error cancels the others. With `partial` a failed request gives None, and a warning counts these; if
        all fail, the first error is raised.
        """
        contents = [_encoded(body) for body in bodies]
        _quiet(logging.getLogger("httpx"))
        turn = asyncio.Semaphore(self.max_concurrent)

        failed: list[RewardError] = []

        async def one(body: Body, content: bytes) -> Result | None:
            async with turn:
                try:
                    return self._read(await self._answer(client, content), body, read)
                except RewardError as error:
                    failed.append(error)
                    if not self.partial or len(failed) == len(bodies):
                        raise
                    return None

        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as tasks:
                    running = [tasks.create_task(one(*pair)) for pair in zip(bodies, contents, strict=True)]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        if failed:
            logger.warning("%d of %d requests failed, the first: %s; their completions abstain", len(failed),
                           len(bodies), failed[0])
        return [task.result() for task in running]

    def _hidden(self, text: str) -> str:
        """Hide the key, which some servers repeat in an answer."""
        key = self._key()
        return text if key is None else text.replace(key, "[key]")

    def _client(self) -> httpx.AsyncClient:
        key = self._key()
        headers = {"Content-Type": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}
        limits = httpx.Limits(max_connections=self.max_concurrent)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=None)  # httpx's limits are for each read

    async def _answer(self, client: httpx.AsyncClient, content: bytes) -> httpx.Response:
        for number in range(self.retries + 1):
            result = await self._try(client, content)
            if isinstance(result, httpx.Response):
                return result
            failure = result
            if not failure.again or number == self.retries:
                break
            await asyncio.sleep(self._pause_s(number, failure.pause_s))
        raise RewardError(f"{self.label} {failure.what} (try {number + 1} of {self.retries + 1}); {failure.advice}")

    async def _try(self, client: httpx.AsyncClient, content: bytes) -> httpx.Response | _Failure:
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await client.post(self._address(), content=content)
        except TimeoutError:
            return _Failure(what=f"gave no whole answer within timeout_s = {self.timeout_s:g} s",
                            advice="make the server faster, or raise timeout_s, and rewards[].timeout_s above it")
        except httpx.HTTPError as error:
            return _Failure(what=f"could not be asked: {type(error).__name__} ({self.quoted(str(error))})",
                            advice="check url, and that the server runs", again=isinstance(error, _AGAIN))
        status = response.status_code
        if response.is_success:
            return response
        advice = "expected is status 200; check the server and the reward's kwargs"
        if status in (401, 403):
            advice = f"check the key in {self.key_env}" if self.key_env else f"if it needs a key, {_REMEDY}"
        return _Failure(what=f"answered status {status}: {self.quoted(response.text)}", advice=advice,
                        again=status == 429 or status >= 500, pause_s=_asked_s(response.headers.get("Retry-After", "")))

    def _pause_s(self, number: int, asked_s: float) -> float:
        own_s = self.backoff_s * 2.0 ** min(number, 16) * _JITTER.uniform(0.5, 1.5)
        return min(max(own_s, asked_s), LONGEST_PAUSE_S)

    def _read(self, response: httpx.Response, body: Body, read: Reader[Result]) -> Result:
        try:
            return read(_decoded(response.content), body)
        except UnexpectedError as error:
            raise RewardError(f"{self.label} answered status {response.status_code} with "
                              f"{self.quoted(response.text)}; expected is {self._hidden(str(error))}") from None

    def _address(self) -> httpx.URL:
        # No message shows the address itself, which may hold a secret.
        try:
            url = httpx.URL(self.url)
        except (httpx.InvalidURL, TypeError) as error:
            raise RewardError(f"url is no valid address ({type(error).__name__}); give one such as "
                              "http://127.0.0.1:8000/score") from None
        if url.userinfo:
            raise RewardError(f"url holds a user name or a password before @; remove it, {_REMEDY}")
        if url.scheme not in ("http", "https") or not url.host:
            raise RewardError("url must begin with http:// or https:// and a host, such as http://127.0.0.1:8000/score")
        secrets = [name for name in url.params if _SECRET.search(name)]
        if secrets:
            raise RewardError(f"url has the query parameter {secrets[0]!r}, which looks like a secret; remove it, "
                              f"{_REMEDY}")
        start = url.path.rstrip("/")
        return url.copy_with(path=start + self.path) if self.path and not start.endswith(self.path) else url

    def _key(self) -> str | None:
        name = self.key_env
        if name is None:
            return None
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            raise RewardError("key_env is no name of an environment variable; give a name such as JUDGE_API_KEY, and "
                              "never the key itself")  # so the message does not show it
        key = os.environ.get(name, "").strip()
        if not key:
            raise RewardError(f"the environment variable {name} (key_env) is missing or empty; set it where the run "
                              "starts, or remove key_env")
        if not re.fullmatch(r"[!-~]+", key):
            raise RewardError(f"the environment variable {name} (key_env) has blanks, control characters or non-ASCII "
                              "characters inside, which no HTTP header can send; set it to the key alone")
        return key


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """A try without an answer. again: whether to try again, after `pause_s` at least."""

    what: str
    advice: str
    again: bool = True
    pause_s: float = 0.0


def check_number(name: str, value: Any, least: float, whole: bool = False) -> None:
    """Raise RewardError unless the argument is a number, or a whole number, of at least `least`."""
    if not is_number(value) or not value >= least or (whole and not isinstance(value, int)):
        kind = "a whole number" if whole else "a number"
        raise RewardError(f"{name} must be {kind} of at least {least:g}, given {value!r:.80}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _quiet(log: logging.Logger) -> None:
    """Hide what httpx logs at INFO: each address with its query."""
    log.setLevel(max(log.level, logging.WARNING))


def _asked_s(header: str) -> float:
    """Return the seconds of a Retry-After header, which is a number or a date; 0 if it is missing or unreadable."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", header):
        return float(header)
    try:
        return parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return 0.0


def _encoded(body: Body) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(f"a request cannot be written as JSON: {error}; check the kwargs and columns that it sends"
                          ) from None


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise UnexpectedError("JSON") from None
