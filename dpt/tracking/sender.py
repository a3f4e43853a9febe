"""Send spools to MLflow: the process beside a run (`python -m dpt.tracking.sender SPOOL`), and `dpt sync`."""

import logging
import math
import select
import signal
import sys
import time
from pathlib import Path

from dpt.errors import hide_passwords
from dpt.tracking import store
from dpt.tracking.delivery import Sender
from dpt.tracking.spool import Spool, SpoolState
from dpt.tracking.system import SystemRecords

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0


def serve(spool: Spool, *, system: SystemRecords | None = None) -> int:
    """Send a spool while its run lasts, and the rest once it has ended (end of stdin). Returns 0 if all was sent, 3 if not.

    `system`: samples the node meanwhile.
    """
    sender, begun = Sender(spool), spool.size
    pause, give_up = POLL_SECONDS, math.inf
    while True:
        if give_up < math.inf:
            time.sleep(min(pause, 2.0))
        elif select.select([sys.stdin], [], [], pause)[0]:
            give_up = time.monotonic() + GRACE_SECONDS
            if not sender.finished and not spool.joins and not _is_over(spool, sender.state.offset, begun):
                _mark_failed(spool)
        elif system is not None:
            _sample(system)
        try:
            sender.send()
            pause = POLL_SECONDS
            if give_up < math.inf:
                return 0
        except Exception as error:
            _log.warning("cannot send: %s", hide_passwords(str(error)))
            if time.monotonic() > give_up:
                return 3
            pause = min(2 * pause, 60.0)


def _sample(system: SystemRecords) -> None:
    try:
        system.sample()
    except Exception as error:  # drivers and containers fail in their own ways; the run's records matter more
        _log.warning("cannot sample the node: %s", error)


def _is_over(spool: Spool, unsent: int, begun: int) -> bool:
    """Whether the run has ended (after byte `unsent`), or was resumed since byte `begun`, which another sender handles."""
    if any(record["kind"] == "start" for record, _ in spool.read(begun)):
        return True
    kind = ""
    for record, _ in spool.read(unsent):
        kind = kind if record["kind"] == "metrics" else record["kind"]  # a sample of the node may follow the end
    return kind == "finish"


def _mark_failed(spool: Spool) -> None:
    """Mark the run as failed: it was killed before it could report its end."""
    spool.append({"kind": "finish", "time": int(time.time() * 1000), "run_id": spool.run_id, "status": "FAILED"})
    spool.close()


def sync(root: Path, *, uri: str = "", again: bool = False) -> list[tuple[Spool, str]]:
    """Send what is left of every run below `root`, parents first; return each spool with "" or the reason some is left.

    `uri`: a store other than the recorded one. `again`: from the first record on (for a store that has lost the runs). What
    another store has begun to receive is not sent to `uri` unless `again`, as its beginning would be missing there.
    """
    outcomes: list[tuple[Spool, str]] = []
    target = store.absolute_uri(uri) if uri else ""
    for spool in Spool.find(root):
        began = SpoolState() if again else spool.state
        if target and began.offset and began.uri != hide_passwords(target):
            outcomes.append((spool, f"it was sent to {began.uri}; --again sends it to {hide_passwords(target)}, too"))
            continue
        try:
            sent = Sender(spool, uri=target).send(wait=False, again=again)
            outcomes.append((spool, "" if sent else "its own run is sending it"))
        except Exception as error:
            outcomes.append((spool, spool.state.error or hide_passwords(str(error))))
    return outcomes


def main() -> int:
    """Entry point of the process beside a run."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a job's end reaches the run first; the sender ends with it
    spool, every, node = Spool.at(Path(sys.argv[1])), float(sys.argv[2]), sys.argv[3]
    logging.basicConfig(filename=spool.log, level=logging.WARNING, format="%(asctime)s %(message)s")
    return serve(spool, system=SystemRecords(spool, every=every, node=node) if every else None)


if __name__ == "__main__":
    sys.exit(main())
