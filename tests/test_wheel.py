"""What is built of the repository: wheel and source distribution hold every module and every recipe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; b.build_wheel('built'); b.build_sdist('built')"
#: What a build reads.
SOURCES = ("hf_bilb", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def files_of(folder: str, *suffixes: str) -> set[str]:
    paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return {path.relative_to(ROOT).as_posix() for path in paths}


def copy_sources(folder: Path) -> None:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution; built without a network."""
    pytest.importorskip("setuptools", minversion="77.0.3", reason="builds with setuptools")
    folder = tmp_path_factory.mktemp("source")
    copy_sources(folder)
    (folder / "built").mkdir()
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True, capture_output=True)
    return folder / "built"


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """A folder as `site-packages` is, with the wheel's content."""
    (wheel,) = built.glob("*.whl")
    folder = built / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_every_module_and_recipe_and_nothing_else(installed: Path) -> None:
    recipes = {f"hf_bilb/{path}" for path in files_of("recipes", ".yaml", ".py")}
    assert len(recipes) > 45
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    package = {path for path in found if ".dist-info/" not in path}
    assert package == files_of("hf_bilb", ".py", ".typed", ".css", ".js") | recipes


def test_the_source_distribution_has_them_too(built: Path) -> None:
    (packed,) = built.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of("recipes", ".yaml", ".py") | files_of("hf_bilb", ".py") | {"setup.py", "pyproject.toml"} <= names


def test_the_installed_package_finds_its_recipes(installed: Path, tmp_path: Path) -> None:
    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    where = "import hf_bilb.experiments.packaged as p; print(p.recipes_folder())"
    assert Path(python("-c", where).strip()) == installed / "hf_bilb/recipes"
    assert "qm9/bilb_small.yaml" in python("-m", "hf_bilb", "recipes")
    assert python("-m", "hf_bilb", "recipes", "copy", "sarcos/ls.yaml").startswith("wrote ls.yaml, network.py")
    assert "factory: network.py:build" in python("-m", "hf_bilb", "show", "ls.yaml")


def description(metadata: Path) -> str:
    return metadata.read_text(encoding="utf-8").partition("\n\n")[2]


def links_of(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_the_readme_in_the_wheel_has_no_relative_link(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    head = metadata.read_text(encoding="utf-8").partition("\n\n")[0]
    assert "Description-Content-Type: text/markdown" in head
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = links_of(description(metadata))
    assert links == [link for link in links_of(readme) if link.startswith("https://")] != []
    assert description(metadata).count("\n") >= readme.count("\n")
    assert "Your data (`docs/your_data.md`)" in description(metadata)


def test_with_an_address_they_go_to_the_tag_of_the_version(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77.0.3", reason="builds with setuptools")
    copy_sources(tmp_path)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = '[project.urls]\nSource = "https://example.org/hf_bilb"\n\n[project.scripts]'
    (tmp_path / "pyproject.toml").write_text(project.replace("[project.scripts]", urls))
    build = "from setuptools import build_meta as b; print(b.prepare_metadata_for_build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    base = "https://example.org/hf_bilb/blob/v0.1.0/"
    links = links_of(description(metadata))
    relative = [link for link in links_of((ROOT / "README.md").read_text("utf-8")) if not link.startswith("https://")]
    assert [link.removeprefix(base) for link in links if link.startswith(base)] == relative != []
    assert all(link.startswith("https://") for link in links)
