"""The blocking and the awaiting client.

Every method stands here once, as a line that gives a function of `_endpoints.py` or `_flows.py` its name; `call` and
`each` make a method of it that returns or awaits, by the client it is used through. The two engines only carry out the
effects of a flow; retries, pages and waiting are the flow's.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, cast, overload

import httpx

from gradstore import __version__, errors, types
from gradstore import _endpoints as endpoints
from gradstore import _flows as flows
from gradstore._endpoints import Call
from gradstore._flows import Answer, Effect, Emit, Flow, Policy, Read, Send, Settings, Sleep, Stream
from gradstore._progress import BytesBar
from gradstore._signatures import expanded
from gradstore._uploads import CountedReads
from gradstore.results import (
    AdapterChoiceJob,
    AdapterChoiceResult,
    AttributionJob,
    AttributionResult,
    ComparisonJob,
    ComparisonResult,
    EstimatesJob,
    EstimatesResult,
    EstimateValidationJob,
    EstimateValidationResult,
    EvaluationJob,
    EvaluationResult,
    FinetuneJob,
    FinetuneResult,
    ProjectorJob,
    ProjectorResult,
    Selection,
    SucceededJob,
    ValidationJob,
    ValidationResult,
)
from gradstore.types import (
    AnnotationJob,
    AnyJob,
    AnyObject,
    CascadeJob,
    CascadeRequest,
    CascadeResult,
    ConversionJob,
    ConversionResult,
    EmbeddingJob,
    GenerationJob,
    GenerationResult,
    GradientsJob,
    GradientsRequest,
    GradientsResult,
    ImportJob,
    Page,
    PredictorJob,
    PredictorRequest,
    PredictorResult,
    StreamJob,
)

DEFAULT_URL = "http://localhost:8000"
CONNECTING = 10.0  # seconds

P = ParamSpec("P")
T = TypeVar("T")


# Carrying out a flow ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connection:
    """Where the service is and how it is asked."""

    url: str
    api_key: str | None
    timeout: float
    """Seconds the server may take between two bytes."""
    policy: Policy

    @classmethod
    def configured(
        cls, url: str | None, api_key: str | None, *, timeout: float, retries: int, backoff: float
    ) -> Connection:
        """Take what was given, else GRADSTORE_URL and GRADSTORE_API_KEY, else the local server."""
        address = (url or os.environ.get("GRADSTORE_URL") or DEFAULT_URL).rstrip("/")
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"the server's address begins with http:// or https://, not {address!r}")
        return cls(address, api_key or os.environ.get("GRADSTORE_API_KEY") or None, timeout, Policy(retries, backoff))

    def options(self) -> dict[str, Any]:
        """The arguments of an httpx client."""
        headers = {"User-Agent": f"gradstore/{__version__}"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        timeout = httpx.Timeout(self.timeout, connect=min(CONNECTING, self.timeout))
        return {"base_url": self.url, "headers": headers, "timeout": timeout}


class _Steps(Generic[T]):
    """A flow on its way."""

    def __init__(self, flow: Flow[T] | Stream[T]) -> None:
        self.flow = flow
        self.result: Any = None

    def next(self, outcome: Any, failure: Exception | None) -> Effect | Emit[T] | None:
        """Tell the flow how its last effect came out, and get the next one; None when it has returned."""
        try:
            return self.flow.send(outcome) if failure is None else self.flow.throw(failure)
        except StopIteration as stop:
            self.result = stop.value
            return None


class Blocking:
    """Carries out flows with blocking calls; may be shared by threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.http = httpx.Client(**connection.options())

    def method(self, function: Callable[P, Flow[T]]) -> Callable[P, T]:
        """Make a method that returns the flow's result."""

        @functools.wraps(function)
        def method(*args: P.args, **kwargs: P.kwargs) -> T:
            steps = _Steps(function(*args, **kwargs))
            for _ in self._items(steps):
                pass
            return cast("T", steps.result)

        return method

    def iterator(self, function: Callable[P, Stream[T]]) -> Callable[P, Iterator[T]]:
        """Make a method that iterates over what the stream emits."""

        @functools.wraps(function)
        def method(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
            return self._items(_Steps(function(*args, **kwargs)))

        return method

    def _items(self, steps: _Steps[T]) -> Generator[T, None, None]:
        outcome, failure = None, None
        with closing(steps.flow), closing(_BlockingEffects(self)) as effects:
            while (effect := steps.next(outcome, failure)) is not None:
                outcome, failure = None, None
                if isinstance(effect, Emit):
                    yield effect.item
                    continue
                try:
                    outcome = effects.perform(effect)
                except errors.ConnectionFailed as error:
                    failure = error


class Awaiting:
    """Carries out flows in an event loop; files are read and written in short blocking calls."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.http = httpx.AsyncClient(**connection.options())

    def method(self, function: Callable[P, Flow[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Make a method that awaits the flow's result."""

        @functools.wraps(function)
        async def method(*args: P.args, **kwargs: P.kwargs) -> T:
            steps = _Steps(function(*args, **kwargs))
            async with aclosing(self._items(steps)) as items:
                async for _ in items:
                    pass
            return cast("T", steps.result)

        return method

    def iterator(self, function: Callable[P, Stream[T]]) -> Callable[P, AsyncIterator[T]]:
        """Make a method that iterates over what the stream emits."""

        @functools.wraps(function)
        def method(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
            return self._items(_Steps(function(*args, **kwargs)))

        return method

    async def _items(self, steps: _Steps[T]) -> AsyncGenerator[T, None]:
        outcome, failure = None, None
        with closing(steps.flow):
            async with aclosing(_AwaitingEffects(self)) as effects:
                while (effect := steps.next(outcome, failure)) is not None:
                    outcome, failure = None, None
                    if isinstance(effect, Emit):
                        yield effect.item
                        continue
                    try:
                        outcome = await effects.perform(effect)
                    except errors.ConnectionFailed as error:
                        failure = error


class _BlockingEffects:
    """The effects of one flow; holds the body that is being read."""

    def __init__(self, engine: Blocking) -> None:
        self._engine = engine
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def perform(self, effect: Effect) -> Any:
        match effect:
            case Settings():
                return self._engine.connection.policy
            case Sleep(seconds):
                time.sleep(seconds)
            case Read():
                with _translated(self._engine.connection):
                    return next(self._chunks, b"")
            case Send():
                return self._send(effect)
        return None

    def _send(self, send: Send) -> Answer:
        self.close()
        http = self._engine.http
        with _request(http, self._engine.connection, send) as request:
            response = http.send(request, stream=True)
            if send.streamed and response.is_success:
                self._response, self._chunks = response, response.iter_bytes()
                return _answer(response, b"")
            with closing(response):
                return _answer(response, response.read())

    def close(self) -> None:
        if self._response is not None:
            self._response.close()


class _AwaitingEffects:
    """The effects of one flow; holds the body that is being read."""

    def __init__(self, engine: Awaiting) -> None:
        self._engine = engine
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] = _nothing()

    async def perform(self, effect: Effect) -> Any:
        match effect:
            case Settings():
                return self._engine.connection.policy
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Read():
                with _translated(self._engine.connection):
                    return await anext(self._chunks, b"")
            case Send():
                return await self._send(effect)
        return None

    async def _send(self, send: Send) -> Answer:
        await self.aclose()
        http = self._engine.http
        with _request(http, self._engine.connection, send) as request:
            response = await http.send(request, stream=True)
            if send.streamed and response.is_success:
                self._response, self._chunks = response, response.aiter_bytes()
                return _answer(response, b"")
            async with aclosing(response):
                return _answer(response, await response.aread())

    async def aclose(self) -> None:
        if self._response is not None:
            await self._response.aclose()


async def _nothing() -> AsyncIterator[bytes]:
    for _ in ():
        yield b""


@contextmanager
def _request(http: httpx.Client | httpx.AsyncClient, connection: Connection, send: Send) -> Iterator[httpx.Request]:
    """Build the request of a call, with its file open."""
    call = send.call
    timeout = httpx.Timeout(
        connection.timeout, connect=min(CONNECTING, connection.timeout), read=call.timeout or connection.timeout
    )
    with ExitStack() as stack:
        body: dict[str, Any] = {} if call.json is None else {"json": call.json}
        if (upload := call.upload) is not None:
            size = upload.source.size
            file = stack.enter_context(upload.source.open())
            bar = stack.enter_context(BytesBar(upload.source.filename, total=size, shown=upload.progress))
            reads = CountedReads(file, size, bar.add)
            part = (upload.source.filename, reads, "application/octet-stream")
            body = {"data": dict(upload.form), "files": [(upload.field, part)]}
        stack.enter_context(_translated(connection))
        yield http.build_request(
            call.method,
            call.path,
            params=list(call.params) or None,
            headers={"Accept": call.accept, **send.headers},
            timeout=timeout,
            **body,
        )


def _answer(response: httpx.Response, body: bytes) -> Answer:
    return Answer(response.status_code, {name.lower(): value for name, value in response.headers.items()}, body)


@contextmanager
def _translated(connection: Connection) -> Iterator[None]:
    """Raise httpx's errors as gradstore's."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise errors.RequestTimeout(f"{connection.url} does not answer: is the address right?") from error
    except httpx.TimeoutException as error:
        raise errors.RequestTimeout(f"{connection.url} did not answer in time ({type(error).__name__})") from error
    except httpx.ConnectError as error:
        raise errors.ConnectionFailed(
            f"cannot connect to {connection.url} ({error}): is the server running (gradstore serve), and the address "
            "right (GRADSTORE_URL)?"
        ) from error
    except httpx.TransportError as error:
        raise errors.ConnectionFailed(f"the connection to {connection.url} broke: {error}") from error
    except httpx.RequestError as error:
        raise errors.UnexpectedAnswer(f"{connection.url} sent an answer that cannot be read: {error}") from error


# Methods of both clients ------------------------------------------------------------------------------------------

EngineT = TypeVar("EngineT", bound=Blocking | Awaiting)


class Resource(Generic[EngineT]):
    """A noun of the API, through one of the engines."""

    def __init__(self, engine: EngineT) -> None:
        self._engine = engine


class call(Generic[P, T]):  # noqa: N801  # used like a decorator
    """A method that returns its result in the blocking client and awaits it in the awaiting one."""

    def __init__(self, function: Callable[P, Call[T]] | Callable[P, Flow[T]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...
    @overload
    def __get__(self, resource: Resource[Blocking], owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, resource: Resource[Awaiting], owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, resource: Resource[Any] | None, owner: type) -> Any:
        return self if resource is None else resource._engine.method(self._flow)

    def __set_name__(self, owner: type, name: str) -> None:
        self._flow = _named(_as_flow(self.function), self.function, f"{owner.__name__}.{name}")


class each(Generic[P, T]):  # noqa: N801  # used like a decorator
    """A method that iterates over its results, by `for` in the blocking client and `async for` in the awaiting one."""

    def __init__(self, function: Callable[P, Stream[T]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...
    @overload
    def __get__(self, resource: Resource[Blocking], owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, resource: Resource[Awaiting], owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, resource: Resource[Any] | None, owner: type) -> Any:
        return self if resource is None else resource._engine.iterator(self._stream)

    def __set_name__(self, owner: type, name: str) -> None:
        self._stream = _named(self.function, self.function, f"{owner.__name__}.{name}")


def _as_flow(function: Callable[P, Any]) -> Callable[P, Flow[Any]]:
    def flow(*args: P.args, **kwargs: P.kwargs) -> Flow[Any]:
        made = function(*args, **kwargs)
        return flows.send(made) if isinstance(made, Call) else made

    return flow


def _named(made: Callable[..., Any], function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Let help() show a method under its name, with its arguments."""

    def named(*args: Any, **kwargs: Any) -> Any:
        return made(*args, **kwargs)

    named.__doc__ = function.__doc__
    named.__module__ = __name__
    named.__qualname__ = name
    named.__name__ = name.rpartition(".")[2]
    named.__signature__ = expanded(function)  # type: ignore[attr-defined]  # read by inspect
    return named


class Datasets(Resource[EngineT]):
    """Pools of examples."""

    upload = call(endpoints.datasets_upload)
    get = call(endpoints.getter("datasets", types.Dataset))
    list = each(flows.paged(endpoints.lister("datasets", Page[types.Dataset])))
    rename = call(endpoints.renamer("datasets", types.Dataset))
    delete = call(endpoints.deleter("datasets"))
    rows = each(flows.datasets_rows)
    lengths = call(endpoints.datasets_lengths)
    lines = each(flows.datasets_lines)
    download = call(flows.datasets_download)


class Tasks(Resource[EngineT]):
    """What a model should get better at."""

    upload = call(endpoints.tasks_upload)
    register = call(endpoints.tasks_register)
    get = call(endpoints.getter("tasks", types.Task))
    list = each(flows.paged(endpoints.lister("tasks", Page[types.Task])))
    download = call(flows.tasks_download)
    rename = call(endpoints.renamer("tasks", types.Task))
    delete = call(endpoints.deleter("tasks"))


class Checkpoints(Resource[EngineT]):
    """Adapters with their optimizer's moments."""

    upload = call(endpoints.checkpoints_upload)
    register = call(endpoints.checkpoints_register)
    get = call(endpoints.getter("checkpoints", types.Checkpoint))
    list = each(flows.paged(endpoints.lister("checkpoints", Page[types.Checkpoint])))
    rename = call(endpoints.renamer("checkpoints", types.Checkpoint))
    delete = call(endpoints.deleter("checkpoints"))
    download = call(flows.checkpoints_download)


class Adapters(Resource[EngineT]):
    """The bank: adapters that can be chosen for a task and mixed."""

    upload = call(endpoints.adapters_upload)
    register = call(endpoints.adapters_register)
    get = call(endpoints.getter("adapters", types.Adapter))
    list = each(flows.paged(endpoints.adapters_list))
    rename = call(endpoints.renamer("adapters", types.Adapter))
    delete = call(endpoints.deleter("adapters"))
    download = call(flows.adapters_download)


class AdapterChoices(Resource[EngineT]):
    """Jobs that choose adapters of the bank for a task."""

    create = call(endpoints.adapter_choices_create)
    estimate = call(endpoints.adapter_choices_estimate)
    get = call(endpoints.getter("adapters/choices", AdapterChoiceJob))
    list = each(flows.paged(endpoints.lister("adapters/choices", Page[AdapterChoiceJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("adapters/choices", AdapterChoiceJob),
            SucceededJob[types.AdapterChoiceRequest, AdapterChoiceResult],
        )
    )
    sets = each(flows.adapter_choices_sets)
    shots = each(flows.adapter_choices_shots)
    cancel = call(endpoints.canceller(AdapterChoiceJob))
    retry = call(endpoints.retrier(AdapterChoiceJob))
    rename = call(endpoints.renamer("adapters/choices", AdapterChoiceJob))
    delete = call(endpoints.deleter("adapters/choices"))


class Allocations(Resource[EngineT]):
    """What mixtures of LoRA experts would take."""

    preview = call(endpoints.allocations_preview)


class Runs(Resource[EngineT]):
    """The checkpoints of one training, in order."""

    create = call(endpoints.runs_create)
    get = call(endpoints.getter("runs", types.Run))
    list = each(flows.paged(endpoints.lister("runs", Page[types.Run])))
    rename = call(endpoints.renamer("runs", types.Run))
    delete = call(endpoints.deleter("runs"))


class Gradients(Resource[EngineT]):
    """Jobs that compute projected gradients."""

    create = call(endpoints.gradients_create)
    estimate = call(endpoints.gradients_estimate)
    get = call(endpoints.getter("gradients", GradientsJob))
    list = each(flows.paged(endpoints.lister("gradients", Page[GradientsJob])))
    wait = call(
        flows.waiter(endpoints.getter("gradients", GradientsJob), SucceededJob[GradientsRequest, GradientsResult])
    )
    rows = each(flows.gradients_rows)
    save_rows = call(flows.gradients_save_rows)
    save_features = call(flows.gradients_save_features)
    cancel = call(endpoints.canceller(GradientsJob))
    retry = call(endpoints.retrier(GradientsJob))
    rename = call(endpoints.renamer("gradients", GradientsJob))
    delete = call(endpoints.deleter("gradients"))


class Conversions(Resource[EngineT]):
    """Jobs that make feature sets of another dtype from stored ones."""

    create = call(endpoints.conversions_create)
    get = call(endpoints.getter("conversions", ConversionJob))
    list = each(flows.paged(endpoints.lister("conversions", Page[ConversionJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("conversions", ConversionJob), SucceededJob[types.ConversionRequest, ConversionResult]
        )
    )
    cancel = call(endpoints.canceller(ConversionJob))
    retry = call(endpoints.retrier(ConversionJob))
    rename = call(endpoints.renamer("conversions", ConversionJob))
    delete = call(endpoints.deleter("conversions"))


class Imports(Resource[EngineT]):
    """Features that another program has computed."""

    upload = call(endpoints.imports_upload)
    register = call(endpoints.imports_register)
    get = call(endpoints.getter("imports", ImportJob))
    list = each(flows.paged(endpoints.lister("imports", Page[ImportJob])))
    wait = call(
        flows.waiter(endpoints.getter("imports", ImportJob), SucceededJob[types.ImportRequest, types.ImportResult])
    )
    cancel = call(endpoints.canceller(ImportJob))
    retry = call(endpoints.retrier(ImportJob))
    rename = call(endpoints.renamer("imports", ImportJob))
    delete = call(endpoints.deleter("imports"))


class Selections(Resource[EngineT]):
    """Recorded answers of `select`."""

    get = call(flows.selection)
    list = each(flows.paged(endpoints.lister("selections", Page[Selection])))
    rows = each(flows.selection_rows)
    explanations = each(flows.selections_explanations)
    lines = each(flows.selections_lines)
    save = call(flows.selections_save)
    export = call(flows.selections_export)
    provenance = call(endpoints.selections_provenance)
    card = call(flows.selections_card)
    rename = call(endpoints.renamer("selections", Selection))
    delete = call(endpoints.deleter("selections"))


class Finetunes(Resource[EngineT]):
    """Jobs that train a model."""

    create = call(endpoints.finetunes_create)
    estimate = call(endpoints.finetunes_estimate)
    get = call(endpoints.getter("finetunes", FinetuneJob))
    list = each(flows.paged(endpoints.lister("finetunes", Page[FinetuneJob])))
    wait = call(
        flows.waiter(endpoints.getter("finetunes", FinetuneJob), SucceededJob[types.FinetuneRequest, FinetuneResult])
    )
    cancel = call(endpoints.canceller(FinetuneJob))
    retry = call(endpoints.retrier(FinetuneJob))
    download = call(flows.finetunes_download)
    rename = call(endpoints.renamer("finetunes", FinetuneJob))
    delete = call(endpoints.deleter("finetunes"))


class Evaluations(Resource[EngineT]):
    """Jobs that measure a model on tasks."""

    create = call(endpoints.evaluations_create)
    get = call(endpoints.getter("evaluations", EvaluationJob))
    list = each(flows.paged(endpoints.lister("evaluations", Page[EvaluationJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("evaluations", EvaluationJob), SucceededJob[types.EvaluationRequest, EvaluationResult]
        )
    )
    cancel = call(endpoints.canceller(EvaluationJob))
    retry = call(endpoints.retrier(EvaluationJob))
    rename = call(endpoints.renamer("evaluations", EvaluationJob))
    delete = call(endpoints.deleter("evaluations"))


class Generations(Resource[EngineT]):
    """Jobs that let a model answer prompts."""

    create = call(endpoints.generations_create)
    get = call(endpoints.getter("generations", GenerationJob))
    list = each(flows.paged(endpoints.lister("generations", Page[GenerationJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("generations", GenerationJob), SucceededJob[types.GenerationRequest, GenerationResult]
        )
    )
    cancel = call(endpoints.canceller(GenerationJob))
    retry = call(endpoints.retrier(GenerationJob))
    rename = call(endpoints.renamer("generations", GenerationJob))
    delete = call(endpoints.deleter("generations"))


class Validations(Resource[EngineT]):
    """Jobs that compare what scores predict with what training does."""

    create = call(endpoints.validations_create)
    estimate = call(endpoints.validations_estimate)
    get = call(endpoints.getter("validations", ValidationJob))
    list = each(flows.paged(endpoints.lister("validations", Page[ValidationJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("validations", ValidationJob), SucceededJob[types.ValidationRequest, ValidationResult]
        )
    )
    cancel = call(endpoints.canceller(ValidationJob))
    retry = call(endpoints.retrier(ValidationJob))
    rename = call(endpoints.renamer("validations", ValidationJob))
    delete = call(endpoints.deleter("validations"))


class Predictors(Resource[EngineT]):
    """Jobs that learn to predict influence from a sample of a pool."""

    create = call(endpoints.predictors_create)
    estimate = call(endpoints.predictors_estimate)
    get = call(endpoints.getter("predictors", PredictorJob))
    list = each(flows.paged(endpoints.lister("predictors", Page[PredictorJob])))
    wait = call(
        flows.waiter(endpoints.getter("predictors", PredictorJob), SucceededJob[PredictorRequest, PredictorResult])
    )
    cancel = call(endpoints.canceller(PredictorJob))
    retry = call(endpoints.retrier(PredictorJob))
    rename = call(endpoints.renamer("predictors", PredictorJob))
    delete = call(endpoints.deleter("predictors"))


class Cascades(Resource[EngineT]):
    """Jobs that compute gradients for the rows predicted best, and for no others."""

    create = call(endpoints.cascades_create)
    estimate = call(endpoints.cascades_estimate)
    get = call(endpoints.getter("cascades", CascadeJob))
    list = each(flows.paged(endpoints.lister("cascades", Page[CascadeJob])))
    wait = call(flows.waiter(endpoints.getter("cascades", CascadeJob), SucceededJob[CascadeRequest, CascadeResult]))
    cancel = call(endpoints.canceller(CascadeJob))
    retry = call(endpoints.retrier(CascadeJob))
    rename = call(endpoints.renamer("cascades", CascadeJob))
    delete = call(endpoints.deleter("cascades"))


class Attributions(Resource[EngineT]):
    """Jobs that find the training examples behind an answer."""

    create = call(endpoints.attributions_create)
    get = call(endpoints.getter("attributions", AttributionJob))
    list = each(flows.paged(endpoints.lister("attributions", Page[AttributionJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("attributions", AttributionJob), SucceededJob[types.AttributionRequest, AttributionResult]
        )
    )
    cancel = call(endpoints.canceller(AttributionJob))
    retry = call(endpoints.retrier(AttributionJob))
    rename = call(endpoints.renamer("attributions", AttributionJob))
    delete = call(endpoints.deleter("attributions"))


class Estimates(Resource[EngineT]):
    """Jobs that estimate what training on subsets of a pool would give."""

    create = call(endpoints.estimates_create)
    estimate = call(endpoints.estimates_estimate)
    get = call(endpoints.getter("estimates", EstimatesJob))
    list = each(flows.paged(endpoints.lister("estimates", Page[EstimatesJob])))
    wait = call(
        flows.waiter(endpoints.getter("estimates", EstimatesJob), SucceededJob[types.EstimatesRequest, EstimatesResult])
    )
    subsets = each(flows.estimates_subsets)
    cancel = call(endpoints.canceller(EstimatesJob))
    retry = call(endpoints.retrier(EstimatesJob))
    rename = call(endpoints.renamer("estimates", EstimatesJob))
    delete = call(endpoints.deleter("estimates"))


class EstimateValidations(Resource[EngineT]):
    """Jobs that hold estimates against trainings."""

    create = call(endpoints.estimate_validations_create)
    estimate = call(endpoints.estimate_validations_estimate)
    get = call(endpoints.getter("estimates/validations", EstimateValidationJob))
    list = each(flows.paged(endpoints.lister("estimates/validations", Page[EstimateValidationJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("estimates/validations", EstimateValidationJob),
            SucceededJob[types.EstimateValidationRequest, EstimateValidationResult],
        )
    )
    cancel = call(endpoints.canceller(EstimateValidationJob))
    retry = call(endpoints.retrier(EstimateValidationJob))
    rename = call(endpoints.renamer("estimates/validations", EstimateValidationJob))
    delete = call(endpoints.deleter("estimates/validations"))


class Comparisons(Resource[EngineT]):
    """Jobs that compare ways to select."""

    create = call(endpoints.comparisons_create)
    estimate = call(endpoints.comparisons_estimate)
    get = call(endpoints.getter("comparisons", ComparisonJob))
    list = each(flows.paged(endpoints.lister("comparisons", Page[ComparisonJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("comparisons", ComparisonJob), SucceededJob[types.ComparisonRequest, ComparisonResult]
        )
    )
    cancel = call(endpoints.canceller(ComparisonJob))
    retry = call(endpoints.retrier(ComparisonJob))
    rename = call(endpoints.renamer("comparisons", ComparisonJob))
    delete = call(endpoints.deleter("comparisons"))


class Projectors(Resource[EngineT]):
    """Networks that place rows in an ability space."""

    create = call(endpoints.projectors_create)
    estimate = call(endpoints.projectors_estimate)
    get = call(endpoints.getter("projectors", ProjectorJob))
    list = each(flows.paged(endpoints.lister("projectors", Page[ProjectorJob])))
    epochs = call(endpoints.projectors_epochs)
    wait = call(
        flows.waiter(
            endpoints.getter("projectors", ProjectorJob), SucceededJob[types.ProjectorRequest, ProjectorResult]
        )
    )
    histogram = call(endpoints.projectors_histogram)
    download = call(flows.projectors_download)
    cancel = call(endpoints.canceller(ProjectorJob))
    retry = call(endpoints.retrier(ProjectorJob))
    rename = call(endpoints.renamer("projectors", ProjectorJob))
    delete = call(endpoints.deleter("projectors"))


class Embeddings(Resource[EngineT]):
    """Where projectors place the rows of datasets and tasks."""

    create = call(endpoints.embeddings_create)
    estimate = call(endpoints.embeddings_estimate)
    get = call(endpoints.getter("embeddings", EmbeddingJob))
    list = each(flows.paged(endpoints.lister("embeddings", Page[EmbeddingJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("embeddings", EmbeddingJob), SucceededJob[types.EmbeddingRequest, types.EmbeddingResult]
        )
    )
    rows = each(flows.embeddings_rows)
    save = call(flows.embeddings_save)
    cancel = call(endpoints.canceller(EmbeddingJob))
    retry = call(endpoints.retrier(EmbeddingJob))
    rename = call(endpoints.renamer("embeddings", EmbeddingJob))
    delete = call(endpoints.deleter("embeddings"))


class Streams(Resource[EngineT]):
    """Rows of numbers of a dataset or a task, by name."""

    create = call(endpoints.streams_create)
    upload = call(endpoints.streams_upload)
    get = call(endpoints.getter("streams", StreamJob))
    list = each(flows.paged(endpoints.lister("streams", Page[StreamJob])))
    wait = call(
        flows.waiter(endpoints.getter("streams", StreamJob), SucceededJob[types.StreamRequest, types.StreamResult])
    )
    save = call(flows.streams_save)
    cancel = call(endpoints.canceller(StreamJob))
    retry = call(endpoints.retrier(StreamJob))
    rename = call(endpoints.renamer("streams", StreamJob))
    delete = call(endpoints.deleter("streams"))


class Annotations(Resource[EngineT]):
    """Which capabilities rows ask for."""

    create = call(endpoints.annotations_create)
    estimate = call(endpoints.annotations_estimate)
    upload = call(endpoints.annotations_upload)
    get = call(endpoints.getter("annotations", AnnotationJob))
    list = each(flows.paged(endpoints.lister("annotations", Page[AnnotationJob])))
    wait = call(
        flows.waiter(
            endpoints.getter("annotations", AnnotationJob),
            SucceededJob[types.AnnotationRequest, types.AnnotationResult],
        )
    )
    rows = each(flows.annotations_rows)
    cancel = call(endpoints.canceller(AnnotationJob))
    retry = call(endpoints.retrier(AnnotationJob))
    rename = call(endpoints.renamer("annotations", AnnotationJob))
    delete = call(endpoints.deleter("annotations"))


class Taxonomies(Resource[EngineT]):
    """The capabilities that rows are labelled with."""

    create = call(endpoints.taxonomies_create)
    get = call(endpoints.getter("taxonomies", types.Taxonomy))
    list = each(flows.paged(endpoints.lister("taxonomies", Page[types.Taxonomy])))
    rename = call(endpoints.renamer("taxonomies", types.Taxonomy))
    delete = call(endpoints.deleter("taxonomies"))


class Jobs(Resource[EngineT]):
    """Jobs of all kinds."""

    get = call(endpoints.getter("jobs", AnyJob))
    list = each(flows.paged(endpoints.jobs_list))
    wait = call(flows.waiter(endpoints.getter("jobs", AnyJob), SucceededJob[AnyObject, AnyObject]))
    events = each(flows.events)
    prioritise = call(endpoints.jobs_prioritise)
    cancel = call(endpoints.canceller(AnyJob))
    retry = call(endpoints.retrier(AnyJob))
    delete = call(endpoints.deleter("jobs"))


class Workers(Resource[EngineT]):
    """Who computes."""

    get = call(endpoints.getter("workers", types.Worker))
    list = each(flows.paged(endpoints.lister("workers", Page[types.Worker])))


class Store(Resource[EngineT]):
    """What both clients offer."""

    def __init__(self, engine: EngineT) -> None:
        super().__init__(engine)
        self.datasets = Datasets(engine)
        self.tasks = Tasks(engine)
        self.checkpoints = Checkpoints(engine)
        self.adapters = Adapters(engine)
        self.adapter_choices = AdapterChoices(engine)
        self.allocations = Allocations(engine)
        self.runs = Runs(engine)
        self.gradients = Gradients(engine)
        self.imports = Imports(engine)
        self.selections = Selections(engine)
        self.finetunes = Finetunes(engine)
        self.evaluations = Evaluations(engine)
        self.generations = Generations(engine)
        self.validations = Validations(engine)
        self.predictors = Predictors(engine)
        self.cascades = Cascades(engine)
        self.attributions = Attributions(engine)
        self.estimates = Estimates(engine)
        self.estimate_validations = EstimateValidations(engine)
        self.comparisons = Comparisons(engine)
        self.projectors = Projectors(engine)
        self.embeddings = Embeddings(engine)
        self.conversions = Conversions(engine)
        self.streams = Streams(engine)
        self.annotations = Annotations(engine)
        self.taxonomies = Taxonomies(engine)
        self.jobs = Jobs(engine)
        self.workers = Workers(engine)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._engine.connection.url

    select = call(flows.select)
    scores = each(flows.scores)
    save_scores = call(flows.save_scores)
    score_distribution = call(flows.score_distribution)
    overlaps = call(flows.overlaps)
    compare = call(flows.compare)
    health = call(endpoints.health)
    ready = call(endpoints.ready)
    usage = call(endpoints.usage)
    audit = each(flows.paged(endpoints.audit))


class GradientStore(Store[Blocking]):
    """The blocking client; close it, or use it in a `with` statement.

    `url` and `api_key` default to GRADSTORE_URL and GRADSTORE_API_KEY, and the address to http://localhost:8000.
    `timeout` is the longest silence of the server, in seconds. A request that fails to connect, or is answered by 429,
    502, 503 or 504, is tried again `retries` times, after `backoff` seconds and then after twice as long each time.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.25,
    ) -> None:
        super().__init__(
            Blocking(Connection.configured(url, api_key, timeout=timeout, retries=retries, backoff=backoff))
        )

    def close(self) -> None:
        """Close the connections."""
        self._engine.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncGradientStore(Store[Awaiting]):
    """The awaiting client: the same names as `GradientStore`, awaited or iterated over by `async for`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.25,
    ) -> None:
        super().__init__(
            Awaiting(Connection.configured(url, api_key, timeout=timeout, retries=retries, backoff=backoff))
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._engine.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
