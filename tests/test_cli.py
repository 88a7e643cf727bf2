"""The command line: what it sends, what it prints and where, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import typer
from gradstore import cli
from gradstore._cli.jobs import listed
from gradstore._cli.options import HELP
from gradstore.types import (
    AdapterChoiceEstimate,
    AnnotationEstimate,
    CascadeEstimate,
    EmbeddingEstimate,
    EmbeddingRequest,
    EstimatesCost,
    PredictorEstimate,
    ProjectorEstimate,
    ProjectorRequest,
    ValidationEstimate,
)
from pydantic import BaseModel

from tests import canned
from tests.canned import Answerer, Asked, CannedServer, Said, in_turn
from tests.conftest import REPOSITORY
from tests.services import free_port
from tests.serving import Service, jsonl


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process, for the server at `url`."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("GRADSTORE_API_KEY", raising=False)

    def run_command(*words: str, url: str = "http://127.0.0.1:1") -> Ran:
        monkeypatch.setenv("GRADSTORE_URL", url)
        with pytest.raises(SystemExit) as ended:
            cli.app(list(words), prog_name="gradstore")
        printed = capsys.readouterr()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), printed.out, printed.err)

    return run_command


def asked_by(run: Run, answerer: Answerer | Said, *words: str) -> tuple[Ran, list[Asked]]:
    """Run a command for a server that answers so."""
    with CannedServer(answerer if callable(answerer) else in_turn(answerer)) as server:
        return run(*words, url=server.url), server.asked


# Help -------------------------------------------------------------------------------------------------------------


def commands(command: Any, name: str = "gradstore") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, the groups included; not the server's."""
    yield name, command
    for inner, found in getattr(command, "commands", {}).items():
        yield from commands(found, f"{name} {inner}")


ALL = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("name", ALL)
def test_every_command_and_every_option_says_what_it_is_for(name: str) -> None:
    command = ALL[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name}"


def test_the_command_line_has_what_was_promised() -> None:
    plain = {"list", "show", "rename", "delete"}
    promised = {
        "datasets": plain | {"upload", "rows", "lengths", "content"},
        "tasks": plain | {"upload", "register", "download"},
        "checkpoints": plain | {"upload", "register", "download"},
        "adapters": plain | {"upload", "register", "choose", "download"},
        "adapter-choices": plain | {"rows"},
        "allocations": {"preview"},
        "runs": plain | {"create"},
        "gradients": plain | {"create", "rows", "features"},
        "selections": plain | {"rows", "explain", "content", "export", "provenance"},
        "finetunes": plain | {"create", "download"},
        "evaluations": plain | {"create"},
        "generations": plain | {"create"},
        "validations": plain | {"create"},
        "predictors": plain | {"create"},
        "cascades": plain | {"create"},
        "estimates": plain | {"create", "rows"},
        "estimate-validations": plain | {"create"},
        "attributions": plain | {"create"},
        "comparisons": plain | {"create"},
        "conversions": plain | {"create"},
        "imports": plain | {"create"},
        "streams": plain | {"upload", "create", "content"},
        "annotations": plain | {"upload", "create", "rows"},
        "taxonomies": plain | {"create"},
        "projectors": plain | {"create", "epochs", "histogram", "download"},
        "embeddings": plain | {"create", "rows", "download"},
        "jobs": {"list", "show", "wait", "prioritise", "cancel", "retry", "watch", "delete"},
        "workers": {"list", "show"},
    }
    for noun, verbs in promised.items():
        assert {name.split()[2] for name in ALL if name.startswith(f"gradstore {noun} ")} == verbs
    assert {"gradstore select", "gradstore scores", "gradstore why", "gradstore less", "gradstore health"} <= ALL.keys()


def test_help_needs_neither_the_client_nor_the_server() -> None:
    code = (
        "import sys; from gradstore import cli\n"
        "try: cli.app(['--help'])\n"
        "finally: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"httpx", "torch", "numpy", "pandas", "datasets", "fastapi", "service", "worker", "datastore"}
    assert not heavy & set(done.stderr.split())
    for name in ("serve", "worker", "datasets", "less"):
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)


def test_help_is_the_same_with_one_dash(run: Run) -> None:
    assert run("-h").out == run("--help").out
    assert run("select", "-h").code == 0


def test_the_version_is_the_distributions(run: Run) -> None:
    import gradstore

    assert run("--version").out.strip() == gradstore.__version__


def test_without_the_server_its_commands_say_how_to_get_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda **_: ())
    assert "pip install 'gradstore-server[service,worker]'" in " ".join(run("--help").out.split())
    served = run("serve", "--port", "80")
    assert served.code == 1
    assert "pip install 'gradstore-server[service,worker]'" in served.err


def served(*, port: Annotated[int, typer.Option(help="Port.")] = 8000) -> None:
    """Serve, as the server's distribution would."""
    typer.echo(f"serving on {port}")


