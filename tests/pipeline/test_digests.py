"""Digests: they change with the content and with nothing else, and a file is read again when it has changed."""

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.pipeline import digests
from libprune.pipeline.digests import SEAL, ChangedError, KnownDigests, sealed, sha256, text_digest, unsealed

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
contents = st.dictionaries(st.text(max_size=5), values, max_size=4)


@given(contents)
def test_sealed_content_comes_back_whatever_the_order_of_its_keys(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "a.json"
    assert unsealed(path, json.loads(json.dumps(sealed(content)))) == content
    assert unsealed(path, dict(reversed(sealed(content).items()))) == content
    assert unsealed(path, content) == content, "a file of another program"


@given(contents, st.text(max_size=5), values)
def test_other_content_under_the_same_digest_is_refused(tmp_path_factory, content, key, value):
    path = tmp_path_factory.getbasetemp() / "a.json"
    changed = sealed(content) | {key: value}
    if text_digest(content) == text_digest({k: v for k, v in changed.items() if k != SEAL}):
        return
    with pytest.raises(ChangedError, match=r"a\.json has changed since it was written"):
        unsealed(path, changed)


@pytest.mark.parametrize("name", ["shq256", "sha2506", "652ahs"])
def test_a_digest_whose_key_was_damaged_is_not_taken_for_none(tmp_path, name):
    content = {key.replace(SEAL, name): value for key, value in sealed({"a": 1}).items()}
    with pytest.raises(ChangedError, match=r"a\.json has changed since it was written: its digest stands under"):
        unsealed(tmp_path / "a.json", content)


def test_a_file_is_read_again_only_if_its_size_time_or_place_has_changed(tmp_path, monkeypatch):
    path, store, read = tmp_path / "file", tmp_path / ".work/digests.json", []

    def counted(file):
        read.append(file)
        return sha256(file)

    def known() -> str:
        return KnownDigests(store).of({"name": path})["name"]

    monkeypatch.setattr(digests, "sha256", counted)
    path.write_bytes(b"one")
    assert known() == known() == sha256(path)
    assert len(read) == 2, "a file that has just been written may change again within one tick of the clock"
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    assert known() == known() == sha256(path)
    assert len(read) == 3
    os.utime(path, ns=(10**18, 10**18))
    known()
    time.sleep(0.02)  # more than a tick of the clock of files
    path.write_bytes(b"two")
    os.utime(path, ns=(10**18, 10**18))
    assert known() == sha256(path), "other content of the same size, with the old time put back"
    (tmp_path / "other").write_bytes(b"six")
    os.utime(tmp_path / "other", ns=(10**18, 10**18))
    (tmp_path / "other").replace(path)
    assert known() == sha256(path), "another file of the same size and time"
    store.write_text(store.read_text().replace(sha256(path), "0" * 64))
    assert known() == sha256(path), "a damaged memory is not believed"
