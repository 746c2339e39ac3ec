"""Labelled US addresses, from the source release of usaddress (MIT), which alone has them."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

RELEASE = "usaddress==0.5.16"
LABELLED = "usaddress-0.5.16/training/labeled.xml"
RARE = 25  # a label with fewer words than this becomes OTHER
OTHER = "Other"

Address = list[tuple[str, str]]  # words, with the comma that follows, and their labels


def labelled_addresses(sdist: Path | None) -> list[Address]:
    """The addresses of ``sdist``; of a download where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        return read_addresses(sdist or download(Path(folder)))


def download(folder: Path) -> Path:
    """Fetch the source release (pip also asks it for its metadata, which takes some seconds)."""
    name = RELEASE.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
    subprocess.run([*pip, "--dest", str(folder), RELEASE], check=True)
    return next(folder.glob("*.tar.gz"))


def read_addresses(sdist: Path) -> list[Address]:
    """The labelled addresses of two words and more, without repetitions, rare labels folded."""
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(LABELLED)
        if member is None:
            raise FileNotFoundError(f"{sdist} has no {LABELLED}")
        root = ET.parse(member).getroot()
    unique = dict.fromkeys(tuple(_words(element)) for element in root)
    count = Counter(label for address in unique for _, label in address)
    return [
        [(word, label if count[label] >= RARE else OTHER) for word, label in address]
        for address in unique
        if len(address) > 1
    ]


def _words(element: ET.Element) -> Iterator[tuple[str, str]]:
    for part in element:
        word = f"{part.text or ''}{part.tail or ''}".strip()
        if word:
            yield word, part.tag
