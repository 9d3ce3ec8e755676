"""Decides what follows the end of an attempt: done, stopped, another attempt after a pause, or
giving up. Only values, no processes and no clock, so that any history can be tested."""

import os
import signal
from collections import Counter
from dataclasses import dataclass, field

from configs.health.heartbeat import HANG_CODE

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
HOUR_S = 3600.0


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    code: int
    """Exit code of the rank that ended first, or of rank 0 if all ended well; -n: signal n."""
    rank: int = 0
    """The rank that failed first, or that made the others hang."""
    place: str = "start"
    """What that rank did: phase and step."""
    done: int = 0
    """The last complete step of any rank."""
    saved: int = -1
    """Step of the newest checkpoint; -1 if there is none."""

    @property
    def reason(self) -> str:
        """Description for a message."""
        if self.code < 0:
            try:
                return f"was killed by {signal.Signals(-self.code).name}"
            except ValueError:
                return f"was killed by signal {-self.code}"
        if self.code == HANG_CODE:
            return "made the run hang"
        return f"failed with exit code {self.code}"


@dataclass(frozen=True)
class Limits:
    """When the supervisor gives up."""

    restarts_per_hour: int = 10
    """Restarts within any hour."""
    attempts_without_progress: int = 3
    """Attempts in a row after which neither a further step nor a newer checkpoint exists."""
    backoff_s: float = 1.0
    """Pause before the second attempt in a row without progress; it doubles with each."""
    longest_pause_s: float = 60.0


@dataclass(frozen=True)
class Decision:
    """What to do next."""

    code: int | None
    """Exit code of the command; None: start another attempt."""
    pause_s: float = 0.0
    lines: tuple[str, ...] = ()
    """Messages for the user."""


@dataclass
class History:
    """The attempts so far, and the decision after each."""

    limits: Limits
    ranks: int
    newest: int
    """Step of the newest checkpoint; -1 if there is none."""
    furthest: int = -1
    """The last complete step of any attempt."""
    idle: int = 0
    """Attempts in a row without progress."""
    restarts: list[float] = field(default_factory=list)
    """Times of the restarts within the last hour."""
    failures: list[Ended] = field(default_factory=list)

    def decide(self, ended: Ended, stopped: int, now: float) -> Decision:
        """The decision after an attempt. stopped: number of the signal that the supervisor got, or
        0. now: seconds."""
        code = ended.code
        if code == 0:
            return Decision(0)
        if stopped or code in (os.EX_TEMPFAIL, INTERRUPTED):
            interrupted = code == INTERRUPTED or stopped == signal.SIGINT
            return Decision(INTERRUPTED if interrupted else os.EX_TEMPFAIL)
        if code == USER_ERROR:
            return Decision(code)
        lines = self._repeated(ended)
        fails = code if code > 0 else 128 - code
        before = max(self.furthest, self.newest, 0)
        advanced = ended.done > before or ended.saved > self.newest
        alike = bool(self.failures) and _same(self.failures[-1], ended)
        self.failures.append(ended)
        self.furthest = max(self.furthest, ended.done)
        self.newest = max(self.newest, ended.saved)
        self.idle = 0 if advanced else self.idle + 1
        if alike:
            lines.append(
                f"the same failure twice, exit code {code} in {ended.place}: another attempt would "
                "fail too"
            )
            return Decision(fails, lines=tuple(lines))
        if self.idle >= self.limits.attempts_without_progress:
            lines.append(
                f"{self.idle} attempts in a row without a further step or checkpoint: not "
                "repeated; --attempts-without-progress N allows more"
            )
            return Decision(fails, lines=tuple(lines))
        self.restarts = [time for time in self.restarts if now - time < HOUR_S]
        if len(self.restarts) >= self.limits.restarts_per_hour:
            lines.append(
                f"{len(self.restarts)} restarts within an hour: not repeated; "
                "--restarts-per-hour N allows more"
            )
            return Decision(fails, lines=tuple(lines))
        self.restarts.append(now)
        doubled = self.limits.backoff_s * 2.0 ** min(self.idle - 2, 30)
        pause = min(doubled, self.limits.longest_pause_s) if self.idle > 1 else 0.0
        return Decision(None, pause, tuple(lines))

    def _repeated(self, ended: Ended) -> list[str]:
        """A message about a rank that fails again and again."""
        recent = [*self.failures, ended][-5:]
        times = Counter(one.rank for one in recent)[ended.rank]
        if self.ranks == 1 or times < 2 or 2 * times <= len(recent):
            return []
        return [
            f"rank {ended.rank} was the first to fail in {times} of the last {len(recent)} failed "
            "attempts: look at its device and its memory"
        ]


def _same(last: Ended, ended: Ended) -> bool:
    """Whether two failures are one that does not depend on chance: an error with the same exit code
    in the same phase of the same step. Signals and hangs come from outside."""
    own = ended.code > 0 and ended.code != HANG_CODE
    return own and (last.code, last.place, last.done) == (ended.code, ended.place, ended.done)