def test_a_command_of_the_server_is_found_by_its_entry_point(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoint(name="serve", value=f"{__name__}:served", group="gradstore.commands")
    monkeypatch.setattr(cli, "entry_points", lambda **wanted: [found] if wanted["name"] == "serve" else [])
    assert run("serve", "--port", "81").out == "serving on 81\n"
    assert "Port." in run("serve", "--help").out
    assert run("serve", "--port", "many").code == 2


def test_a_group_of_the_server_is_found_by_its_entry_point(run: Run) -> None:
    assert "revoke" in run("keys", "--help").out
    twice = run("keys", "list", "--data", "a", "--data", "b")
    assert (twice.code, "--data takes one value" in twice.err) == (2, True)


def test_an_option_is_there_for_every_field_a_request_has() -> None:
    options = {option for parameter in ALL["gradstore finetunes create"].params for option in parameter.opts}
    assert {"--model", "--lora-r", "--lora-target", "--warmup-ratio", "--selection", "--wait", "--dry-run"} <= options
    options = {option for parameter in ALL["gradstore gradients create"].params for option in parameter.opts}
    assert {"--dim", "--checkpoint", "--token-budget"} <= options
    assert not set(HELP) - {parameter.name for command in ALL.values() for parameter in command.params}, (
        "a text that no command uses"
    )


def test_help_shows_the_defaults_of_the_request(run: Run) -> None:
    text = " ".join(run("finetunes", "create", "--help").out.split())
    assert "[default: 2e-05]" in text
    assert "[default: q_proj, k_proj, v_proj, o_proj]" in text
    assert "[default: 0]" in text


# Exit codes -------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("health", url=f"http://127.0.0.1:{free_port()}")
    assert ran.code == 1
    assert not ran.out
    assert "gradstore serve" in ran.err


def test_a_refusal_is_exit_code_1_with_its_reason_on_stderr(run: Run) -> None:
    refusal = canned.problem(422, "pct: 5 % is 0.05", errors=[{"parameter": "pct", "detail": "5 % is 0.05"}])
    ran, _ = asked_by(run, Said(refusal, status=422), "select", "--task", "mmlu", "--pct", "5")
    assert ran == Ran(1, "", "pct: 5 % is 0.05\n")


ADVICE = {
    "no task is called 'm'; GET /tasks lists what there is":
        "no task is called 'm'; `gradstore tasks list` shows what there is",
    "choose another, or send replace=true to move it": "choose another, or say --replace to move it",
    "correct the file, or send on_error=skip": "correct the file, or say --on-error skip",
    "ft_1 is running: POST /jobs/ft_1/cancel first": "ft_1 is running: gradstore jobs cancel ft_1 first",
    "it is deleted with what it made: DELETE /finetunes/ft_1":
        "it is deleted with what it made: gradstore finetunes delete ft_1",
    'POST /gradients {"dataset": "<dataset>", "checkpoints": ["a", "b"], "max_length": 64} computes them':
        "gradstore gradients create --dataset '<dataset>' --checkpoint a --checkpoint b --max-length 64 computes them",
    'POST /gradients {"task": "t"} computes them, and POST /conversions {"task": "t", "dtype": "int8"} then makes it':
        "gradstore gradients create --task t computes them, and gradstore conversions create --task t --dtype int8 "
        "then makes it",
    'the base model as it is that POST /checkpoints {"model": "…"} registers':
        "the base model as it is that gradstore checkpoints register --model '…' registers",
    "/fraction: 5 % is 0.05": "fraction: 5 % is 0.05",
    "no dataset or selection is called 'x'; GET /datasets and GET /selections list what there is":
        "no dataset or selection is called 'x'; `gradstore datasets list` and `gradstore selections list` show what "
        "there is",
    'say which weights, for example weights=["*.q_proj.weight"], or ask for kinds=["embedding"]':
        "say which weights, for example --weight '*.q_proj.weight', or ask for --kind embedding",
    "convert from float16, or POST /gradients with dtype=binary":
        "convert from float16, or gradstore gradients create --dtype binary",
    'there is no cascade yet: POST /cascades {"dataset": "ds_1", "task": "task_1", "budget": 0.2}, and ask again':
        "there is no cascade yet: gradstore cascades create --dataset ds_1 --task task_1 --budget 0.2, and ask again",
    'and POST /embeddings {"projector": "proj_1", "streams": {"gradients": "str_…"}} with the task\'s':
        "and gradstore embeddings create --projector proj_1 --gradients 'str_…' with the task's",
    "there is none: POST /projectors with the streams and the annotations":
        "there is none: gradstore projectors create with the streams and the annotations",
    "The chosen rows with their scores are at GET /selections/sel_1":
        "The chosen rows with their scores are printed by gradstore selections rows sel_1",
    "there is no dataset to select from: upload one with POST /datasets":
        "there is no dataset to select from: upload one with gradstore datasets upload",
    "send the server's API key: Authorization: Bearer <GRADSTORE_API_KEY>":
        "send the server's API key: --api-key, or better the variable GRADSTORE_API_KEY",
}  # fmt: skip


@pytest.mark.parametrize("detail", ADVICE)
def test_what_the_service_advises_is_said_as_commands(run: Run, detail: str) -> None:
    ran, _ = asked_by(run, Said(canned.problem(409, detail), status=409), "datasets", "show", "pool")
    assert ran == Ran(1, "", f"{ADVICE[detail]}\n")


def test_of_several_answers_those_options_are_shown_that_differ(run: Run) -> None:
    asked = "http://gpu:8000/select?task=mmlu&pct=0.05&dim=8192&run="
    detail = f"2 sets of features fit; say which one is meant (run, dim), for example {asked}run_1"
    choices = [{"detail": f"{asked}{end}"} for end in ("run_1", "run_2&checkpoint=ck_1&checkpoint=ck_2")]
    problem = canned.problem(409, detail, errors=choices) | {"type": "ambiguous"}
    ran, _ = asked_by(run, Said(problem, status=409), "select", "--task", "mmlu", "--pct", "0.05")
    assert ran.err.splitlines() == [
        "2 sets of features fit: say which one is meant",
        "  --run run_1",
        "  --run run_2 --checkpoint ck_1 --checkpoint ck_2",
    ]


def test_choices_of_a_requests_fields_are_shown_as_options(run: Run) -> None:
    choices = [{"detail": json.dumps({"checkpoints": ["ck_1", "ck_2"], "dim": dim})} for dim in (256, 8192)]
    detail = f"the task mmlu has 2 sets of gradients that fit; say which one is meant, for example with {choices[0]}"
    problem = canned.problem(409, detail, errors=choices) | {"type": "ambiguous"}
    ran, _ = asked_by(run, Said(problem, status=409), "cascades", "create", "--dataset", "p", "--task", "mmlu",
                      "--budget", "0.2")  # fmt: skip
    assert ran.err.splitlines() == [
        "the task mmlu has 2 sets of gradients that fit: say which one is meant",
        "  --dim 256",
        "  --dim 8192",
    ]


def test_a_new_users_mistakes_are_told_as_commands(run: Run, shared_service: Service, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n" + '{"prompt": "a", "completion": "b"}\n')
    url = shared_service.url
    assert "`gradstore tasks list`" in run("select", "--task", "mmlu", "--pct", "0.05", url=url).err
    assert "--on-error skip" in run("datasets", "upload", str(tmp_path / "bad.jsonl"), url=url).err
    assert f"{tmp_path} is a folder" in run("datasets", "upload", str(tmp_path), url=url).err
    shared_service.pool(2, name="mine")
    (tmp_path / "good.jsonl").write_bytes(jsonl(3))
    taken = run("datasets", "upload", str(tmp_path / "good.jsonl"), "--name", "mine", url=url)
    assert "say --replace to move it" in taken.err
    there = run("datasets", "content", "mine", "-o", str(tmp_path / "no" / "where"), url=url)
    assert (there.code, there.err) == (1, f"{tmp_path}/no/where: No such file or directory\n")


def test_an_error_of_the_server_is_printed_with_its_request(run: Run) -> None:
    ran, _ = asked_by(run, Said(canned.problem(500, "unforeseen"), status=500), "health")
    assert ran.code == 1
    assert "req_7" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("finetunes", "create"),
        ("select", "--task", "x", "--lines", "--csv"),
        ("datasets", "upload", "/does/not/exist.jsonl"),
        ("datasets", "upload", "-"),
        ("datasets", "content", "pool", "--source", "ab12"),
        ("gradients", "create", "--kind", "unheard"),
        ("--url", "localhost:8000", "health"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(run: Run, words: tuple[str, ...]) -> None:
    ran = run(*words)
    assert ran.code == 2
    assert not ran.out
    assert ran.err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("less", "pool.jsonl", "--task", "mmlu", "--task", "bbh", "--model", "m"), "--task"),
        (("select", "--pct", "0.05", "--k=3", "--pct=0.1"), "--pct"),
        (("selections", "export", "best", "-o", "one", "--output", "two"), "--output"),
        (("--url", "http://a", "--url", "http://b", "health"), "--url"),
        (("serve", "--port", "1", "--port", "2"), "--port"),
    ],
)
def test_an_option_of_one_value_is_refused_where_it_is_given_twice(
    run: Run, words: tuple[str, ...], option: str
) -> None:
    ran = run(*words)
    assert ran.code == 2
    assert f"{option} takes one value, and is given 2 times" in ran.err


