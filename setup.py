"""The packages of the wheel: those below hf_bilb/, and as `hf_bilb/recipes` the folder recipes/. The rest is said in
pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_bilb*"]), "hf_bilb.recipes"],
    package_dir={"hf_bilb.recipes": "recipes"},
    package_data={
        "hf_bilb": ["py.typed", "reporting/page.css", "reporting/page.js"],
        "hf_bilb.recipes": ["**/*.yaml", "**/*.py"],
    },
)
