"""ScienceQA as MoLA measures it: the model writes its answer, and has failed where it does not say it exactly once.

Files and questions are those of `scienceqa.py`.
"""

from __future__ import annotations

from datastore.tasks.scienceqa import ScienceQa

READER = ScienceQa(written=True)