@pytest.mark.parametrize("words", [("jobs", "wait", "ft_1"), ("jobs", "watch", "ft_1")], ids=" ".join)
def test_a_failed_job_is_exit_code_3(run: Run, words: tuple[str, ...]) -> None:
    failed = canned.job("failed", error=canned.problem(500, "out of memory: try a smaller device_batch_size"))
    stream = f"event: finished\ndata: {json.dumps(failed)}\n\n".encode()

    def answer(asked: Asked) -> Said:
        return Said(body=stream) if asked.path.endswith("/events") else Said(failed)

    ran, _ = asked_by(run, answer, *words)
    assert ran.code == 3
    assert "out of memory" in ran.err


def test_an_interrupted_wait_is_exit_code_130_and_leaves_the_job(tmp_path: Path) -> None:
    with CannedServer(in_turn(Said(canned.job("running"), status=202))) as server:
        command = [sys.executable, "-m", "gradstore", "finetunes", "create", "--model", "m", "--dataset", "d", "--wait"]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"GRADSTORE_URL": server.url},
        )  # fmt: skip
        while len(server.asked) < 3:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert not out
    assert "the job goes on: gradstore jobs wait ft_1" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [("--help",), ("select", "--help"), ("datasets", "list"), ("datasets", "list", "--json"), ("datasets", "show", "a"),
     ("datasets", "content", "a")],
    ids=" ".join,
)  # fmt: skip
def test_output_that_nobody_reads_any_more_ends_the_command_quietly(words: tuple[str, ...]) -> None:
    def answer(asked: Asked) -> Said:
        if asked.path.endswith("/content"):
            return Said(body=b"{}\n" * 100_000)
        return canned.page([canned.dataset()], asked, size=1) if asked.path == "/datasets" else Said(canned.dataset())

    reading, writing = os.pipe()
    os.close(reading)
    with CannedServer(answer) as server:
        done = subprocess.run(
            [sys.executable, "-m", "gradstore", *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"GRADSTORE_URL": server.url},
        )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_degraded_service_is_exit_code_1(run: Run) -> None:
    check = {"name": "workers", "ok": False, "required": False, "detail": "none was seen"}
    state = {"version": "0.1.0", "checks": [check], "workers": [], "free_bytes": 5}
    assert asked_by(run, Said({**state, "status": "ok"}), "health")[0].code == 0
    ran, _ = asked_by(run, Said({**state, "status": "degraded"}), "health")
    assert ran.code == 1
    assert re.search(r"^workers +missing +none was seen$", ran.out, re.MULTILINE)
    ran, _ = asked_by(run, Said({**state, "status": "degraded"}), "health", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["status"] == "degraded"


def test_what_is_in_the_way_on_this_machine_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "file").touch()
    ran, _ = asked_by(run, Said(), "finetunes", "download", "ft_1", str(tmp_path / "adapter"))
    assert ran.code == 1
    assert "exists" in ran.err


# Data on stdout ---------------------------------------------------------------------------------------------------


def test_an_upload_prints_the_id_alone_on_stdout(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    report = {
        "rows": 3, "skipped": 2, "total_notes": 30,
        "problems": [{"line": 4, "detail": "not JSON"}], "notes": [{"line": 1, "detail": "no id"}],
    }  # fmt: skip
    words = ["datasets", "upload", str(tmp_path / "pool.jsonl"), "--name", "tulu", "--on-error", "skip", "--replace"]
    ran, (asked,) = asked_by(run, Said(canned.uploaded(report=report)), *words)
    assert ran.code == 0
    assert ran.out == "ds_pool\n"
    assert "3 rows, 2 left out" in ran.err
    assert "line 4: not JSON" in ran.err
    assert "29 more" in ran.err
    assert {name: content for name, (_, content) in asked.parts.items() if name != "file"} == {
        "name": b"tulu", "on_error": b"skip", "replace": b"true",
    }  # fmt: skip


def test_rows_of_gradients_are_printed_or_saved(run: Run, tmp_path: Path) -> None:
    row = {"row": 7, "norm": 1.5, "raw_norm": 0.25, "loss": 0.5, "logodds": -2.5, "tokens": 3, "reason": None}
    page = {"feature_set": canned.FEATURE_SET, "data": [row], "has_more": False}
    words = ["gradients", "rows", "grad_1", "--feature-set", "feat_1"]
    ran, (asked,) = asked_by(run, Said(page), *words, "--json")
    assert json.loads(ran.out) == row
    assert (asked.path, asked.query["feature_set"]) == ("/gradients/grad_1/rows", ["feat_1"])
    _, (asked,) = asked_by(run, Said(body=b"array"), *words, "--output", str(tmp_path / "rows.npy"))
    assert asked.headers["Accept"] == "application/x-npy"
    assert (tmp_path / "rows.npy").read_bytes() == b"array"


def test_a_pool_can_be_piped_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}\n")))
    ran, (asked,) = asked_by(run, Said(canned.uploaded()), "datasets", "upload", "-", "--filename", "pool.jsonl")
    assert ran.code == 0
    assert asked.parts["file"] == ("pool.jsonl", b"{}\n")


