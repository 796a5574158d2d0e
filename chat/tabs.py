"""The conversations of the browser tabs that are open."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chat.session import Session
from chat.texts import Problem


class Tab:
    """A session that one request at a time may use.

    Attributes:
        after_forgotten: whether an earlier conversation of this tab was forgotten.
        left: whether the browser has gone; a lost connection looks the same, so it may come back.
    """

    def __init__(self, session: Session, after_forgotten: bool = False):
        self.session, self.after_forgotten = session, after_forgotten
        self.used, self.left = time.monotonic(), False
        self._lock, self._stop = threading.Lock(), threading.Event()

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Ends what the request that has the session is at, as soon as it can."""
        self._stop.set()
        self.session.stop()

    @contextmanager
    def alone(self) -> Iterator[Session]:
        """The session, for one request.

        Raises:
            Problem: another request has it.
        """
        if not self._lock.acquire(blocking=False):
            raise Problem("answering")
        try:
            self._stop.clear()
            yield self.session
        finally:
            self.used = time.monotonic()
            self._lock.release()


class Tabs:
    """Tabs by their key; pictures of a conversation take memory of the model's device, so their number is bounded.

    Args:
        make: a new session.
        most: how many there may be; of more, the one that was not used for longest is forgotten.
        idle: seconds without use after which a tab is forgotten when another one comes. One that was left is forgotten
            then without delay.
    """

    def __init__(self, make: Callable[[], Session], most: int = 64, idle: float = 3600):
        self._make, self._most, self._idle = make, most, idle
        self._tabs: OrderedDict[str, Tab] = OrderedDict()  # the one that was not used for longest comes first
        self._forgotten: deque[str] = deque(maxlen=1000)  # of which some may come back
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tabs)

    def get(self, key: str) -> Tab:
        """The tab, made where there is none, for which another one may be forgotten."""
        with self._lock:
            if key not in self._tabs:
                self._make_room()
                self._tabs[key] = Tab(self._make(), key in self._forgotten)
            return self._touch(key)

    def find(self, key: str) -> Tab | None:
        """The tab for a request that uses it; None where there is none, or no longer."""
        with self._lock:
            return self._touch(key) if key in self._tabs else None

    def peek(self, key: str) -> Tab | None:
        """The tab, without using it: one that was left stays so."""
        with self._lock:
            return self._tabs.get(key)

    def leave(self, key: str) -> None:
        """Ends what a tab is at whose browser has gone."""
        if tab := self.peek(key):
            tab.left = True
            tab.stop()

    def _touch(self, key: str) -> Tab:
        self._tabs.move_to_end(key)
        tab = self._tabs[key]
        tab.used, tab.left = time.monotonic(), False
        return tab

    def _make_room(self) -> None:
        now, over = time.monotonic(), len(self._tabs) - self._most + 1
        for key, tab in list(self._tabs.items()):
            if not tab.busy and (over > 0 or tab.left or now - tab.used > self._idle):
                del self._tabs[key]
                self._forgotten.append(key)
                over -= 1
