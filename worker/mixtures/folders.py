"""Mixtures in folders: PEFT's files, safetensors only, and beside them `mixture.json`, without which none is loaded.

The manifest says what PEFT's configuration cannot: which mixture it is, for how many layers, and each expert's alpha.
PEFT by itself refuses such a folder for the shapes of its weights, and so does `load_adapter` of `worker/models.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from datastore import mixture_files
from datastore.durable import write_file
from datastore.errors import InvalidCheckpoint
from datastore.mixture_files import MANIFEST, Manifest, read_manifest
from worker.mixtures.layer import Mixture
from worker.mixtures.model import layers_of, of_model, peft_config, refuse_unknown_modules
from worker.models import ModelError, load_adapter


def save_mixture(model: PeftModel, folder: Path) -> None:
    """Write the mixture on a model to a folder. Raises ModelError where there is none."""
    mixture = of_model(model)
    manifest = Manifest(settings=mixture.settings, layers=len(mixture.layers), alphas=list(mixture.alphas))
    # "auto" would ask the hub whether the vocabulary has grown; it has not
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_file(folder / MANIFEST, manifest.model_dump_json(indent=2).encode())


def load_mixture(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the mixture in a folder on `base`, in eval mode and ready to be trained on; `unload_adapter` takes it off.

    Raises ModelError where there is no manifest, where the base model is another, or where a weight of an expert or a
    router is missing, left over or of another shape; `base` is then as it was.
    """
    with _as_model_error():
        manifest = read_manifest(folder)
    if manifest.layers != layers_of(base):
        raise ModelError(
            f"the mixture is of a model of {manifest.layers} layers, and this one has {layers_of(base)}: "
            "load it on its own base model"
        )
    refuse_unknown_modules(base, manifest.settings.modules)
    with _as_model_error():
        layers = tuple(mixture_files.layers_of(manifest))
    mixture = Mixture(manifest.settings, layers, tuple(manifest.alphas))
    return load_adapter(base, folder, config=peft_config(mixture))


@contextmanager
def _as_model_error() -> Iterator[None]:
    try:
        yield
    except InvalidCheckpoint as error:
        raise ModelError(str(error)) from error