def test_json_is_one_object_per_line(run: Run) -> None:
    items = [canned.dataset(str(number)) for number in range(5)]
    ran, asked = asked_by(run, lambda asked: canned.page(items, asked, size=2), "datasets", "list", "--json")
    assert [json.loads(line)["id"] for line in ran.out.splitlines()] == [f"ds_{number}" for number in range(5)]
    assert len(asked) == 3
    ran, asked = asked_by(
        run, lambda asked: canned.page(items, asked, size=2), "datasets", "list", "--json", "--limit", "1"
    )
    assert len(ran.out.splitlines()) == 1
    assert len(asked) == 1


def test_a_table_is_not_cut_when_it_is_piped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    long = canned.dataset("name" * 50)
    ran, _ = asked_by(run, Said({"data": [long], "has_more": False}), "datasets", "list")
    heading, line = ran.out.splitlines()
    assert heading.split() == ["id", "name", "rows", "bytes", "age"]
    assert "name" * 50 in line.split()


@pytest.mark.parametrize(
    "noun",
    [
        "datasets",
        "tasks",
        "gradients",
        "finetunes",
        "evaluations",
        "validations",
        "attributions",
        "comparisons",
        "jobs",
    ],
)
def test_every_list_can_be_printed(run: Run, noun: str) -> None:
    items = {
        "datasets": canned.dataset(), "tasks": canned.task(), "jobs": canned.job("failed"),
        "gradients": canned.job("running", kind="gradients"), "finetunes": canned.job("queued", name="warmup"),
        "evaluations": canned.job("succeeded", kind="evaluation"),
        "validations": canned.job("succeeded", kind="validation"),
        "comparisons": canned.job("succeeded", kind="comparison"),
        "attributions": canned.job("running", kind="attribution"),
    }  # fmt: skip
    listed = Said({"data": [items[noun]], "has_more": False})
    ran, _ = asked_by(run, lambda asked: listed if asked.path == f"/{noun}" else naming(asked) or listed, noun, "list")
    assert ran.code == 0
    assert items[noun]["id"] in ran.out


@pytest.mark.parametrize(
    ("noun", "item", "said"),
    [
        ("gradients", canned.job("running", kind="gradients"), {"of": "tulu"}),
        ("finetunes", canned.job("queued"), {"of": "tulu, tiny"}),
        ("evaluations", canned.job("succeeded", kind="evaluation"), {"of": "mmlu, ft_1"}),
        ("jobs", canned.job("failed"), {"kind": "finetune", "of": "tulu, tiny"}),
        ("selections", canned.selection(3), {"method": "influence", "tasks": "mmlu", "pool": "tulu"}),
    ],
)
def test_a_list_says_what_its_things_are_of(run: Run, noun: str, item: dict[str, Any], said: dict[str, str]) -> None:
    listed = Said({"data": [item], "has_more": False})
    ran, _ = asked_by(run, lambda asked: listed if asked.path == f"/{noun}" else naming(asked) or listed, noun, "list")
    heading, line = (re.split(r" {2,}", text.strip()) for text in ran.out.splitlines())
    assert dict(zip(heading, line, strict=True)).items() >= said.items()


def test_a_projector_and_an_embedding_are_listed_with_their_streams() -> None:
    class Called:
        def called(self, reference: str) -> str:
            return reference.upper()

    streams = {"gradients": "of-pool", "routing": None, "hidden": "states"}
    requests = [
        (ProjectorRequest.model_validate({"annotations": "labels", "streams": streams}), "OF-POOL, STATES, LABELS"),
        (EmbeddingRequest.model_validate({"projector": "mine", "streams": streams}), "MINE, OF-POOL, STATES"),
    ]
    for request, said in requests:
        job = SimpleNamespace(request=request)
        assert listed(Called())["of"](job) == said  # type: ignore[arg-type]


def test_show_rounds_what_people_read_and_json_does_not(run: Run) -> None:
    job = canned.job("running", kind="gradients")
    job["progress"]["rate"] = 0.1 + 0.2
    ran, _ = asked_by(run, Said(job), "gradients", "show", "grad_1")
    assert '"rate": 0.3,' in ran.out
    ran, _ = asked_by(run, Said(job), "gradients", "show", "grad_1", "--json")
    assert '"rate":0.30000000000000004' in ran.out


def test_show_prints_a_line_for_each_field(run: Run) -> None:
    ran, _ = asked_by(run, Said(canned.dataset()), "datasets", "show", "pool")
    assert re.search(r"^rows +3$", ran.out, re.MULTILINE)
    assert re.search(r'^origins +{"a": 3}$', ran.out, re.MULTILINE)
    ran, _ = asked_by(run, Said(canned.dataset()), "datasets", "show", "pool", "--json")
    assert json.loads(ran.out) == canned.dataset()


def test_names_are_given_taken_and_deleted_with(run: Run) -> None:
    _, asked = asked_by(run, Said(canned.dataset()), "datasets", "rename", "pool", "new")
    assert asked[0].json == {"name": "new"}
    _, asked = asked_by(run, Said(canned.dataset()), "datasets", "rename", "pool")
    assert asked[0].json == {"name": None}
    ran, asked = asked_by(run, Said(status=204), "tasks", "delete", "one", "two")
    assert ran == Ran(0, "", "")
    assert [(one.method, one.path) for one in asked] == [("DELETE", "/tasks/one"), ("DELETE", "/tasks/two")]


