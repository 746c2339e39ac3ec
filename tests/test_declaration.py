"""The manifest: every problem told, and the catalog brought in line with it, step by step or at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.declaration import Difference, apply, drift, parse
from adapter_router.catalog.records import AdapterSpec
from adapter_router.errors import InvalidRequest
from adapter_router.types import Source
from tests.catalogs import spec, version

MANIFEST = """
- name: food
  uri: s3://bucket/food
  base: minilm
  task: text-classification
  labels: [good, bad]
  pinned: true
  secretRef: bucket
  revision: main
  sha256: sha256:{digest}
- {{name: drinks, uri: /adapters/drinks, preload: true, lazy: true}}
""".format(digest="ab" * 32)


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    catalog = Catalog(catalog_url)
    yield catalog
    catalog.close()


def kinds(differences: list[Difference]) -> dict[str, str]:
    return {difference.name: difference.kind for difference in differences}


# -- the file ----------------------------------------------------------------------------------------------------


def test_a_manifest_says_what_adapters_there_shall_be() -> None:
    food, drinks = parse(MANIFEST)
    source = Source("s3://bucket/food", "main", f"sha256:{'ab' * 32}", "bucket")
    assert food == AdapterSpec("food", source, "minilm", "text-classification", ("good", "bad"), pinned=True)
    assert drinks == AdapterSpec("drinks", Source("/adapters/drinks"), preload=True, lazy=True)
    assert parse("adapters:" + MANIFEST) == [food, drinks]
    assert parse("[]") == parse("adapters: []") == []


def test_every_problem_of_every_entry_is_told() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse("""
        - {name: a, uri: /a, pined: true}
        - {name: b@v1, uri: ""}
        - {name: c, uri: /c, labels: [yes, no], task: cooking, revision: 1.0, sha256: abc}
        - just text
        - {uri: /d}
        - {name: e, uri: /e}
        - {name: e, uri: /f}
        - {name: "f ", uri: /f}
        """)
    said = caught.value.problems
    for words in (
        "adapters[0] ('a'): pined",
        "adapters[1] ('b@v1'): uri",
        "adapters[2] ('c'): labels.0 is True",
        "put quotes around it",
        "task is 'cooking'",
        "revision is 1.0",
        "sha256 is 'abc'",
        "adapters[3]: entry is 'just text'",
        "adapters[4]: name",
        "adapters[6] ('e'): the name is declared twice",
        "adapters[7] ('f '): 'f ' cannot name an adapter",
    ):
        assert any(words in problem for problem in said), (words, said)
    assert all(problem in str(caught.value) for problem in said)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a list"),
        ("adapters:", "must be a list"),
        ("food", "must be a list"),
        ("{adapters: [], other: 1, more: 2}", "unknown keys: 'other', 'more'"),
        ("- {name: a, uri: /a", "no YAML"),
        ("- {name: a, uri: /a, uri: /b}", "uri stands twice"),
        ("- !!python/object/apply:os.system [true]", "no YAML"),
        ("a\x00b", "no YAML"),
        ("[" * 5000, "no YAML"),
        ("- {name: a, uri: 2020-13-45}", "no YAML"),
    ],
)
def test_what_is_no_manifest(text: str, says: str) -> None:
    """An empty file is no declaration of nothing: a ConfigMap that is not there yet must not remove everything."""
    with pytest.raises(InvalidRequest, match=says):
        parse(text)


# -- the catalog -------------------------------------------------------------------------------------------------


def test_what_is_declared_comes_about_and_the_same_again_does_nothing(catalog: Catalog) -> None:
    declared = [spec("food", "/f"), spec("drinks", "/d", pinned=True), spec("late", "/l", lazy=True)]
    assert kinds(drift(declared, catalog)) == {"food": "added", "drinks": "added", "late": "added"}
    assert catalog.num_registered() == 0, "looking changes nothing"
    assert kinds(apply(declared, catalog)) == {"food": "added", "drinks": "added", "late": "added"}
    assert [r.spec for r in catalog.registrations()] == sorted(declared, key=lambda spec: spec.name)
    assert all(r.managed for r in catalog.registrations()) and set(catalog.unfinished()) == {"food", "drinks"}
    revision = catalog.revision()
    assert apply(declared, catalog) == drift(declared, catalog) == [] and catalog.revision() == revision


def test_changes_are_shown_field_by_field(catalog: Catalog) -> None:
    apply([spec("food", "/old", base="b"), spec("drinks", "/d")], catalog)
    for name in ("food", "drinks"):
        catalog.add_version(name, version(name, 1))
    declared = [spec("food", "/new", pinned=True, labels=("a",)), spec("drinks", "/d", preload=True)]
    food, drinks = drift(declared, catalog)
    assert food.fields == (
        ("uri", "/old", "/new"),
        ("base", "b", None),
        ("labels", None, ("a",)),
        ("pinned", False, True),
    )
    assert str(drinks) == "drinks: changed (preload: False -> True)"
    assert apply(declared, catalog) == [food, drinks]
    assert catalog.registration("food").phase == "Registered", "its files must be looked at"
    assert catalog.registration("drinks").phase == "Ready", "only a flag was set"
    assert catalog.registration("drinks").spec.preload


def test_only_what_a_manifest_has_declared_is_ever_removed(catalog: Catalog) -> None:
    catalog.register(spec("by-hand"))
    apply([spec("food"), spec("drinks")], catalog)
    assert kinds(apply([spec("food")], catalog)) == {"drinks": "removed"}
    assert kinds(apply([], catalog)) == {"food": "removed"}
    assert [r.spec.name for r in catalog.registrations()] == ["by-hand"]


def test_what_was_registered_by_hand_is_adopted_or_left_alone(catalog: Catalog) -> None:
    catalog.register_version(spec("same", "/s"), version("same", 1))
    catalog.register(spec("other", "/mine"))
    catalog.set_alias("alias", {"same@v1": 1})
    declared = [spec("same", "/s", pinned=True), spec("other", "/yours"), spec("alias", "/a"), spec("bad@name")]
    found = drift(declared, catalog)
    assert kinds(found) == {"same": "adopted", "other": "conflict", "alias": "conflict", "bad@name": "conflict"}
    assert apply(declared, catalog) == found
    same = catalog.registration("same")
    assert same.managed and same.spec.pinned and same.phase == "Ready"
    other = catalog.registration("other")
    assert other.spec.source.uri == "/mine" and not other.managed
    assert "/mine" in str(found[1]) and "alias" in str(found[2])
    apply([], catalog)
    assert catalog.registration("other"), "and it is not removed"


def test_what_others_lead_to_stays_until_they_lead_elsewhere(catalog: Catalog) -> None:
    apply([spec("a"), spec("b")], catalog)
    for name in ("a", "b"):
        catalog.add_version(name, version(name, 1))
    catalog.set_alias("b", {"a@v1": 1})
    catalog.set_alias("prod", {"b@v1": 1})
    (shown, kept) = drift([], catalog)
    assert (shown.kind, kept.kind) == ("conflict", "conflict") and "'prod' leads to it" in str(kept)
    assert kinds(apply([], catalog)) == {"a": "conflict", "b": "conflict"}
    catalog.remove_alias("prod")
    assert kinds(apply([], catalog)) == {"b": "removed", "a": "removed"}, "b led to a, and goes first"


def test_what_was_changed_by_hand_is_put_back(catalog: Catalog) -> None:
    declared = [spec("food", "/f")]
    apply(declared, catalog)
    catalog.pin("food", True)
    catalog.register(replace(declared[0], source=Source("/other")), replace=True)
    assert catalog.registration("food").managed
    assert [name for name, _, _ in drift(declared, catalog)[0].fields] == ["uri"]
    apply(declared, catalog)
    assert catalog.registration("food").spec == declared[0]


def test_a_name_declared_twice_is_refused(catalog: Catalog) -> None:
    for method in (drift, apply):
        with pytest.raises(InvalidRequest, match="'food' is declared 2 times"):
            method([spec("food"), spec("food", "/other")], catalog)


class Interrupted(Catalog):
    """A catalog in which somebody does something once it has been compared, and before it is changed."""

    def __init__(self, url: str, meanwhile: Callable[[Catalog], object]) -> None:
        super().__init__(url)
        self.meanwhile = meanwhile

    def drift(self, declared: Sequence[AdapterSpec]) -> list[Difference]:
        found = super().drift(declared)
        self.meanwhile(self)
        return found


def test_what_others_do_meanwhile_is_not_undone(catalog: Catalog, catalog_url: str) -> None:
    apply([spec("food"), spec("drinks")], catalog)

    def by_hand(there: Catalog) -> None:
        there.remove("food")
        there.register(spec("food", "/by-hand"))
        there.register(spec("new", "/by-hand"))

    interrupted = Interrupted(catalog_url, by_hand)
    done = apply([spec("new", "/declared")], interrupted)
    interrupted.close()
    assert kinds(done) == {"new": "conflict", "drinks": "removed"}
    assert [r.spec.source.uri for r in catalog.registrations()] == ["/by-hand", "/by-hand"]


def _apply(url: str) -> None:
    catalog = Catalog(url)
    apply([spec(f"n-{number}") for number in range(300)], catalog)
    catalog.close()


def test_routers_that_reconcile_at_once_do_it_once(catalog: Catalog, catalog_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_apply, args=(catalog_url,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert catalog.num_registered() == 300 == catalog.revision()
