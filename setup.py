"""The packages of the wheel: those below hf_bilb/, and as `hf_bilb/recipes` the folder recipes/. And its README, whose
links must work outside of the repository. The rest is said in pyproject.toml."""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]


def readme():
    """README.md with links to the tag of this version, at the address `Source` of [project.urls]; as long as there is
    none, with the files' names in place of links to them."""
    source = PROJECT.get("urls", {}).get("Source")

    def absolute(link):
        text, target = link.groups()
        if source is None:
            return text if target.startswith("#") else f"{text} (`{target.partition('#')[0]}`)"
        return f"[{text}]({source}/blob/v{PROJECT['version']}/{target})"

    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?://)([^)]+)\)", absolute, text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["hf_bilb*"]), "hf_bilb.recipes"],
    package_dir={"hf_bilb.recipes": "recipes"},
    package_data={
        "hf_bilb": ["py.typed", "reporting/page.css", "reporting/page.js"],
        "hf_bilb.recipes": ["**/*.yaml", "**/*.py"],
    },
)