def test_original_rows_are_printed_byte_for_byte(run: Run, tmp_path: Path) -> None:
    rows = '{"a": "\u2028 ☃"}\n{"b": 1}\n'.encode()
    ran, _ = asked_by(run, Said(body=rows), "datasets", "content", "pool")
    assert ran.out.encode() == rows
    ran, _ = asked_by(run, Said(body=rows), "datasets", "content", "pool", "-o", str(tmp_path / "rows"))
    assert not ran.out
    assert (tmp_path / "rows").read_bytes() == rows


# Jobs -------------------------------------------------------------------------------------------------------------


def test_a_started_job_prints_its_id_and_how_to_wait_for_it(run: Run) -> None:
    words = ["finetunes", "create", "--model", "tiny", "--dataset", "pool", "--fraction", "0.05", "--lora-r", "8"]
    words += ["--lora-target", "q_proj", "--lora-target", "v_proj", "--gradient-checkpointing"]
    ran, (asked,) = asked_by(run, Said(canned.job("queued"), status=202), *words)
    assert ran.out == "ft_1\n"
    assert "gradstore jobs wait ft_1" in ran.err
    assert asked.json == {
        "model": "tiny",
        "dataset": "pool",
        "fraction": 0.05,
        "lora": {"r": 8, "targets": ["q_proj", "v_proj"]},
        "gradient_checkpointing": True,
    }


def test_rows_that_a_job_did_without_are_told(run: Run) -> None:
    result = canned.RESULTS["finetune"] | {"skipped_rows": 12}
    done = canned.job("succeeded", result=result)
    words = ["finetunes", "create", "--model", "m", "--dataset", "d", "--wait"]
    ran, _ = asked_by(run, Said(done, status=200), *words)
    assert "12 rows were not trained on" in ran.err
    first = {"row": 7, "checkpoint": "ck_1", "kinds": ["sgd"], "reason": "the gradient is zero"}
    result = canned.RESULTS["gradients"] | {"total_excluded": 3, "excluded": [first]}
    done = canned.job("succeeded", kind="gradients", result=result)
    ran, _ = asked_by(run, Said(done, status=200), "gradients", "create", "--task", "t", "--run", "r", "--wait")
    assert (
        "3 features are missing (of a row, at a checkpoint); the first is that of row 7: the gradient is zero"
        in ran.err
    )
    assert ran.out == "grad_1\n"


def test_all_linear_layers_can_be_named_at_once(run: Run) -> None:
    words = ["finetunes", "create", "--model", "m", "--dataset", "d", "--lora-target", "all-linear"]
    _, (asked,) = asked_by(run, Said(canned.job("queued"), status=202), *words)
    assert asked.json["lora"] == {"targets": "all-linear"}


def test_lists_are_given_by_repeating(run: Run) -> None:
    words = ["gradients", "create", "--task", "t", "--checkpoint", "a", "--checkpoint", "b", "--dim", "64"]
    _, (asked,) = asked_by(run, Said(canned.job("queued", kind="gradients"), status=202), *words)
    assert asked.json == {"task": "t", "checkpoints": ["a", "b"], "dims": [64]}


def test_weights_are_named_by_patterns_and_a_model_is_registered_without_a_path(run: Run) -> None:
    words = ["gradients", "create", "--task", "t", "--run", "r", "--weight", "*.q_proj.weight", "--weight", "*.mlp.*"]
    _, (asked,) = asked_by(run, Said(canned.job("queued", kind="gradients"), status=202), *words)
    assert asked.json == {"task": "t", "run": "r", "weights": ["*.q_proj.weight", "*.mlp.*"]}
    answer = Said(canned.base_model(), status=201)
    ran, (asked,) = asked_by(run, answer, "checkpoints", "register", "--model", "org/base")
    assert asked.json == {"model": "org/base"}
    assert (ran.out, ran.err) == ("ck_1\n", "it has no Adam moments: a base model has none\n")


def test_a_dry_run_prints_the_cost(run: Run) -> None:
    ran, (asked,) = asked_by(
        run, Said(canned.estimate()), "gradients", "create", "--task", "t", "--run", "r", "--dry-run", "--json"
    )
    assert asked.json["dry_run"] is True
    assert json.loads(ran.out) == canned.estimate()


