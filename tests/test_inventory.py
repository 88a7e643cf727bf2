"""The inventory: every kind of thing that lies in the store is in it, and every room looks after each of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datastore import inventory
from datastore.garbage import garbage
from datastore.inventory import FEATURES, KINDS, Kind, of_part
from datastore.leftovers import OLD
from datastore.settings import Settings
from datastore.store import open_store
from datastore.usage import usage
from tests.stores import Store, store

__all__ = ["store"]

LOOKED_AFTER = [kind for kind in KINDS if kind.owners is not None or kind.gone is not None]


def test_only_a_cache_with_a_bound_of_its_own_is_looked_after_by_nobody() -> None:
    assert [kind.folder for kind in KINDS if kind not in LOOKED_AFTER] == ["features-cache"]
    assert not [kind.folder for kind in KINDS if kind.owners is not None and kind.gone is not None]


def test_every_folder_of_the_settings_is_told() -> None:
    settings = Settings(data=Path("store"))
    properties = (name for name, value in vars(Settings).items() if isinstance(value, property))
    folders = {found for name in properties if isinstance(found := getattr(settings, name), Path)}
    assert {settings.data / kind.part for kind in KINDS} == folders


def test_no_store_opens_over_a_folder_that_is_not_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    others = tuple(kind for kind in KINDS if kind.folder != "matrices")
    monkeypatch.setattr(inventory, "KINDS", others)
    with pytest.raises(KeyError, match="matrices is no part of the store"):
        open_store(store.settings, store.catalog)
    with pytest.raises(KeyError, match=r"inventory\.py"):
        of_part("elsewhere")


@pytest.mark.parametrize("kind", LOOKED_AFTER, ids=lambda kind: kind.folder)
def test_what_nothing_names_is_counted_found_and_removed(store: Store, kind: Kind) -> None:
    path = _stray(store.settings, kind)
    assert usage(store.catalog, store.settings).bytes[kind.part] > 0
    assert list(garbage(store, older_than=OLD)) == [], "somebody may be about to record it"
    found = list(garbage(store, older_than=0))
    assert [each.place for each in found] == [str(path.relative_to(store.settings.data))]
    found[0].remove()
    assert not path.exists()
    assert path.name.removesuffix(kind.ending) not in kind.ids(store)


def _stray(settings: Settings, kind: Kind) -> Path:
    """A thing of a kind that nobody has asked for."""
    path = kind.path(settings, kind.pattern.removesuffix(kind.ending).replace("*", "0123"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind.ending:
        path.write_bytes(b"12345")
    else:
        path.mkdir()
        of = {"made_from": {"texts": ["ds_gone"]}, "pieces": [[["seg_gone", 0, 10]]]}
        (path / "manifest.json").write_text(json.dumps(of))
    return path


def test_a_backup_has_every_kind_that_a_table_records(store: Store) -> None:
    assert [kind.folder for kind in KINDS if kind.rows and kind.kept is None] == [FEATURES.folder]


def test_what_the_doctor_misses_is_backed_up_and_can_be_made_good() -> None:
    checked = [kind for kind in KINDS if kind.check is not None]
    assert [kind.folder for kind in checked if kind.kept is None or kind.again is None] == []
