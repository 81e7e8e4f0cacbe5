"""Whether the hub is asked for a name, and what is said where it cannot be: nothing here needs a network."""
import pytest
from huggingface_hub import constants

from frpo.data import hub
from frpo.data.hub import unreachable

CLOSED = "http://127.0.0.1:9/mirror"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No proxy, an empty cache, an address that nobody listens to."""
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)


def asked(name="owner/name"):
    return unreachable(name, "model", "config.json")


def test_an_address_that_does_not_answer_is_named():
    assert asked() == "the hub (127.0.0.1) cannot be reached: Connection refused"


@pytest.mark.parametrize("proxies, bypassed, known", [
    ({"http": "p"}, False, None), ({"all": "p"}, False, None), ({"https": "p"}, False, "the hub"),
    ({"all": "p"}, True, "the hub")])
def test_behind_a_proxy_the_hub_itself_is_not_asked(monkeypatch, proxies, bypassed, known):
    monkeypatch.setattr(hub, "getproxies", lambda: proxies)
    monkeypatch.setattr(hub, "proxy_bypass", lambda host: bypassed)
    assert (asked() and asked()[:7]) == known


@pytest.mark.parametrize("name", ["a name", "a--b/c", "x" * 300])
def test_what_is_no_id_is_left_to_the_library_that_explains_it(name):
    assert asked(name) is None


@pytest.mark.parametrize("file", ["snapshots/abc/config.json", ".no_exist/abc/config.json"])
def test_what_the_cache_knows_is_not_asked_for(tmp_path, file):
    kept = tmp_path / "models--owner--name"
    for path, text in ((kept / "refs" / "main", "abc"), (kept / "snapshots" / "abc" / "other", ""), (kept / file, "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert asked() is None and asked("owner/another") is not None


@pytest.mark.parametrize("endpoint, offline", [(CLOSED, True), ("mirror.example", False)])
def test_offline_or_without_an_address_nobody_is_asked(monkeypatch, endpoint, offline):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert asked() is None
