"""Sentence encoders as their files describe them: how a text becomes tokens, and the tokens' states one row of numbers.

A folder in the layout of sentence-transformers has a `modules.json`: a transformer, a pooling, perhaps a normalisation,
whose settings lie beside it. A folder without one is a plain encoder, whose last hidden states are averaged. What the
files ask for and is not done here is refused: a row would be another than the one the encoder's authors mean.
Nothing here imports torch; the worker gets what is found (worker/encoders.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradstore.types import ProblemItem

from datastore import hub, models
from datastore.errors import InvalidInput

MODULES, SETTINGS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
CONFIG, TOKENIZER_CONFIG, POOLING = "config.json", "tokenizer_config.json", "1_Pooling/config.json"
FILES = (MODULES, SETTINGS, PROMPTS, TOKENIZER_CONFIG, POOLING)
"""What says of an encoder, beside its configuration, what is read here."""
USUAL_MAX_LENGTH = 512  # tokens, where the files say nothing
MOST_MAX_LENGTH = 1 << 20  # a tokenizer without a limit says 1e30
POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len",
    "weightedmean": "position",
    "lasttoken": "last",
}
"""What sentence-transformers calls a pooling and what it is called here, in the order in which it joins several."""


@dataclass(frozen=True)
class Encoder:
    """What is done with a text, and with its tokens' last hidden states."""

    width: int
    """Of a hidden state."""
    max_length: int
    """Tokens of a text, special ones included; the rest is cut off."""
    poolings: tuple[str, ...] = ("mean",)
    """Each gives `width` numbers: their rows are joined."""
    normalise: bool = False
    """Whether the row is divided by its length."""
    lower: bool = False
    prompt: str = ""
    """What stands before every text."""

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return self.width * len(self.poolings)

    def plan(self) -> dict[str, Any]:
        """What a worker is told."""
        return asdict(self)

    @classmethod
    def of_plan(cls, plan: dict[str, Any]) -> Encoder:
        """What a worker was told."""
        return cls(**{**plan, "poolings": tuple(plan["poolings"])})


def described(model: str, revision: str | None) -> Encoder:
    """The encoder of a hub id or a folder of this machine; of the hub, its small files are fetched.

    Raises `InvalidInput` where it is none, or asks for what is not done here.
    """
    folder = Path(model) if Path(model).is_absolute() else hub.files(model, revision, (CONFIG, *FILES))
    width = models.hidden_size(model, revision)
    if folder is None or width is None:
        raise _refused(
            f"what {model} is as an encoder is not known: its config.json is neither on the service's machine nor on "
            "the hub, or does not say how wide its hidden states are"
        )
    return _described(folder, model, width=width)


def refuse_other_modules(model: str, revision: str | None) -> None:
    """Raise `InvalidInput` for a folder of sentence-transformers that asks for what is not done here.

    What has no `modules.json` may be another model than an encoder. Nothing is fetched: of a model of the hub that is
    not on this machine, `described` finds it out.
    """
    folder = models.folder_of(model, revision)
    if folder is None or not all((folder / name).is_file() for name in (MODULES, CONFIG)):
        return
    if not (Path(model).is_absolute() or (folder / POOLING).is_file()):  # a part of a download
        return
    try:
        _described(folder, model, width=models.hidden_size(model, revision) or 0)
    except InvalidInput as error:
        raise InvalidInput(str(error), errors=[ProblemItem(detail=str(error), pointer="/model")]) from error


def _described(folder: Path, model: str, *, width: int) -> Encoder:
    try:
        return _read(folder, model, width)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise _refused(f"the files of {model} do not describe an encoder: {type(error).__name__} {error}") from error


def _read(folder: Path, model: str, width: int) -> Encoder:
    settings = _json(folder / SETTINGS)
    encoder = Encoder(
        width=width, max_length=_max_length(folder, settings), lower=bool(settings.get("do_lower_case", False))
    )
    if not (folder / MODULES).is_file():
        return encoder
    poolings: tuple[str, ...] = ()
    normalise = False
    for module in json.loads((folder / MODULES).read_bytes()):
        kind, path = module["type"].rpartition(".")[2], module["path"]
        if kind == "Transformer" and not path and not poolings:
            continue
        if kind == "Pooling" and path == POOLING.partition("/")[0] and not poolings:
            poolings = _poolings(_json(folder / POOLING), model)
        elif kind == "Normalize" and poolings:
            normalise = True
        else:
            raise _refused(
                f"{model} has the module {kind} in {path or 'its folder'!r}: of sentence-transformers' modules a "
                "Transformer in the folder itself, then a Pooling in 1_Pooling, then a Normalize are done here"
            )
    if not poolings:
        raise _refused(f"{model} has a modules.json without a Pooling: its tokens never become one row")
    found = {"poolings": poolings, "normalise": normalise, "prompt": _prompt(folder, model)}
    return Encoder(**{**encoder.plan(), **found})


def _poolings(settings: dict[str, Any], model: str) -> tuple[str, ...]:
    """The poolings that are switched on one by one, or, in newer files, named together."""
    named = settings.get("pooling_mode") or []
    switched = [name.removeprefix("pooling_mode_") for name, value in settings.items() if value is True]
    asked = {
        name.removesuffix("_tokens").removesuffix("_token")
        for name in ([named] if isinstance(named, str) else [*named, *switched])
        if name != "include_prompt"
    }
    if not asked or not asked <= POOLINGS.keys():
        raise _refused(f"{model} pools by {', '.join(sorted(asked)) or 'nothing'}; known are {', '.join(POOLINGS)}")
    return tuple(known for name, known in POOLINGS.items() if name in asked)


def _prompt(folder: Path, model: str) -> str:
    """What the encoder's authors put before every text, where nothing else is asked for."""
    settings = _json(folder / PROMPTS)
    name = settings.get("default_prompt_name")
    prompt = str((settings.get("prompts") or {}).get(name, "")) if name is not None else ""
    if prompt and _json(folder / POOLING).get("include_prompt", True) is False:
        raise _refused(f"{model} pools its texts without their prompt, which is not done here")
    return prompt


def _max_length(folder: Path, settings: dict[str, Any]) -> int:
    """The least of what the encoder, its tokenizer and its table of positions take."""
    own = settings.get("max_seq_length") or _json(folder / TOKENIZER_CONFIG).get("model_max_length")
    limits = (own, _positions(_json(folder / CONFIG)))
    known = [int(limit) for limit in limits if limit and limit <= MOST_MAX_LENGTH]
    return min(known, default=USUAL_MAX_LENGTH)


def _positions(config: dict[str, Any]) -> int | None:
    """Tokens that the model has positions for; RoBERTa's table begins with two, or more, that no token gets."""
    most = config.get("max_position_embeddings")
    if most and "roberta" in str(config.get("model_type")):
        return int(most) - int(config.get("pad_token_id") or 1) - 1
    return most


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return found


def _refused(detail: str) -> InvalidInput:
    return InvalidInput(detail, errors=[ProblemItem(detail=detail, pointer="/checkpoints")])
