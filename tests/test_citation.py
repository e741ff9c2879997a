"""CITATION.cff has what version 1.2.0 of its format asks for, and the version of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import hf_bilb

ROOT = Path(__file__).parents[1]
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
#: Of the schema: what may stand at the top, and in a reference of the kind that is used here.
TOP = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords"),
    *("license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact"),
    *("repository-code", "title", "type", "url", "version"),
}
PERSON = {"family-names", "given-names", "affiliation", "email", "orcid"}
ENTITY = {"name", "email", "website"}


def check_authors(authors: list[dict[str, Any]]) -> None:
    assert authors
    for author in authors:
        assert author.keys() <= (ENTITY if "name" in author else PERSON)
        assert all(isinstance(value, str) and value for value in author.values())


def test_required_keys_and_their_types() -> None:
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys() <= TOP
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert all(isinstance(CITATION[key], str) and CITATION[key] for key in ("message", "title", "abstract", "license"))
    check_authors(CITATION["authors"])
    assert len(set(CITATION["keywords"])) == len(CITATION["keywords"]) > 0


def test_references() -> None:
    for reference in CITATION["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        check_authors(reference["authors"])
        assert isinstance(reference["year"], int)
        assert reference["url"].startswith("https://arxiv.org/abs/")


def test_versions_and_licenses_are_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,), (license_name,) = (
        re.findall(rf'^{key} = "(.+)"$', project, flags=re.M) for key in ("version", "license")
    )
    assert CITATION["version"] == version == hf_bilb.__version__
    assert CITATION["license"] == license_name
