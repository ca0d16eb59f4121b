"""What pyproject.toml cannot say: `stages`, a folder at the top, is installed as `libprune.stages`."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["libprune*"]), "libprune.stages"], package_dir={"libprune.stages": "stages"})
