"""A judge behind an OpenAI-compatible server (vLLM, SGLang, transformers serve, ...), by httpx.

Every vote is one request to /chat/completions (not every server knows `n`), so many at a time. What
may pass is tried again, later and later: refused and dropped connections, timeouts, rate limits,
server errors, answers that can't be read. What can't pass stops at once with the server's message,
unless it is one prompt that the server does not take: then its pair is skipped.
What the server does with control tokens in the texts it is sent is its own affair.
"""

import asyncio
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import count
from urllib.parse import urlsplit
from zlib import crc32

from tqdm import tqdm

from nanorrm.config import UserError
from nanorrm.judge.backends import Backend
from nanorrm.judge.prompts import rrm_messages
from nanorrm.judge.verdict import Answer, Refusal
from nanorrm.model.tokenizer import END_THINK

TRIES = 5  # failures that may be the request's own fault, until it is given up
BACKOFF, LONGEST = 0.5, 20.0  # seconds between the first two tries, and the longest
TELL_AFTER = 3.0  # seconds of nothing but failures
BUSY = {"no connection", *(f"http {status}" for status in (408, 425, 429, 502, 503, 504))}
TOO_LONG = re.compile(r"context.?(length|size|window)|maximum.{0,20}length", re.IGNORECASE)


@dataclass(eq=False)
class Failure(Exception):
    """A try that failed and may succeed later."""

    kind: str  # for counting
    wait: float = 0.0  # seconds that the server asked for


class TooLong(Exception):
    """The server says that the prompt does not fit its model."""


class Rejected(UserError):
    """The server does not take the request: its settings, or this one prompt."""