@pytest.mark.parametrize(
    ("words", "path", "answer"),
    [
        ("predictors create --dataset p --task t", "/predictors", PredictorEstimate),
        ("cascades create --dataset p --task t --budget 0.2", "/cascades", CascadeEstimate),
        ("estimates create --dataset p --task t", "/estimates", EstimatesCost),
        ("estimate-validations create --estimates e --model m", "/estimates/validations", ValidationEstimate),
        ("adapters choose --task t --base-model m", "/adapters/choices", AdapterChoiceEstimate),
        ("projectors create --gradients g --annotations a", "/projectors", ProjectorEstimate),
        ("embeddings create --projector p --gradients g", "/embeddings", EmbeddingEstimate),
        ("annotations create --dataset p --by origin", "/annotations", AnnotationEstimate),
    ],
)
def test_a_dry_run_of_what_learns_prints_what_the_page_shows(
    run: Run, words: str, path: str, answer: type[BaseModel]
) -> None:
    page = (REPOSITORY / "docs/api.md").read_text()
    [shown] = re.findall(rf"^```json answer {answer.__name__}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    ran, (asked,) = asked_by(run, Said(json.loads(shown)), *words.split(), "--dry-run", "--json")
    assert (asked.method, asked.path, asked.json["dry_run"]) == ("POST", path, True)
    assert json.loads(ran.out) == json.loads(shown)


def test_waiting_prints_the_id_when_it_is_done(run: Run) -> None:
    states = in_turn(*[Said(canned.job(status)) for status in ("queued", "running", "succeeded")])
    ran, _ = asked_by(run, states, "jobs", "wait", "ft_1")
    assert ran == Ran(0, "ft_1\n", "")
    ran, _ = asked_by(run, Said(canned.job("running")), "jobs", "wait", "ft_1", "--timeout", "0.1")
    assert ran.code == 1
    assert "the job goes on" in ran.err


def test_an_evaluation_that_is_waited_for_prints_what_was_measured(run: Run) -> None:
    def answer(asked: Asked) -> Said:
        return Said(canned.job("queued" if asked.method == "POST" else "succeeded", kind="evaluation"))

    words = ["evaluations", "create", "--finetune", "ft_1", "--task", "mmlu", "--task", "bbh", "--no-baseline"]
    ran, asked = asked_by(run, answer, *words, "--wait")
    assert asked[0].json == {"finetune": "ft_1", "tasks": ["mmlu", "bbh"], "baseline": False}
    assert [line.split()[0] for line in ran.out.splitlines()] == ["model", "base", "tuned"]
    assert "1.9 to 2.1" in ran.out
    assert asked_by(run, answer, "evaluations", "show", "eval_1")[0].out == ran.out
    assert asked_by(run, answer, *words)[0].out == "eval_1\n"


def test_adapters_are_measured_alone_or_as_one(run: Run) -> None:
    def asked(*words: str) -> dict[str, Any]:
        queued = Said(canned.job("queued", kind="evaluation"))
        found = asked_by(run, queued, "evaluations", "create", "--task", "mmlu", *words)[1][0].json
        assert isinstance(found, dict)
        return found

    assert asked("--adapter", "arc") == {"adapter": "arc", "tasks": ["mmlu"]}
    several = ["--adapter", "arc", "--adapter", "gsm8k"]
    merged = asked(*several, "--combine", "cat", "--merge-weight", "0.25", "--merge-weight", "0.75")
    assert merged == {
        "adapters": ["arc", "gsm8k"], "combine": "cat", "merge_weights": [0.25, 0.75], "tasks": ["mmlu"]
    }  # fmt: skip
    routed = asked(*several, "--combine", "arrow", "--arrow-top-k", "1")
    assert routed["arrow_top_k"] == 1


def test_a_validation_says_of_each_of_the_scores_how_well_they_predict(run: Run) -> None:
    def answer(asked: Asked) -> Said:
        return Said(canned.job("queued" if asked.method == "POST" else "succeeded", kind="validation"))

    words = ["validations", "create", "--dataset", "pool", "--task", "mmlu", "--model", "tiny", "--subsets", "8"]
    scores = ["--scores", "kind=adam,dim=64", "--scores", '{"checkpoints": ["ck_1"]}', "--scores", "control=random"]
    ran, asked = asked_by(run, answer, *words, *scores, "--wait")
    assert asked[0].json == {
        "dataset": "pool", "task": "mmlu", "model": "tiny", "subsets": 8,
        "scores": [{"kind": "adam", "dim": "64"}, {"checkpoints": ["ck_1"]}, {"control": "random"}],
    }  # fmt: skip
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[1:] == [
        ["adam", "0.300", "0.200", "to", "0.400", "–", "–"],
        ["random", "0.000", "-0.100", "to", "0.100", "-0.300", "-0.400", "to", "-0.200"],
    ]
    assert asked_by(run, answer, "validations", "show", "val_1")[0].out == ran.out
    assert asked_by(run, answer, *words)[0].out == "val_1\n"
    dry, asked = asked_by(run, Said(canned.validation_estimate()), *words, "--dry-run")
    assert asked[0].json["dry_run"] is True
    assert re.search(r"^trainings +64$", dry.out, re.MULTILINE)


def test_a_comparison_is_a_table_for_each_task_and_what_each_two_share(run: Run) -> None:
    def answer(asked: Asked) -> Said:
        return Said(canned.job("queued" if asked.method == "POST" else "succeeded", kind="comparison"))

    words = ["--dataset", "pool", "--task", "mmlu", "--k", "2", "--train", "--model", "tiny", "--repeats", "2"]
    ways = ["--contestant", "method=influence,aggregate=avg", "--contestant", '{"checkpoints": ["ck_1"]}']
    ran, asked = asked_by(run, answer, "compare", *words, *ways)
    assert asked[0].json == {
        "dataset": "pool", "tasks": ["mmlu"], "k": 2, "train": True, "model": "tiny", "repeats": 2,
        "contestants": [{"method": "influence", "aggregate": "avg"}, {"checkpoints": ["ck_1"]}],
    }  # fmt: skip
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[1] == [
        *("influence", "sel_influence", "2", "flan", "100%", "0.5", "1.5", "2.0000", "1.9000", "to", "2.1000"),
        *("-0.2500", "-0.3500", "to", "-0.1500"),
    ]
    assert lines[2][-2:] == ["–", "–"]
    assert [line[1:] for line in lines[4:]] == [["–", "0.50"], ["0.50", "–"]]
    assert "mmlu: loss before training 2.5000" in ran.err
    assert "left out: rds: POST /gradients computes them" in ran.err
    assert asked_by(run, answer, "comparisons", "show", "cmp_1")[0].out == ran.out
    assert asked_by(run, answer, "comparisons", "create", *words, "--wait")[0].out == ran.out
    assert asked_by(run, answer, "comparisons", "create", *words)[0].out == "cmp_1\n"
    dry, asked = asked_by(run, Said(canned.comparison_estimate()), "compare", *words, "--dry-run")
    assert asked[0].json["dry_run"] is True
    assert re.search(r"^trainings +11$", dry.out, re.MULTILINE)


@pytest.mark.parametrize("scores", ["adam", "kind=adam,dim", "{kind"])
def test_scores_that_name_nothing_are_refused(run: Run, scores: str) -> None:
    words = ["validations", "create", "--dataset", "pool", "--task", "mmlu", "--model", "tiny", "--scores", scores]
    ran, asked = asked_by(run, Said(canned.job("queued", kind="validation")), *words)
    assert ran.code == 2
    assert f"--scores {scores}: " in ran.err
    assert not asked


def naming(asked: Asked) -> Said | None:
    """A dataset and a task with names, and one of each that is deleted."""
    if asked.path.endswith("/gone"):
        return Said(canned.problem(404, "no such thing", type="not-found"), status=404)
    made = {"datasets": canned.dataset("tulu"), "tasks": canned.task("mmlu")}
    noun = asked.path.split("/")[1]
    return Said(made[noun]) if noun in made else None


def attributed(asked: Asked) -> Said:
    return naming(asked) or Said(canned.job("queued" if asked.method == "POST" else "succeeded", kind="attribution"))


def test_why_prints_what_helps_and_what_opposes(run: Run) -> None:
    ran, asked = asked_by(run, attributed, "why", "Who?", "He.", "--k", "1", "--dataset", "pool", "--origin", "dolly")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]
    assert asked[0].json == {"rows": [{"messages": turns}], "k": 1, "datasets": ["pool"], "origins": ["dolly"]}
    helps, opposes = ran.out.split("opposes most")
    assert helps.startswith("loss 1.5 over 2 tokens\n\nhelps most\n")
    assert helps.split()[-7:] == ["1", "0.5", "dolly", "7", "row-7", "text", "7"]
    assert "second line" not in ran.out
    assert "-0.25" in opposes
    assert "tulu: 3 rows, by every row" in ran.err
    with_parts, _ = asked_by(run, attributed, "why", "Who?", "He.", "--parts")
    assert {"ck_1", "ck_2", "0.375", "0.125"} <= set(with_parts.out.split())
    as_json, _ = asked_by(run, attributed, "why", "Who?", "He.", "--json")
    assert json.loads(as_json.out)["result"]["data"][0]["most"][0]["row"] == 7
    assert asked_by(run, attributed, "attributions", "show", "attr_1", "--parts")[0].out == with_parts.out


