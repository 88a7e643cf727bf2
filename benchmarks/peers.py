"""Other libraries, where they are installed: bergson and dattri-llm, each as its own documentation has it used.

Both get the batches that the plain step found best, but for bergson's global projection, which draws a matrix for each
batch: that gets bergson's default and, as another contestant, a large one. Both get a copy of the model of their own,
since they change which of its weights require a gradient and hang hooks on its layers.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contestants import Contestant, losses
from benchmarks.workload import Workload, trainable
from worker.batches import Encoded

BERGSON_TOKENS = 2048
"""bergson's default tokens of a batch."""

LORA_LAYERS = ("lora_A.default", "lora_B.default")

NEEDED = {"bergson": ["bergson"], "dattri-llm": ["dattri_llm", "dattri"]}


def missing(peer: str) -> list[str]:
    """Return the packages that the peer needs and that are not installed."""
    return [package for package in NEEDED[peer] if importlib.util.find_spec(package) is None]


class Bergson(Contestant):
    """bergson: `global` projects to all dims with one random matrix, `per-module` each layer's gradient from two sides.

    With `adam` its own map, which divides by the root of the second moment and knows no first one. `large`: in batches
    so large that the matrix is drawn but a few times.
    """

    def __init__(
        self, workload: Workload, target: Literal["global", "per-module"], *, adam: bool = False, large: bool = False
    ) -> None:
        from bergson import GradientProcessor  # noqa: PLC0415  # not a requirement
        from bergson.gradients import AdamNormalizer  # noqa: PLC0415

        self.name = f"bergson{' adam' if adam else ''} {target}{', large batch' if large else ''}"
        self.draws_matrix = target == "global"
        self.default_budget = None if large else BERGSON_TOKENS
        self.exact = "adam less" if adam else "sgd"
        self._workload = workload
        self._model = copy.deepcopy(workload.model)
        # as its own set-up leaves a model: gradients start at the embeddings, and no weight of LoRA gets a summed one
        self._model.requires_grad_(False)
        self._model.get_input_embeddings().requires_grad_(True)
        named = self._model.base_model.named_modules()
        self._layers = {name for name, _ in named if name.endswith(LORA_LAYERS)}
        side = math.isqrt(workload.dims // len(self._layers))
        second = {name.removeprefix("base_model."): v for name, v in workload.moments.exp_avg_sq.items()}
        self._processor = GradientProcessor(
            normalizers={name: AdamNormalizer(second[f"{name}.weight"]) for name in self._layers} if adam else {},
            projection_dim=workload.dims if target == "global" else side,
            projection_target="global" if target == "global" else "per_module",
        )

    def features(self, rows: Sequence[Encoded]) -> NDArray[np.float32]:
        """Return the feature of each row: (rows, dims), or a little less where dims is no multiple."""
        from bergson import InMemoryCollector  # noqa: PLC0415
        from bergson.collector.collector import CollectorComputer  # noqa: PLC0415
        from bergson.config import IndexConfig  # noqa: PLC0415
        from datasets import Dataset  # noqa: PLC0415

        assert self.token_budget is not None
        data = Dataset.from_dict(
            {"input_ids": [list(row.input_ids) for row in rows], "labels": [list(row.labels) for row in rows]}
        )
        with TemporaryDirectory() as folder, _quiet():
            config = IndexConfig(run_path=str(Path(folder) / "run"), loss_reduction="mean")
            config.partial_run_path.mkdir()
            collector = InMemoryCollector(
                model=self._model.base_model,
                data=data,
                cfg=config,
                processor=self._processor,
                target_modules=self._layers,
            )
            CollectorComputer(
                self._model,
                data,
                collector=collector,
                batches=list(self._workload.batches(rows, self.token_budget)),
                cfg=config,
            ).run_with_collector_hooks()
        return torch.cat([part.float() for part in collector.gradients.values()], dim=1).numpy()


class DattriLlm(Contestant):
    """dattri-llm: every layer's gradient projected by one random matrix (`dense`) or cut to random entries (`mask`)."""

    def __init__(self, workload: Workload, style: Literal["dense", "mask"], *, adam: bool = False) -> None:
        from dattri_llm import HookManager, HookManagerCallback, HookManagerConfig  # noqa: PLC0415

        self.name = f"dattri-llm{' adam' if adam else ''} {style}"
        self.exact = "adam exact" if adam else "sgd"
        model = copy.deepcopy(workload.model)
        self._workload = Workload(model, workload.rows, workload.moments, workload.dims, workload.device)
        layers = [name for name, _ in model.named_modules() if name.endswith(LORA_LAYERS)]
        dim = workload.dims // len(layers)
        settings: dict[str, Any] = {"style": style, "proj_dim": dim, "proj_seed": 0}
        if style == "dense":
            settings |= {"proj_type": "rademacher", "proj_max_batch_size": 8}
        self._records: list[Any] = []

        class Keep(HookManagerCallback):  # type: ignore[misc]  # untyped base
            def on_step_end(_, record: Any) -> None:  # noqa: N805  # self is the contestant
                self._records.append(record.gradient)

        self._manager = HookManager(
            model,
            config=HookManagerConfig(
                hook_types=dict.fromkeys(layers, "invasive_linear_io"), projection_kwargs={"__default__": settings}
            ),
            callbacks=[Keep()],
            optimizer=_optimizer(self._workload) if adam else None,
        )

    def features(self, rows: Sequence[Encoded]) -> NDArray[np.float32]:
        """Return the feature of each row: (rows, dims), or a little less where dims is no multiple."""
        assert self.token_budget is not None
        features: NDArray[np.float32] | None = None
        for batch in self._workload.batches(rows, self.token_budget):
            with self._manager.collect():
                losses(self._workload, [rows[index] for index in batch]).sum().backward()  # type: ignore[no-untyped-call]
            self._workload.model.zero_grad()
            [gradient] = self._records
            self._records.clear()
            part = torch.cat([gradient.data[name].float() for name in sorted(gradient.data)], dim=1)
            if features is None:
                features = np.zeros((len(rows), part.shape[1]), dtype=np.float32)
            features[batch] = part.cpu().numpy()
        assert features is not None
        return features


def _optimizer(workload: Workload) -> torch.optim.Optimizer:
    """Return the optimizer that the moments are those of."""
    named = trainable(workload.model)
    optimizer = torch.optim.AdamW(named.values(), weight_decay=0.0)
    moments = workload.moments
    for name, parameter in named.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(moments.step)),
            "exp_avg": moments.exp_avg[name],
            "exp_avg_sq": moments.exp_avg_sq[name],
        }
    return optimizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop progress bars and notes."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)