class EndpointBackend(Backend):
    """Judge by the model of a server. `errors` counts failed tries by kind."""

    def __init__(self, url, model=None, concurrency=32, timeout=600.0, patience=600.0):
        """url: up to and with /v1; model: its name there, None for the only one.

        concurrency: requests at once; timeout: seconds for each try; patience: seconds of nothing
        but failures until UserError. The key comes from NANORRM_API_KEY, else OPENAI_API_KEY, and
        goes nowhere but into the requests' header.
        """
        try:
            import httpx
        except ImportError:
            raise UserError("an endpoint needs httpx: pip install httpx") from None
        self.httpx, self.url = httpx, url.rstrip("/")
        try:
            fine = re.fullmatch(r"https?://[^/@\s]+(/\S*)?", url) and urlsplit(url).port != 0
        except ValueError:  # a port beyond 65535
            fine = False
        if not fine:
            raise UserError("endpoint: the address should look like http://host:8000/v1")
        self.concurrency, self.timeout, self.patience = concurrency, timeout, patience
        self.errors = Counter()
        self.failing_since, self.resume_at = None, 0.0  # on the monotonic clock
        self.told = False  # of the present series of failures
        self.name = model or run(self._only_model)

    def prompt(self, query, a, b, template, think):
        """Chat messages."""
        if template != "rrm":
            raise UserError(f"template {template!r}: an endpoint is asked by the rrm prompt")
        return rrm_messages(query, a, b)

    def ask(self, requests, params, heard, progress=None):
        """Send all, hear them as they come; works within a running event loop too."""
        if params.max_think_tokens is not None:
            raise UserError("max_think_tokens: an endpoint can't close the thinking; leave it out")
        self.failing_since, self.resume_at = None, 0.0
        run(self._ask, requests, params, heard, progress)

    # -- sending

    def _client(self):
        key, n = api_key(), self.concurrency
        return self.httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.timeout,
            limits=self.httpx.Limits(max_connections=n, max_keepalive_connections=n),
            verify=self.url.startswith("https"),  # else the certificates are not even read
        )

    async def _only_model(self):
        """The model the server serves, where there is one."""
        async with self._client() as client:
            reply = await self._persist(client)
        try:
            names = [model["id"] for model in reply["data"]]
        except (KeyError, TypeError):
            names = []
        if len(names) != 1:
            found = f"serves {', '.join(map(str, names[:20]))}" if names else "names no models"
            raise UserError(f"{self.url} {found}: choose by --api-model NAME")
        return names[0]

    async def _ask(self, requests, params, heard, progress):
        queue, n = iter(requests), len(requests)
        quiet = True if progress is None else None  # None: quiet unless stderr is a terminal

        async def work():
            for request in queue:
                heard(request, await self._persist(client, self._body(request, params)))
                bar.update(1)
                if self.errors:
                    bar.set_postfix(self.errors, refresh=False)

        try:
            with tqdm(total=n, desc=progress, leave=False, disable=quiet) as bar:
                async with self._client() as client, asyncio.TaskGroup() as workers:
                    for _ in range(min(self.concurrency, n)):
                        workers.create_task(work())
        except ExceptionGroup as group:  # the first error stops all
            raise group.exceptions[0] from None

    def _body(self, request, params):
        """What is sent for one vote; the seed differs by vote, in 31 bits."""
        names = ("max_tokens", "temperature", "top_p")
        return {
            "model": self.name,
            "messages": request.prompt,
            **{name: getattr(params, name) for name in names},
            "seed": crc32(f"{params.seed}/{request.sample}".encode()) >> 1,
        }

    async def _persist(self, client, body=None):
        """`_send` until something comes.

        That is a Refusal where the server says that the prompt is too long, or where it rejects
        this one, or fails on it TRIES times, but takes another under the same settings.
        """
        errors, own = Counter(), 0
        for tried in count():
            await self._keep_pause()
            try:
                came = await self._send(client, body)
            except TooLong as error:
                came = Refusal(f"too long for the server's model: {error}", too_long=True)
            except Rejected as error:
                if not await self._takes_another(client, body):
                    raise
                came = Refusal(f"the server refused this one: {error}")
            except Failure as failure:
                errors[failure.kind] += 1
                self._be_patient(failure)
                own += failure.kind not in BUSY
                if own < TRIES or not await self._takes_another(client, body):
                    own %= TRIES
                    wait = min(LONGEST, BACKOFF * 2 ** min(tried, 10)) * random.uniform(0.5, 1)
                    await asyncio.sleep(max(wait, failure.wait))
                    continue
                last = f"{TRIES} times (last: {failure.kind}) while it answered others"
                came = Refusal(f"the server failed {last}")
            self.failing_since, self.told = None, False
            if body:
                came.errors = dict(errors)
            return came

    async def _keep_pause(self):
        """Wait while the server has asked for a pause: all keep it, and come back one by one."""
        if (pause := self.resume_at - time.monotonic()) > 0:
            await asyncio.sleep(pause + random.random() * min(1.0, pause))

    async def _takes_another(self, client, body):
        """Whether the server answers a trivial request under the same settings."""
        try:
            other = {**body, "messages": [{"role": "user", "content": "Hi"}]} if body else None
            return bool(other and await self._send(client, other))
        except (Failure, TooLong):
            return False

    def _be_patient(self, failure):
        """Note a failure; UserError if there was nothing else for too long."""
        self.errors[failure.kind] += 1
        now, wait, most = time.monotonic(), failure.wait, f"{self.patience:.0f}"
        if wait > self.patience:
            raise UserError(f"{self.url} asks to wait {wait:.0f} s, longer than --patience {most}")
        if wait:
            self.resume_at = max(self.resume_at, now + wait)
        self.failing_since = self.failing_since or now
        if now - self.failing_since > TELL_AFTER and not self.told:
            self.told = True
            tqdm.write(f"{self.url}: {failure.kind}; trying again", file=sys.stderr)
        if now - self.failing_since > self.patience:
            counts = ", ".join(f"{kind} {n}" for kind, n in self.errors.most_common())
            raise UserError(f"{self.url}: nothing but failures for {most} s ({counts})")

    async def _send(self, client, body):
        """One try -> Answer to a chat's body, or the parsed list of models if that is None.

        Raises Failure, TooLong, or UserError if none can work.
        """
        httpx, path = self.httpx, "/chat/completions" if body else "/models"
        try:
            reply = await client.request("POST" if body else "GET", self.url + path, json=body)
        except httpx.TimeoutException:
            raise Failure("timeout") from None
        except httpx.ConnectError:
            raise Failure("no connection") from None
        except httpx.TransportError:
            raise Failure("dropped") from None
        except httpx.DecodingError:
            raise Failure("malformed") from None
        if reply.status_code != 200:
            raise self._meaning(reply, path)
        try:
            parsed = reply.json()
        except (ValueError, RecursionError):
            raise Failure("malformed") from None
        return read_answer(parsed, reply.elapsed.total_seconds()) if body else parsed

    def _meaning(self, reply, path):
        """The exception for an HTTP status other than 200."""
        status, said, key = reply.status_code, message_of(reply), api_key()
        said = (said.replace(key, "***") if key else said)[:300]  # some servers quote the key
        if status == 413 or TOO_LONG.search(said):
            return TooLong(said)
        if (kind := f"http {status}") in BUSY or status >= 500:
            return Failure(kind, retry_after(reply.headers.get("retry-after", "")))
        hint = ""
        if status in (401, 403):
            hint = "; the key is read from NANORRM_API_KEY or OPENAI_API_KEY"
        elif status in (404, 405):
            hint = "; the address usually ends in /v1, and --api-model names the model"
        elif 300 <= status < 400:
            hint = f"; it redirects to {reply.headers.get('location', 'nowhere')}"
        error = Rejected if status in (400, 422) else UserError
        return error(f"{self.url}{path}: HTTP {status}: {said}{hint}")