def test_attributions_are_made_of_a_files_rows(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "said.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}\n')
    ran, asked = asked_by(run, attributed, "attributions", "create", str(file))
    assert (ran.out, asked[0].json) == (
        "attr_1\n", {"rows": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]}
    )  # fmt: skip
    waited, _ = asked_by(run, attributed, "attributions", "create", str(file), "--wait")
    assert "helps most" in waited.out
    for text, message in (
        ('{"prompt": "a"}\n{', "line 2 is not JSON"),
        ("[]", "line 1 is no JSON object"),
        ("", "no rows"),
    ):
        file.write_text(text)
        refused = run("attributions", "create", str(file), url="http://127.0.0.1:9")
        assert refused.code == 2
        assert message in " ".join(refused.err.split())


def test_cancelled_and_retried_jobs_are_printed(run: Run) -> None:
    for verb in ("cancel", "retry"):
        ran, asked = asked_by(run, Said(canned.job("cancelled")), "jobs", verb, "ft_1")
        assert ran.out == "ft_1\n"
        assert [one.path for one in asked] == [f"/jobs/ft_1/{verb}"]


def test_watching_prints_every_state(run: Run) -> None:
    states = [canned.job("running"), canned.job("succeeded")]
    stream = "".join(f"event: progress\ndata: {json.dumps(state)}\n\n" for state in states)
    ran, _ = asked_by(run, Said(body=stream.encode()), "jobs", "watch", "ft_1")
    assert ran.code == 0
    assert ran.out.split() == ["running", "4/10", "steps", "succeeded", "10/10", "steps"]


# Selection --------------------------------------------------------------------------------------------------------


def selecting(asked: Asked) -> Said:
    if (named := naming(asked)) is not None:
        return named
    if asked.path.endswith("/content"):
        return Said(body=b"file,row\n" if asked.headers["Accept"] == "text/csv" else b'{"row": 1}\n')
    start = int(asked.query.get("after", ["0"])[0])
    limit = int(asked.query.get("limit", ["1000"])[0])
    return Said(canned.selection(30, start=start, stop=start + limit))


def test_select_prints_the_best_rows_and_tells_the_id(run: Run) -> None:
    ran, asked = asked_by(run, selecting, "select", "--task", "mmlu", "--task", "bbh", "--pct", "0.05", "--dim", "64")
    assert asked[0].query["task"] == ["mmlu", "bbh"]
    assert asked[0].query["dim"] == ["64"]
    heading, first, *others = (line.split() for line in ran.out.splitlines())
    assert heading == ["rank", "score", "dataset", "row", "id", "origin", "task", "subtask"]
    assert (first[heading.index("dataset")], first[heading.index("task")]) == ("tulu", "mmlu")
    assert len(others) == 19
    assert sum(one.path.startswith(("/tasks", "/datasets")) for one in asked) == 2, "a name is asked for once"
    assert "sel_1: 30 of 600 rows" in ran.err
    ran, _ = asked_by(run, selecting, "select", "--task", "mmlu", "--k", "30", "--limit", "0", "--json")
    assert len(json.loads(ran.out)["data"]) == 30


def test_select_gives_the_original_rows_or_the_table(run: Run, tmp_path: Path) -> None:
    words = ["select", "--task", "mmlu", "--pct", "0.05"]
    assert asked_by(run, selecting, *words, "--lines")[0].out == '{"row": 1}\n'
    assert asked_by(run, selecting, *words, "--csv")[0].out == "file,row\n"
    ran, asked = asked_by(run, selecting, *words, "-o", str(tmp_path / "best.jsonl"), "--name", "best")
    assert not ran.out
    assert (tmp_path / "best.jsonl").read_text() == '{"row": 1}\n'
    assert asked[1].json == {"name": "best"}


def test_a_selection_that_has_a_name_keeps_it(run: Run) -> None:
    def called_best(asked: Asked) -> Said:
        return (
            Said(b'{"row": 1}\n') if asked.path.endswith("/content") else Said(canned.selection(30) | {"name": "best"})
        )

    words = ["select", "--task", "mmlu", "--pct", "0.05", "--lines", "--name"]
    ran, asked = asked_by(run, called_best, *words, "other")
    assert ran.code == 2
    assert "called 'best' already (sel_1)" in " ".join(ran.err.split())
    assert [one.method for one in asked] == ["GET"]
    _, asked = asked_by(run, called_best, *words, "best")
    assert asked[1].json == {"name": "best"}


@pytest.mark.parametrize("words", [("select", "--task", "mmlu", "--k", "30"), ("selections", "content", "sel_1")])
def test_original_rows_are_not_saved_under_the_name_of_another_kind(
    run: Run, tmp_path: Path, words: tuple[str, ...]
) -> None:
    ran, asked = asked_by(run, selecting, *words, "-o", str(tmp_path / "best.parquet"))
    assert (ran.code, asked) == (2, [])
    assert "selections export" in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "count"), [("--lines", 2), ("--csv", 3), ("--json", 2)])
