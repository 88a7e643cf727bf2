"""`gradstore worker`, or `python -m worker.command`: a process that does the shards of a store.

Nothing heavy is imported before the worker is really started: the command line lists this command too.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from gradstore.types import JobKind

from datastore import logs, tracing
from datastore.options import configured
from datastore.settings import Settings
from worker.devices import SPREAD, choose_device, workers
from worker.monitoring import show
from worker.queues import QUEUES, kinds_of
from worker.several import STOP_SIGNALS, supervise

log = logging.getLogger("worker.command")  # its own name when run with -m, too

KINDS: tuple[JobKind, ...] = tuple(QUEUES.values())


def worker(
    *,
    data: Annotated[Path | None, typer.Option(help="Folder of the store, else gradstore-data.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device: auto (the default), cpu, cuda:1; cuda:0,cuda:1 or all: a worker for each; "
            "spread: one worker, with models over all GPUs."
        ),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Workers for each device, else 1.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="CPU threads of each worker; 0, the default: its part of the cores.")
    ] = None,
    queues: Annotated[
        str | None,
        typer.Option(metavar="<queues>", help=f"What to do, with commas ({','.join(QUEUES)}), else all."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Do what waits, then leave.")] = False,
) -> None:
    """Do the jobs of a store. What is left out comes from the environment (GRADSTORE_…)."""
    kinds = KINDS if queues is None else kinds_of(queues)
    settings = configured(data=data, device=device, concurrency=concurrency, threads=threads)
    logs.begin(settings)
    sys.exit(run(settings, kinds=kinds, once=once))


def run(settings: Settings, *, kinds: Any = KINDS, once: bool = False) -> int:
    """Be a worker, or several, until asked to stop; returns the exit status."""
    names = workers(settings.device, settings.concurrency)
    several = len(names) > 1
    by_celery = bool(settings.broker) and not once and not several
    if not by_celery:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # before there are threads, which take it over
    if several:
        return supervise(settings, names, kinds=kinds, once=once)
    spread = settings.device == SPREAD
    if spread:  # the Trainer would copy a model that lies on one GPU to all the others
        kinds = [kind for kind in kinds if kind not in {"finetune", "validation"}]
    device = choose_device(names[0])  # before torch looks for devices
    from worker.context import Context  # noqa: PLC0415 - heavy
    from worker.loop import Caretaker, work_until_left  # noqa: PLC0415
    from worker.models import use_cpu_threads  # noqa: PLC0415

    gc.freeze()  # what is imported stays: it takes 0.7 s to look through, each time that a model's memory is freed
    _use_one_log()
    use_cpu_threads(settings.threads or None)
    _show_metrics(settings.metrics_listen)
    tracing.begin_process(settings.otlp_endpoint, part="worker")
    atexit.register(tracing.close)
    context = Context.open(settings, device, spread=spread)
    if by_celery:
        from worker.celery_app import Doorbell  # noqa: PLC0415 - only where there is a broker

        with Caretaker(context, kinds=kinds) as caretaker:
            log.info("worker ready", extra={"worker": context.owner, "device": str(device), "kinds": sorted(kinds)})
            return Doorbell(context, caretaker, kinds=kinds).run()

    threading.Thread(target=_leave_when_asked, args=(context.leaving,), name="signals", daemon=True).start()
    work_until_left(context, kinds=kinds, once=once)
    return 0


def _show_metrics(listen: str) -> None:
    """Show the worker's metrics where the settings say so; exits with a reason where that is not to be had."""
    if not listen:
        return
    try:
        show(listen)
    except OSError as error:
        sys.exit(f"metrics cannot be shown at {listen}: {error.strerror or error}; change GRADSTORE_METRICS_LISTEN")


def _leave_when_asked(leaving: threading.Event) -> None:
    """Wait for the signals that ask the worker to stop; asked a second time, the process ends at once.

    In a thread, since a handler runs inside whatever the main thread is at: inside the event's own lock it would wait
    for itself for ever.
    """
    signal.sigwait(STOP_SIGNALS)
    leaving.set()
    number = signal.sigwait(STOP_SIGNALS)
    os._exit(128 + number)


def _use_one_log() -> None:
    """Keep the log to one line an event, the libraries' too."""
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415 - heavy
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    logging.captureWarnings(True)


def main() -> None:
    """Run as `python -m worker.command`."""
    typer.run(worker)


if __name__ == "__main__":
    main()
