"""What processes tell one another: every wait ends, and whoever comes too late hears that nobody waits any more."""

from typing import Any

import jax
import pytest

from fopd_jax.parallel import agreement
from fopd_jax.parallel.agreement import agree, forget, overheard, share, together


class Store:
    """The runtime's key-value store, as much of it as is used."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [item for item in self.values.items() if item[0].startswith(folder)]

    def key_value_delete(self, key: str) -> None:
        del self.values[key]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """For this process, number 0 of two."""
    store: Any = Store()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(agreement.global_state, "client", store)
    monkeypatch.setattr(agreement, "_rounds", type(agreement._rounds)())
    monkeypatch.setattr(agreement, "name_of", lambda process: f"process {process}")
    return store


def _told(store: Store, about: str, *words: str) -> None:
    """The other process has said this, one word a round."""
    store.values |= {f"fopd_jax/told/{about}/{round_}/1": word for round_, word in enumerate(words)}


def test_words_are_told_by_process_round_by_round_and_taken_back(store: Store):
    _told(store, "x", "a", "b", "c")
    assert [share("x", word) for word in "ABC"] == [["A", "a"], ["B", "b"], ["C", "c"]]
    own = [key for key in store.values if key.endswith("/0")]
    assert own == ["fopd_jax/told/x/2/0"]
    forget("x")
    assert not any(key.endswith("/0") for key in store.values)


def test_a_problem_of_one_is_one_of_all(store: Store):
    _told(store, "x", "", "theirs", "theirs")
    assert agree("x", "") == ""
    assert overheard("x") == "process 1: theirs"
    assert agree("x", "") == "process 1: theirs"
    assert agree("x", "ours") == "ours"
    assert overheard("x") == ""


def test_what_raises_on_one_process_raises_on_all(store: Store):
    _told(store, "x", "", "ValueError: theirs", "")
    assert together("x", lambda: 3) == 3
    with pytest.raises(RuntimeError, match="process 1: ValueError: theirs"):
        together("x", lambda: 3)
    with pytest.raises(ZeroDivisionError):
        together("x", lambda: 1 // 0)
    assert store.values["fopd_jax/told/x/2/0"].startswith("ZeroDivisionError: ")


def test_who_does_not_come_is_named_and_who_comes_later_is_told(store: Store):
    with pytest.raises(TimeoutError, match="x: process 1 not there within 0 s"):
        agree("x", "ours", 0.05)
    _told(store, "y", store.values["fopd_jax/told/x/0/0"])
    with pytest.raises(TimeoutError, match="y: process 1: ours, has waited for 0 s"):
        agree("y", "")


def test_one_process_agrees_with_itself():
    assert (share("x", "a"), agree("x", "b"), overheard("x"), together("x", lambda: 3)) == (["a"], "b", "", 3)