def test_a_limit_holds_for_every_form_of_the_rows(run: Run, format: str, count: int) -> None:
    def answer(asked: Asked) -> Said:
        if asked.path.endswith("/content"):
            return Said(body=b"file\n" + b"row\n" * 29)
        return selecting(asked) if asked.method == "GET" else Said(canned.selection(30))

    for words in (["select", "--task", "mmlu", "--k", "30"], ["select", "--recipe", "sel_1"]):
        ran, _ = asked_by(run, answer, *words, "--limit", "2", format)
        assert ran.code == 0
        found = json.loads(ran.out)["data"] if format == "--json" else ran.out.splitlines()
        assert len(found) == count


def test_a_recipe_that_is_none_is_told_in_a_few_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"method": "influence"}')
    ran, asked = asked_by(run, selecting, "select", "--recipe", str(tmp_path / "bad.json"))
    assert (ran.code, asked) == (2, [])
    first, *others = ran.err.splitlines()
    assert "selections show --json" in first
    assert others[0] == "  datasets: this is required"
    assert len(others) == 4


def test_a_selection_can_be_looked_at_again(run: Run) -> None:
    assert len(asked_by(run, selecting, "selections", "rows", "sel_1")[0].out.splitlines()) == 21
    shown, asked = asked_by(run, selecting, "selections", "show", "sel_1")
    assert asked[0].query["limit"] == ["0"]
    assert "count" in shown.out
    assert asked_by(run, selecting, "selections", "content", "sel_1", "--csv")[0].out == "file,row\n"


def test_scores_are_printed_or_saved(run: Run, tmp_path: Path) -> None:
    row = {"dataset": "gone", "row": 0, "id": None, "origin": "a", "score": None, "task": None, "subtask": None}
    page = {"recipe": canned.recipe(), "rows": 1, "data": [row], "has_more": False}

    def answer(asked: Asked) -> Said:
        if asked.headers["Accept"] != "application/json":
            return Said(body=b"array")
        return naming(asked) or Said(page)

    ran, _ = asked_by(run, answer, "scores", "--task", "mmlu")
    assert ran.out.splitlines()[1].split() == ["gone", "0", "–", "–", "a", "–", "–"]
    ran, _ = asked_by(run, answer, "scores", "--task", "mmlu", "-o", str(tmp_path / "scores.npy"))
    assert (tmp_path / "scores.npy").read_bytes() == b"array"
    assert asked_by(run, answer, "scores", "--task", "mmlu", "-o", str(tmp_path / "scores.txt"))[0].code == 2


# The whole flow ---------------------------------------------------------------------------------------------------


class Flow:
    """A service whose jobs are found again by what was asked, as the real one's are by their content."""

    def __init__(self, *, fails: str = "") -> None:
        self.fails = fails
        self.jobs: dict[str, dict[str, Any]] = {}
        self.started: list[str] = []

    def __call__(self, asked: Asked) -> Said:
        noun = asked.path.split("/")[1]
        if noun == "datasets":
            return Said(canned.uploaded() if asked.method == "POST" else canned.dataset())
        if noun == "tasks":
            return Said(canned.task())
        if noun == "select":
            return Said(canned.selection(3))
        if asked.method == "GET":
            return Said(self.jobs[asked.path.split("/")[2]])
        return self._start(noun, asked)

    def _start(self, noun: str, asked: Asked) -> Said:
        id = f"job_{asked.body.hex()}"[:250]
        known = self.jobs.get(id, {"status": "new"})
        if known["status"] != "succeeded":
            self.started.append(noun)
            kind = noun.removesuffix("s") if noun != "gradients" else noun
            failed = self.fails == noun
            error = canned.problem(500, "out of memory") if failed else None
            self.jobs[id] = canned.job("failed" if failed else "succeeded", kind=kind, id=id, error=error)
        return Said(self.jobs[id])


LESS = ["less", "pool", "--task", "mmlu", "--model", "tiny", "--epochs", "2", "--dim", "64"]


def test_less_is_the_whole_flow_in_one_command(run: Run) -> None:
    ran, asked = asked_by(run, Flow(), *LESS)
    assert ran.code == 0, ran.err
    posts = [(one.path, one.json) for one in asked if one.method == "POST"]
    warmup, of_pool, of_task, tuned, evaluation = (body for _, body in posts)
    training = {"model": "tiny", "epochs": 2}
    assert warmup == {**training, "dataset": "ds_pool", "fraction": 0.05}
    features = {"run": "run_1", "dims": [64], "dtype": "int8"}
    assert of_pool == {**features, "dataset": "ds_pool", "kinds": ["adam"]}
    assert of_task == {**features, "task": "task_mmlu", "kinds": ["sgd"]}
    assert tuned == {**training, "selection": "sel_1"}
    assert evaluation["tasks"] == ["task_mmlu"]
    selected = next(one.query for one in asked if one.path == "/select")
    assert selected["pct"] == ["0.05"]
    assert selected["run"] == ["run_1"]
    assert "[7/7]" in ran.err
    assert "1.9 to 2.1" in ran.out


def test_less_goes_on_where_it_stopped(run: Run) -> None:
    flow = Flow(fails="evaluations")
    with CannedServer(flow) as server:
        assert run(*LESS, url=server.url).code == 3
        assert flow.started == ["finetunes", "gradients", "gradients", "finetunes", "evaluations"]
        flow.fails = ""
        ran = run(*LESS, "--json", url=server.url)
        assert flow.started[5:] == ["evaluations"]
    assert json.loads(ran.out)["selection"]["id"] == "sel_1"


def test_less_uploads_what_lies_on_this_machine(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("{}\n")
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "dev.csv").write_text("a\n")
    words = ["less", str(tmp_path / "pool.jsonl"), "--task", str(tmp_path / "mmlu"), "--model", "tiny", "--no-evaluate"]
    ran, asked = asked_by(run, Flow(), *words, "--task-kind", "mmlu")
    assert ran.code == 0, ran.err
    assert asked[0].parts["file"] == ("pool.jsonl", b"{}\n")
    assert asked[1].parts["name"] == (None, b"mmlu")
    assert not [one for one in asked if one.path == "/evaluations"]
    ran, asked = asked_by(run, Flow(), *words)
    assert ran.code == 2
    assert "--task-kind" in ran.err
    missing, _ = asked_by(run, Flow(), "less", str(tmp_path / "nowhere.jsonl"), *LESS[2:])
    assert missing.code == 1


# Documentation ----------------------------------------------------------------------------------------------------


def test_the_reference_of_commands_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "scripts/cli-docs", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
