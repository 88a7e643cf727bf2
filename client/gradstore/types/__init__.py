"""Every JSON body of the API, defined once: the service validates with these models and the client returns them.

Conventions (docs/api.md): ids are prefixed strings, times are RFC 3339 UTC and end in `_at`, durations are seconds,
fractions lie between 0 and 1, and every key is present in an answer.
"""

from __future__ import annotations

from gradstore.types.access import *
from gradstore.types.adapter_choices import *
from gradstore.types.adapters import *
from gradstore.types.annotations import *
from gradstore.types.attributions import *
from gradstore.types.base import *
from gradstore.types.checkpoints import *
from gradstore.types.comparisons import *
from gradstore.types.conversions import *
from gradstore.types.datasets import *
from gradstore.types.distributions import *
from gradstore.types.estimates import *
from gradstore.types.evaluations import *
from gradstore.types.explanations import *
from gradstore.types.finetunes import *
from gradstore.types.generations import *
from gradstore.types.gradients import *
from gradstore.types.imports import *
from gradstore.types.jobs import *
from gradstore.types.mixtures import *
from gradstore.types.predictors import *
from gradstore.types.problems import *
from gradstore.types.projectors import *
from gradstore.types.provenance import *
from gradstore.types.selection import *
from gradstore.types.service import *
from gradstore.types.streams import *
from gradstore.types.tasks import *
from gradstore.types.taxonomies import *
from gradstore.types.validations import *
