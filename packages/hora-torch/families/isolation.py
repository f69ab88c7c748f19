"""One function on many names, each call in a process of its own: a crash or an endless loop is an answer."""

import multiprocessing
import multiprocessing.connection
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class _Run:
    process: Any
    receiver: Any
    deadline: float

    def answer(self) -> Any:
        """What the process sent, an error where it cannot any more, or nothing yet."""
        if self.receiver.poll() or not self.process.is_alive():
            try:
                return self.receiver.recv()
            except EOFError:
                self.process.join()
                return ChildProcessError(f"exit status {self.process.exitcode}")
        if time.monotonic() > self.deadline:
            self.process.kill()
            return ChildProcessError("no answer in time")
        return None


def each_alone(
    function: Callable[[str], Any], names: Sequence[str], *, workers: int, seconds: float
) -> Iterator[tuple[str, Any]]:
    """Name and answer of each call, as they are done.

    Parameters
    ----------
    function
        What is called; processes are forked, so that what is imported now need not be imported again.
    names
        Its arguments.
    workers
        How many processes there are at most.
    seconds
        Time of one call.

    Yields
    ------
    tuple
        A name and what the function returned, or the error that it raised, or a ChildProcessError.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(function, name, sender), daemon=True)
            process.start()
            sender.close()
            running[name] = _Run(process, receiver, time.monotonic() + seconds)
        multiprocessing.connection.wait([run.receiver for run in running.values()], timeout=1.0)
        for name, run in list(running.items()):
            if (answer := run.answer()) is not None:
                run.process.join()
                del running[name]
                yield name, answer


def _send(function: Callable[[str], Any], name: str, sender: Any) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        sender.send(function(name))
    except Exception as error:
        sender.send(RuntimeError(in_short(error)))


def in_short(error: Exception) -> str:
    """An error on one line of at most 200 characters, without the place where this machine keeps its packages."""
    said = re.sub(r"(/[^/'\s]+)+/site-packages/", "", f"{type(error).__name__}: {error}")
    return " ".join(said.split())[:200]
