"""125 MB of English for `--data FOLDER`, from packages of Debian: a folder for each domain.

    python benchmarks/corpus.py FOLDER

Needs apt-get and dpkg-deb; downloads 86 MB and installs nothing. It writes FOLDER/DOMAIN/text.jsonl, a line
for each entry of a dictionary or page of a manual, without translations. `--data FOLDER/DOMAIN` reads one.
The text is not part of this repository; its licences:

    dictionary  dict-gcide     GNU Collaborative International Dictionary of English, GPL 2 or later
    glosses     dict-wn        WordNet 3.0, the licence of Princeton University
    computing   dict-foldoc    Free On-line Dictionary of Computing, GFDL 1.1 or later
    kernel      linux-doc      documentation of Linux, GPL 2
    python      python3-doc    documentation of Python, PSF licence 2
    perl        perl-doc       documentation of Perl, Artistic licence or GPL 1 or later

The copyright file of each package has the whole of it.
"""

import argparse
import gzip
import json
import re
import string
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {
    "dictionary": "dict-gcide",
    "glosses": "dict-wn",
    "computing": "dict-foldoc",
    "kernel": "linux-doc",
    "python": "python3-doc",
    "perl": "perl-doc",
}
PAGES = (
    "usr/share/doc/*/Documentation/**/*.rst.gz",
    "usr/share/doc/python*/**/*.rst.txt",
    "usr/share/perl/**/*.pod",
)
TRANSLATED = re.compile(r"/translations/|/perl(cn|jp|ko|tw)\.pod$")
DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for domain, package in PACKAGES.items():
        with tempfile.TemporaryDirectory() as scratch:
            texts = [text for text in documents(unpack(package, Path(scratch))) if text.strip()]
        file = folder / domain / "text.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        print(f"{domain:<11}{len(texts):>8,} documents{file.stat().st_size / 1e6:>7.1f} MB", flush=True)


def unpack(package: str, scratch: Path) -> Path:
    """Download a package, or what a package of one version stands for, and unpack it."""
    listed = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=True)
    versioned = re.findall(r"Depends: ((?:linux-doc-|python3\.)\S+)", listed.stdout)
    subprocess.run(
        ["apt-get", "download", "-q", versioned[0] if versioned else package], cwd=scratch, check=True
    )
    (archive,) = scratch.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, scratch / "files"], check=True)
    return scratch / "files"


def documents(root: Path) -> Iterator[str]:
    """The texts of an unpacked package, in an order that does not change."""
    for index in sorted(root.glob("usr/share/dictd/*.index")):
        yield from entries(index.read_bytes(), gzip.decompress(index.with_suffix(".dict.dz").read_bytes()))
    for file in sorted(file for pattern in PAGES for file in root.glob(pattern)):
        if not TRANSLATED.search(file.as_posix()):
            content = file.read_bytes()
            yield decoded(gzip.decompress(content) if file.suffix == ".gz" else content)


def entries(index: bytes, text: bytes) -> Iterator[str]:
    """The entries of a dictionary of dictd: the index has headword, offset and length of each."""
    places = set()
    for line in index.splitlines():
        headword, offset, length = line.decode("utf-8", "replace").split("\t")[:3]
        if not headword.startswith("00"):  # about the dictionary itself
            places.add((number(offset), number(length)))
    for offset, length in sorted(places):
        yield decoded(text[offset : offset + length])


def number(digits: str) -> int:
    """A number of base 64, the highest digit first."""
    value = 0
    for digit in digits:
        value = 64 * value + DIGITS.index(digit)
    return value


def decoded(content: bytes) -> str:
    """Text in UTF-8 or, in old manuals, Latin 1."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


if __name__ == "__main__":
    main()
