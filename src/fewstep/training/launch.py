"""`fewstep train --processes N`: one process starts the others, and it alone says what went wrong. Imports no torch at once."""

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .._errors import FewstepError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAUNCHED = "FEWSTEP_LAUNCHED"
"""Environment variable of the processes that `launch` starts."""

INTERRUPTED = 130
"""Exit status after Ctrl-C or a termination signal."""


def launch(processes: int, words: Sequence[str]) -> None:
    """Run a command line of fewstep once per process, and wait for all of them.

    Args:
        processes: how many.
        words: the command line.

    Raises:
        FewstepError: what one of them raised, or that it was killed.
        KeyboardInterrupt: they were interrupted, each after its checkpoint.
        SystemExit: one of them ended with an error that fewstep does not know; its traceback is on stderr.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[LAUNCHED] = "1"
    logging.disable(logging.ERROR)  # of torchrun, which reports at length what is said in one line below
    try:
        run(get_args_parser().parse_args(["--standalone", f"--nproc_per_node={processes}", "-m", "fewstep.cli", *words]))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        failure = _cause(error.failures.values())
    else:
        return
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[LAUNCHED]
    if failure.exitcode == INTERRUPTED:
        raise KeyboardInterrupt
    if "known" not in failure.error_file_data:
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with status {failure.exitcode}"
        raise FewstepError(
            f"process {failure.local_rank} of {processes} {how}; go on with --resume if there is a checkpoint, else start again"
        )
    if failure.error_file_data["known"]:
        raise FewstepError(failure.message)
    print(failure.message, file=sys.stderr)
    sys.exit(1)


@contextmanager
def reporting() -> Iterator[None]:
    """In a process that `launch` started, leave it to the launcher to say what is raised; in others do nothing."""
    try:
        yield
    except BaseException as error:
        if LAUNCHED not in os.environ or isinstance(error, SystemExit):
            raise
        if not isinstance(error, KeyboardInterrupt):
            known = isinstance(error, FewstepError | ValueError)  # as `cli.main`
            said = {"message": str(error) if known else traceback.format_exc(), "known": known, "timestamp": int(time.time())}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(said), encoding="utf-8")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # At once: taking connections down that others are using makes some threads abort, with a message of their own.
        os._exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)


def _cause(failures: "Iterable[ProcessFailure]") -> "ProcessFailure":
    """Why a run failed: when one process has ended the others lose their connection to it, or are terminated."""

    def rank(failure: "ProcessFailure") -> tuple[bool, bool, bool, int]:
        said = failure.error_file_data
        ended = failure.exitcode in (INTERRUPTED, -signal.SIGTERM)
        return not said.get("known"), ended, "known" in said, failure.timestamp

    return min(failures, key=rank)
