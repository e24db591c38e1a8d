"""Objects from one rank to another through the ranks' common store: the sender goes on at once.

For results on their way out, kilobytes at a time; rows of a layer travel by collectives.
"""

from __future__ import annotations

import pickle
from typing import Any, Protocol


class MailStore(Protocol):
    """What is used of a ``torch.distributed`` store."""

    def set(self, key: str, value: Any, /) -> None:
        """Write."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there; returns at once."""

    def get(self, key: str, /) -> bytes:
        """Read, waiting for it up to the store's timeout."""

    def delete_key(self, key: str, /) -> bool:
        """Remove."""


class Mail:
    """Each letter has a name of its own, and is taken once; its content is anything that can be pickled."""

    def __init__(self, store: MailStore) -> None:
        self._store = store

    def send(self, name: str, content: object) -> None:
        """Leave ``content`` for whoever takes it."""
        self._store.set(_key(name), pickle.dumps(content))

    def arrived(self, name: str) -> bool:
        """Whether it can be taken without waiting."""
        return self._store.check([_key(name)])

    def take(self, name: str) -> Any:
        """The content, when it is there."""
        content = pickle.loads(self._store.get(_key(name)))
        self._store.delete_key(_key(name))
        return content


def _key(name: str) -> str:
    return f"mail/{name}"
