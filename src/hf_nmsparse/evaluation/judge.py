# SPDX-License-Identifier: Apache-2.0
"""A language model behind an OpenAI-compatible server that rates texts, as GPT-4 does for LLM-KICK and MT-Bench."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, JudgeError, UnratedError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_PAUSE = 60.0  # seconds before a further attempt
_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
# After the single-answer grading of MT-Bench (arXiv 2306.05685). LLM-KICK has GPT-4 judge each text beside one of GPT-3.5,
# by the same four measures of a summary; here each model is rated by itself, so that no third one's texts are needed.
_RULES = (
    "Act as an impartial judge and rate how well an AI assistant responded to what it was asked for below. Consider "
    "helpfulness, relevance, accuracy, depth and level of detail; of a summary, consider coherence, consistency, fluency and "
    "relevance. Do not let the length of the response influence you. {reference}Explain your judgement in a few sentences, "
    'then end with a rating on a scale of 1 to 10 in exactly this format: "Rating: [[5]]".'
)
_REFERENCE = "Compare the response with the reference, which is a good one. "


class Judge:
    """Rates a text from 1 to 10 by a chat model.

    Args:
        url (`str`): of the server's API, for example `"https://api.openai.com/v1"`; `/chat/completions` is put behind it.
        model (`str`): name of the chat model there.
        key (`str`, *optional*): API key; by default the environment variable OPENAI_API_KEY. Without one none is sent.
            It is sent to no other server, and written nowhere.
        timeout (`float`): seconds to wait for an answer.
        retries (`int`): further attempts where the server is busy, fails or cannot be reached, each after a longer pause.

    Raises:
        ConfigError: if the URL, the model or the key cannot be one.
    """

    def __init__(self, url: str, model: str, key: str | None = None, timeout: float = 60, retries: int = 3):
        self.url, self.model, self.timeout, self.retries = _checked_url(url), model, timeout, retries
        key = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
        if not (key.isascii() and key.isprintable()):  # http.client would say so, and show it
            raise ConfigError(f"the API key has characters that no key has; check {KEY_VARIABLE}")
        if not model.strip() or timeout <= 0 or retries < 0:
            raise ConfigError(
                f"a judge needs a model's name, a positive timeout and no fewer than 0 retries; got model={model!r}, "
                f"timeout={timeout}, retries={retries}"
            )
        self._key = key
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __repr__(self) -> str:
        return f"Judge(url={self.url!r}, model={self.model!r})"

    def rate(self, question: str, answer: str, reference: str | None = None) -> float:
        """The rating of an answer, from 1 to 10.

        Args:
            question (`str`): what was asked; a conversation, where there was one.
            answer (`str`): what is rated.
            reference (`str`, *optional*): a good answer, shown to the judge.

        Raises:
            JudgeError: if the server cannot be reached, refuses, or goes on failing.
            UnratedError: if its answer holds no rating from 1 to 10.
        """
        parts = {"What was asked": question, "Reference": reference, "Response": answer}
        shown = [f"[{name}]\n{text}\n[End of: {name}]" for name, text in parts.items() if text is not None]
        rules = _RULES.format(reference="" if reference is None else _REFERENCE)
        messages = [{"role": "system", "content": rules}, {"role": "user", "content": "\n\n".join(shown)}]
        said = self._ask({"model": self.model, "messages": messages, "temperature": 0})
        ratings = _RATING.findall(said)
        if not ratings or not 1 <= float(ratings[-1]) <= 10:  # the last: it may quote one that stands in the text
            found = f"the rating {ratings[-1]}" if ratings else "no rating"
            raise UnratedError(
                f"{self.model} gave {found}; expected 'Rating: [[N]]', N from 1 to 10: ...{self._hidden(said)[-120:]!r}"
            )
        return float(ratings[-1])

    def check(self) -> None:
        """Rate something small, so that what is wrong shows before hours of work.

        Raises:
            JudgeError: as `rate`.
        """
        self.rate("What is two plus two?", "Two plus two is four.")

    def _ask(self, asked: dict[str, Any]) -> str:
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        place = f"{self.url}/chat/completions"
        request = urllib.request.Request(place, json.dumps(asked).encode(), headers)
        for attempt in range(self.retries + 1):
            wished = 0.0
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    content = answer.read()
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}{self._details(error)}"
                if error.code not in (408, 429) and error.code < 500:
                    raise JudgeError(f"{place} refused: {reason}") from None  # the cause could show the key
                wished = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                reason = f"no answer ({getattr(error, 'reason', error)})"
            else:
                return _message(content, place)
            if attempt < self.retries:
                pause = min(max(2.0**attempt, wished), _LONGEST_PAUSE)
                logger.warning("%s: %s; asking again in %.0f s", place, reason, pause)
                time.sleep(pause)
        raise JudgeError(
            f"{place}: {reason}, {self.retries + 1} times; check that the server runs there, and the network"
        )

    def _details(self, error: urllib.error.HTTPError) -> str:
        """What a refusal says, and what to do; of one for the key nothing is quoted, because servers quote the key."""
        if error.code in (401, 403):
            return f", the key was not accepted; set {KEY_VARIABLE}"
        if 300 <= error.code < 400:
            return f", sent on to {error.headers.get('Location')}; give that address, if you trust it with your key"
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        return f": {' '.join(self._hidden(said).split())[:200]}" if said.strip() else ""

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever it is sent on."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        right = False
    if not right or parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "the judge's URL should be that of an OpenAI-compatible API, as https://api.openai.com/v1, without a name, key "
            f"or query in it; a key goes into {KEY_VARIABLE}"
        )
    return url.rstrip("/")


def _message(content: bytes, place: str) -> str:
    try:
        said = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise JudgeError(
            f"{place} sent no chat completion; check that the URL is that of an OpenAI-compatible API"
        ) from error
    return said if isinstance(said, str) else ""  # None where a model only thought


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; dates are not followed."""
    return float(header) if header is not None and header.isdecimal() else 0.0
