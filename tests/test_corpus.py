"""benchmarks/corpus.py: what it takes from unpacked packages."""

import gzip
import sys
from pathlib import Path

import pytest


def test_documents_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import corpus

    files = {
        # Headword, offset, length in base 64; two headwords of one entry, and one about the dictionary.
        "usr/share/dictd/some.index": b"00-info\tA\tC\nbone\tF\tF\nants\tC\tD\nant\tC\tD\n",
        "usr/share/dictd/some.dict.dz": gzip.compress(b"..antbone!"),
        "usr/share/doc/linux-doc-6.1/Documentation/a/b.rst.gz": gzip.compress(b"kernel"),
        "usr/share/doc/linux-doc-6.1/Documentation/translations/it/b.rst.gz": gzip.compress(b"nocciolo"),
        "usr/share/doc/linux-doc-6.1/html/_sources/a/b.rst.txt": b"kernel",
        "usr/share/doc/python3.11/html/_sources/c.rst.txt": "Python \u2019".encode(),
        "usr/share/perl/5.36/pod/perl.pod": b"caf\xe9",  # Latin 1
        "usr/share/perl/5.36/pod/perljp.pod": b"other",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert list(corpus.documents(tmp_path)) == ["ant", "bone!", "kernel", "Python \u2019", "caf\u00e9"]
    assert corpus.number("BA") == 64
    del sys.modules["corpus"]