def api_key():
    """The key from the environment, or "" if there is none."""
    key = (os.environ.get("NANORRM_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("the API key in the environment holds characters that no key has")
    return key


def read_answer(reply, seconds=0.0):
    """A parsed reply -> Answer, thinking and content joined. Raises Failure if a part is missing.

    vLLM and SGLang may hand the thinking in a field of its own. Where the server does not count
    thinking tokens, they are estimated by the share of its characters.
    """
    try:
        choice = reply["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        content = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        usage = reply.get("usage") or {}
        tokens, read = usage.get("completion_tokens") or 0, usage.get("prompt_tokens") or 0
        thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
        texts = (content, thought, reason)
        if not all(isinstance(x, str) for x in texts) or not isinstance(tokens + read, int):
            raise TypeError
    except (LookupError, TypeError, AttributeError):
        raise Failure("fields missing") from None
    text = thought + END_THINK + content if thought and content else thought or content
    if thinking is None:
        before, closed, _ = text.rpartition(END_THINK)
        share = len(before if closed else thought) / max(1, len(text))
        thinking = round(tokens * share)
    return Answer(text, reason, tokens, thinking, read, seconds)


def message_of(reply):
    """What the server says about an error, in one line."""
    try:
        said = reply.json()
        error = said.get("error") or said.get("detail") or said.get("message")
        said = (error.get("message") if isinstance(error, dict) else error) or said
    except (ValueError, AttributeError, RecursionError):
        said = reply.text
    return " ".join(str(said).split()) or reply.reason_phrase


def retry_after(header):
    """Seconds that a Retry-After header (seconds, or an HTTP date) asks to wait; 0 if unreadable.

    >>> retry_after("1.5"), retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), retry_after("soon")
    (1.5, 0.0, 0.0)
    """
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, wait) if wait < float("inf") else 0.0


def run(function, *args):
    """Await function(*args) in a thread of its own: in a notebook a loop runs here already.

    Ctrl-C, which comes to this thread, cancels it there.
    """
    from anyio.from_thread import start_blocking_portal  # comes with httpx

    with start_blocking_portal() as portal:
        return portal.call(function, *args)
